"""`dina-reward bench`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dina_reward.cli.app import app


def test_a_table_and_files_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dina_reward.bench.machine.MATRIX_SIDE", {"cpu": 64})
    monkeypatch.setattr("dina_reward.bench.machine.COPY_BYTES", {"cpu": 2**16})
    options = [
        "--quick",
        "--seconds",
        "0",
        "--parts",
        "score, denoiser",
        "--batch-sizes",
        "1",
        "--output",
        str(tmp_path),
    ]
    result = CliRunner().invoke(app, ["bench", "shapes", *options])
    assert result.exit_code == 0, result.output
    assert "three levels / one, shared: " in result.output
    assert "Flow-GRPO, 10 steps and 4 losses per sample: rollout " in result.output
    (data,) = tmp_path.glob("bench-shapes-*.json")
    values = json.loads(data.read_text())
    assert (values["height"], values["weights"], len(values["rows"])) == (32, "loaded", 6)
    assert data.with_suffix(".png").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["shapes", "--weights", "none"], "--weights is 'none'; expected random or loaded"),
        (["shapes", "--weights", "random"], "random weights are made for published models alone: .*SD3.5-Medium"),
        (["shapes", "--batch-sizes", "1,x"], "--batch-sizes is '1,x'; expected whole numbers"),
        (["shapes", "--parts", "scores"], "expected some of score"),
    ],
)
def test_wrong_options_are_refused(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert isinstance(result.exception, ValueError)
    with pytest.raises(ValueError, match=message):
        raise result.exception
