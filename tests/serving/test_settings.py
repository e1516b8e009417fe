"""Limits and the token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dina_reward.serving import ServingConfig
from dina_reward.serving.settings import read_token


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_batch_size", 0),
        ("max_batch_size", 2.5),
        ("max_wait_ms", -1),
        ("max_wait_ms", float("nan")),
        ("max_queue_rows", 0),
        ("max_body_bytes", 0),
        ("request_timeout", 0),
        ("drain_seconds", -1),
        ("access_log", "some"),
        ("token", ""),
        ("token", "geheim\n"),
        ("token", "gehéim"),
    ],
)
def test_wrong_limits_name_themselves(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        ServingConfig(**{name: value})


def test_the_token_is_not_shown() -> None:
    assert "s3cret" not in repr(ServingConfig(token="s3cret"))


def test_where_the_token_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "token"
    file.write_text(" s3cret\n")
    monkeypatch.delenv("DINA_REWARD_TOKEN", raising=False)
    assert read_token() is None
    assert read_token(file) == "s3cret"
    monkeypatch.setenv("DINA_REWARD_TOKEN", "other")
    assert read_token() == "other"
    assert read_token(file) == "s3cret"
    monkeypatch.setenv("DINA_REWARD_TOKEN", " ")
    with pytest.raises(ValueError, match="DINA_REWARD_TOKEN is empty"):
        read_token()
    file.write_text("\n")
    with pytest.raises(ValueError, match="is empty"):
        read_token(file)
    with pytest.raises(ValueError, match="cannot be read"):
        read_token(tmp_path / "absent")
