"""A vision-language model behind an OpenAI-compatible endpoint as a judge: priced, retried, and never asked twice."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

from dina_reward.checkpoints.atomic import atomic_file
from dina_reward.checks.stored import read_json
from dina_reward.distill.judges import Answer, Judge, JudgeBatch, JudgeError, JudgeKind, checked_answers
from dina_reward.distill.remote import encoded, image_columns, per_row, post_json


SCORE_INSTRUCTION = (
    "Rate how well the image fits the prompt and how good it looks, from 0 (bad) to 10 (perfect); use decimals. Answer with "
    'a JSON object like {"score": 6.5} and nothing else.\nPrompt: {prompt}'
)
PAIR_INSTRUCTION = (
    "Two images were made for the prompt below. Which of them fits it better and looks better? Answer with a JSON object, "
    'either {"better": "a"} for the first, {"better": "b"} for the second, or {"better": "tie"}, and nothing else.\n'
    "Prompt: {prompt}"
)
_PER = 1_000_000


class VisionEndpointJudge(Judge):
    """Asks a chat model that sees images to score samples or to compare two; one request for each.

    Answers are kept in ``cache_dir`` by what was asked (model, instruction, prompt, images), with their tokens and price, so
    that it is also the log of costs: nothing is ever paid for twice.

    Examples:
        >>> judge = VisionEndpointJudge("gpt-4o-mini", input_price=0.15, output_price=0.6, cache_dir="answers")
        >>> judge = VisionEndpointJudge("qwen2.5-vl-7b", base_url="http://localhost:8000/v1", api_key_variable=None)

    Args:
        model: name of the model.
        kind: ``"scores"``, or ``"pairs"`` to compare.
        base_url: of the endpoint, without ``/chat/completions``; by default ``OPENAI_BASE_URL``, or else that of OpenAI.
        api_key_variable: environment variable that holds the key, which is read at each call and never written; ``None`` for
            an endpoint without one.
        instruction: text with ``{prompt}`` in it; it must ask for a JSON object with ``"score"`` or ``"better"``.
        input_price, output_price: of a million tokens.
        cache_dir: directory of answers.
        retries: further tries of a request that failed.
        retry_seconds: wait before the first of them; doubled each time.
        concurrency: requests at once.
        timeout: seconds for each.

    Raises:
        ValueError: an instruction without ``{prompt}``.
    """

    def __init__(
        self,
        model: str,
        kind: JudgeKind = "scores",
        *,
        base_url: str | None = None,
        api_key_variable: str | None = "OPENAI_API_KEY",
        instruction: str | None = None,
        input_price: float = 0.0,
        output_price: float = 0.0,
        cache_dir: str | os.PathLike[str] = "judge_answers",
        retries: int = 4,
        retry_seconds: float = 1.0,
        concurrency: int = 4,
        timeout: float = 120.0,
    ) -> None:
        super().__init__(model.rpartition("/")[2], kind, needs_images=True)
        base_url = base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
        self.model, self.base_url, self.api_key_variable = model, base_url.rstrip("/"), api_key_variable
        self.instruction = instruction or (SCORE_INSTRUCTION if kind == "scores" else PAIR_INSTRUCTION)
        if "{prompt}" not in self.instruction:
            raise ValueError("the instruction of a vision judge must have {prompt} in it, where the prompt is put")
        self.prices, self.cache_dir = (input_price, output_price), Path(cache_dir)
        self.retries, self.retry_seconds, self.timeout = retries, retry_seconds, timeout
        self.concurrency = concurrency
        self.requests = 0
        self._spent, self._lock = 0.0, Lock()

    @property
    def spent(self) -> float:
        """What the requests of this object have cost; answers from the cache cost nothing."""
        return self._spent

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "model": self.model, "instruction": self.instruction}

    def ask(self, batch: JudgeBatch) -> list[Answer]:
        columns = image_columns(batch, self.kind)
        rows = [(prompt, per_row(columns, row)) for row, prompt in enumerate(batch.prompts)]
        with ThreadPoolExecutor(self.concurrency) as pool:
            values = list(pool.map(lambda row: self._answer(*row), rows))
        return checked_answers(self, values, batch.prompts)

    def _answer(self, prompt: str, images: Sequence[bytes]) -> Any:
        path = self.cache_dir / f"{self._key(prompt, images)}.json"
        if path.is_file():
            return read_json(path)["answer"]
        said = self._request(prompt, images)
        try:
            text = str(said["choices"][0]["message"]["content"])
        except (KeyError, IndexError, TypeError):
            raise JudgeError(f"the judge {self.name} answered without choices[0].message.content") from None
        usage = said.get("usage") or {}
        tokens = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
        cost = sum(price * count / _PER for price, count in zip(self.prices, tokens, strict=True))
        with self._lock:
            self._spent += cost
        record = {"answer": self._read(text), "said": text, "prompt": prompt, "tokens": tokens, "cost": cost}
        self.cache_dir.mkdir(parents=True, exist_ok=True)
        with self._lock, atomic_file(path) as staging:
            staging.write_text(json.dumps({"model": self.model, **record}) + "\n", encoding="utf-8")
        return record["answer"]

    def _read(self, text: str) -> Any:
        """The score or verdict in a text, which may stand in other words; a `JudgeError` if there is none."""
        name = "score" if self.kind == "scores" else "better"
        found = re.search(rf'"{name}"\s*:\s*("?)([^",}}\s]+)\1', text)
        value = found[2].lower() if found else text.strip().lower()
        if self.kind == "pairs" and value in ("a", "b", "tie"):
            return value
        try:
            if self.kind == "scores":
                return float(value)
        except ValueError:
            pass
        raise JudgeError(f"the judge {self.name} gave no {name!r} in its answer {text[:120]!r}")

    def _request(self, prompt: str, images: Sequence[bytes]) -> dict[str, Any]:
        parts: list[dict[str, Any]] = [{"type": "text", "text": self.instruction.replace("{prompt}", prompt)}]
        parts += [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded(image)}"}} for image in images
        ]
        content = {"model": self.model, "messages": [{"role": "user", "content": parts}], "temperature": 0}
        for attempt in range(self.retries + 1):
            with self._lock:
                self.requests += 1
            try:
                return post_json(
                    f"{self.base_url}/chat/completions", content, self.name, self.timeout, self._authorization()
                )
            except JudgeError:
                if attempt == self.retries:
                    raise
                time.sleep(self.retry_seconds * 2**attempt)
        raise AssertionError

    def _authorization(self) -> dict[str, str]:
        if self.api_key_variable is None:
            return {}
        key = os.environ.get(self.api_key_variable)
        if not key:
            raise ValueError(
                f"the environment variable {self.api_key_variable} holds no key for {self.base_url}; set it, or pass "
                "api_key_variable=None to an endpoint that needs none"
            )
        return {"Authorization": f"Bearer {key}"}

    def _key(self, prompt: str, images: Sequence[bytes]) -> str:
        digest = hashlib.sha256(json.dumps([self.model, self.kind, self.instruction, prompt]).encode())
        for image in images:
            digest.update(hashlib.sha256(image).digest())
        return digest.hexdigest()
