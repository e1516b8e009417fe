"""`dina-reward serve`: options of the documented server, and what they become."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dina_reward import serving
from dina_reward.cli.app import app
from dina_reward.serving import ServingConfig
from dina_reward.shapes import weights_dir


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    calls: list[Any] = []
    monkeypatch.setattr(serving, "serve", lambda load, config, **options: calls.append((load, config, options)))
    monkeypatch.delenv("DINA_REWARD_TOKEN", raising=False)
    return calls


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["serve", *arguments])


def test_the_documented_options(served: list[Any], tmp_path: Path) -> None:
    (tmp_path / "token").write_text("s3cret")
    options = "--base-model-path shapes-ddpm --dtype bfloat16 --max-batch-size 4 --max-wait-ms 5 --host ::1 --port 81"
    limits = (
        "--max-queue-rows 9 --max-queue-mib 3 --max-body-mib 2 --request-timeout 7 --body-timeout 6 --drain-seconds 1"
    )
    rest = ["--shutdown-timeout=2", "--access-log=all", f"--token-file={tmp_path / 'token'}", "--no-text-encoders"]
    result = run("--model-path", "shapes", *options.split(), *limits.split(), *rest)
    assert result.exit_code == 0, result.output
    ((load, config, where),) = served
    assert where == {"host": "::1", "port": 81}
    assert load.args == (str(weights_dir("flow-reward")), str(weights_dir("ddpm")))
    assert load.keywords == {"dtype": "bfloat16", "device": None, "text_encoders": False}
    assert config == ServingConfig(
        max_batch_size=4,
        max_wait_ms=5.0,
        max_queue_rows=9,
        max_queue_bytes=3 << 20,
        max_body_bytes=2 << 20,
        request_timeout=7.0,
        body_timeout=6.0,
        drain_seconds=1.0,
        shutdown_timeout=2.0,
        token="s3cret",
        access_log="all",
    )


def test_defaults_are_those_of_the_configuration(served: list[Any]) -> None:
    assert run("--model-path", "some/id").exit_code == 0
    ((load, config, where),) = served
    assert config == ServingConfig()
    assert where == {"host": "127.0.0.1", "port": 8000}
    assert load.args == ("some/id", None)


def test_wrong_options() -> None:
    assert run().exit_code == 2
    assert run("--model-path", "shapes", "--max-batch-size", "0").exit_code == 2
    assert run("--model-path", "shapes", "--access-log", "some").exit_code == 2
