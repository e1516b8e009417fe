"""`dina-reward plan`."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from dina_reward.cli.app import app


def test_a_configuration_is_planned_for_several_numbers_of_gpus() -> None:
    result = CliRunner().invoke(app, ["plan", "flow_grpo_shapes", "--gpus", "1,2", "--json", "--beta", "0.1"])
    assert result.exit_code == 0, result.output
    one, two = json.loads(result.stdout)
    assert (one["samples"], two["samples"], one["calls"]["rollout"]) == (192, 192, 13)
    assert (one["setup"]["gpus"], two["setup"]["gpus"], two["micro_batches"]) == (1, 2, 1)
    assert one["fits"]
    # One micro-batch for each of two makes one optimizer step an iteration, so the run has twice as many.
    assert (two["iterations"], one["iterations"]) == (60, 30)
    assert one["seconds"]["rollout"] == pytest.approx(2 * two["seconds"]["rollout"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["flow_grpo_shapes", "--gpu", "A1000"], "--gpu is 'A1000'; expected one of RTX-4090"),
        (["flow_grpo_shapes", "--gpus", "x"], "--gpus is 'x'; expected a whole number"),
        (["flow_grpo_shapes", "--bench", "b.json", "--flops-rate", "3"], "--bench and --flops-rate exclude"),
        (["train_reward_shapes"], "plans are made of alignment runs"),
        (["flow_grpo_shape"], "did you mean flow_grpo_shapes"),
    ],
)
def test_wrong_options_are_refused(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["plan", *arguments])
    assert isinstance(result.exception, ValueError)
    with pytest.raises(ValueError, match=message):
        raise result.exception
