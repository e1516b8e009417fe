from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dina_reward.training import LatentRewardTrainingConfig
from dina_reward.training.config import check_mixed_precision
from dina_reward.training.run_settings import (
    RUN_SETTINGS_NAME,
    check_same_run,
    settings_of,
    tensor_digest,
    text_digest,
    write_settings,
)


def settings(tmp_path: Path, facts: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    arguments = {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True, "per_device_train_batch_size": 4}
    return settings_of(LatentRewardTrainingConfig(**{**arguments, **changes}), **(facts or {"prompts": "x"}))


@pytest.mark.parametrize(
    "changes",
    [
        {"max_steps": 7, "logging_steps": 3, "save_steps": 2, "run_name": "other"},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"dataloader_num_workers": 1, "per_device_eval_batch_size": 3, "eval_steps": 5},
    ],
)
def test_what_does_not_define_a_run_may_change(tmp_path: Path, changes: dict[str, Any]) -> None:
    write_settings(tmp_path, settings(tmp_path))
    check_same_run(tmp_path, settings(tmp_path, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 1.0}, "learning_rate: 5e-05 there, 1.0 here"),
        ({"seed": 3}, "seed: 42 there, 3 here"),
        (
            {"loss_type": "thurstone_nll", "weight_decay": 0.5},
            r"2 of its settings differ .weight_decay: .*loss_type: ",
        ),
        ({"per_device_train_batch_size": 2}, "samples per optimizer step: 4 there, 2 here"),
        ({"facts": {"prompts": "y"}}, 'prompts: "x" there, "y" here'),
    ],
)
def test_what_defines_a_run_is_compared_and_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_settings(tmp_path, settings(tmp_path))
    with pytest.raises(ValueError, match=f"checkpoint of another run; .*{message}"):
        check_same_run(tmp_path, settings(tmp_path, **changes))


def test_checkpoints_of_other_versions_and_damaged_ones(tmp_path: Path) -> None:
    check_same_run(tmp_path, settings(tmp_path))
    write_settings(tmp_path, {"learning_rate": 5e-5})
    check_same_run(tmp_path, settings(tmp_path))
    (tmp_path / RUN_SETTINGS_NAME).write_text("{")
    with pytest.raises(ValueError, match=f"{RUN_SETTINGS_NAME} is damaged"):
        check_same_run(tmp_path, settings(tmp_path))


def test_digests_see_any_change() -> None:
    model = nn.Linear(64, 64)
    before = tensor_digest(model.parameters())
    assert tensor_digest(model.parameters()) == before
    model.weight.data += 1e-4
    assert tensor_digest(model.parameters()) != before
    assert text_digest([{"prompt": "a"}]) != text_digest([{"prompt": "b"}])
    assert len(text_digest({"image": object(), "half": "\ud83d"})) == 16


@pytest.mark.parametrize(("weights", "flag"), [(torch.float16, "bf16"), (torch.bfloat16, "fp16")])
def test_autocast_to_the_other_16_bits_is_refused(weights: torch.dtype, flag: str) -> None:
    args = LatentRewardTrainingConfig("unused", use_cpu=True, report_to="none")
    check_mixed_precision(weights, args)
    setattr(args, flag, True)
    check_mixed_precision(torch.float32, args)
    with pytest.raises(ValueError, match=rf"{flag}=True computes in .*, but the frozen weights are {weights}"):
        check_mixed_precision(weights, args)
