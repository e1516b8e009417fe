"""Sampling of several micro-batches at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dina_reward.alignment import RewardBackpropConfig
from dina_reward.search import SearchDistillationConfig
from tests.alignment.helpers import algorithm_trainer, tiny_config, tiny_trainer


GROUPS: dict[str, Any] = {"per_device_train_batch_size": 4, "steps_per_generation": 3, "max_steps": 3}


@pytest.mark.parametrize(("rows", "expected"), [(None, [4, 4, 4]), (8, [8, 4]), (400, [12])])
def test_micro_batches_are_sampled_together_and_come_out_as_alone(
    tmp_path: Path, rows: int | None, expected: list[int]
) -> None:
    settings: dict[str, Any] = {**GROUPS, "beta": 0.1, "loss_type": "grpo_guard", "sde_type": "flow_sde"}
    alone, _ = tiny_trainer(tmp_path / "alone", **settings).make_experience(0)
    trainer = tiny_trainer(tmp_path, rollout_batch_size=rows, **settings)
    passes: list[int] = []
    trainer.policy.denoiser.register_forward_hook(lambda _m, _a, output: passes.append(len(output[0])))
    parts, _ = trainer.make_experience(0)
    # Five steps, and the reference at the two that are recorded.
    assert passes == [count for count in expected for _ in range(7)]
    assert trainer.policy.calls.rollout == 12 * 7
    assert [part.rows for part in parts] == [range(0, 4), range(4, 8), range(8, 12)]
    for part, single in zip(parts, alone, strict=True):
        assert (part.prompts, part.prompt_index) == (single.prompts, single.prompt_index)
        assert part.rollout.states.keys() == single.rollout.states.keys()
        torch.testing.assert_close(part.rollout.latents, single.rollout.latents, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(part.rewards, single.rewards, atol=1e-5, rtol=1e-4)
        for name in ("states", "log_probs", "means"):
            for step, values in getattr(part.rollout, name).items():
                torch.testing.assert_close(values, getattr(single.rollout, name)[step], atol=1e-4, rtol=1e-4)
        for step, values in part.reference.items():
            torch.testing.assert_close(values, single.reference[step], atol=1e-4, rtol=1e-4)


def test_a_run_goes_through(tmp_path: Path) -> None:
    trainer = algorithm_trainer("nft", tmp_path, rollout_batch_size=12, keep_per_group=2, **GROUPS)
    trainer.train()
    assert trainer.state.global_step == 3


def test_wrong_sizes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rollout_batch_size 9 is not a multiple of per_device_train_batch_size=6"):
        tiny_config(tmp_path, rollout_batch_size=9)
    for config in (RewardBackpropConfig, SearchDistillationConfig):
        with pytest.raises(ValueError, match=f"rollout_batch_size does nothing under {config.__name__}"):
            config(str(tmp_path), rollout_batch_size=16, use_cpu=True)
