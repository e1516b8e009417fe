"""What a server answers instead of scores: a status, and what was given, what was expected, what to do."""

from __future__ import annotations

from typing import Any


class RequestError(ValueError):
    """A request that is not scored.

    Args:
        status: of HTTP: 400 not readable, 401 no token, 408 too slow, 413 too large, 415 another kind of body, 422 readable
            but not scorable, 429 the queue is full, 503 not ready, or not in time.
        code: short name of the fault, for programs.
        given, expected, do: for people.
        retry_after: whole seconds after which the same request may be scored.
    """

    def __init__(
        self, status: int, code: str, *, given: str, expected: str, do: str, retry_after: int | None = None
    ) -> None:
        super().__init__(f"{code}: given {given}; expected {expected}; {do}")
        self.status = status
        self.code = code
        self.given = given
        self.expected = expected
        self.do = do
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """What is sent as JSON."""
        return {"error": self.code, "given": self.given, "expected": self.expected, "do": self.do}

    @property
    def headers(self) -> dict[str, str]:
        """Headers that belong to the status."""
        headers = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        return headers | ({"www-authenticate": "Bearer"} if self.status == 401 else {})


def malformed(given: str, expected: str) -> RequestError:
    """A body that is no safetensors."""
    return RequestError(
        400, "malformed_body", given=given, expected=expected, do="write the body with safetensors.torch.save"
    )


def unscorable(
    code: str, given: str, expected: str, do: str = "see GET /v1/info for what this server takes"
) -> RequestError:
    """A body that can be read and not scored."""
    return RequestError(422, code, given=given, expected=expected, do=do)
