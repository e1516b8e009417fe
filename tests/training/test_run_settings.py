from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dina_reward.training import LatentRewardTrainingConfig
from dina_reward.training.config import check_mixed_precision
from dina_reward.training.run_settings import (
    RUN_SETTINGS_NAME,
    check_digests,
    check_same_run,
    dataset_digest,
    settings_of,
    tensor_digest,
    text_digest,
    write_digests,
    write_settings,
)
from tests.training.tiny_reward import separable_pairs


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


def test_another_configuration_class_is_another_run(tmp_path: Path) -> None:
    write_settings(tmp_path, {**settings(tmp_path), "configuration": "DiffusionGRPOConfig"})
    message = 'configuration: "DiffusionGRPOConfig" there, "LatentRewardTrainingConfig" here'
    with pytest.raises(ValueError, match=message):
        check_same_run(tmp_path, settings(tmp_path))


def test_missing_and_damaged_files_of_a_checkpoint_are_named(tmp_path: Path) -> None:
    check_digests(tmp_path)  # of a version that wrote none
    for name in ("optimizer.pt", "scheduler.pt", "ema/weights"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    write_digests(tmp_path)
    check_digests(tmp_path)
    (tmp_path / "ema" / "weights").write_bytes(b"ema/weightz")
    (tmp_path / "scheduler.pt").unlink()
    with pytest.raises(ValueError, match=r"damaged: ema/weights was changed or cut off, scheduler\.pt is missing"):
        check_digests(tmp_path)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "ema/../../secret"])
def test_digests_name_files_of_the_checkpoint_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_text("x")
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "checkpoint_files.json").write_text(json.dumps({name: "0"}))
    with pytest.raises(ValueError, match="lies outside it"):
        check_digests(tmp_path / "checkpoint")


def test_datasets_are_known_by_their_content() -> None:
    pairs, same = separable_pairs(), separable_pairs()
    assert dataset_digest(pairs) == dataset_digest(same)
    same.chosen[63, 0, 0, 0] += 1e-3
    assert dataset_digest(pairs) != dataset_digest(same)
    rows = [pairs[index] for index in range(len(pairs))]
    others = [{**row, "p_chosen": 0.5} if number == 40 else row for number, row in enumerate(rows)]
    assert len({dataset_digest(records) for records in (rows, others, rows[:40])}) == 3
    assert dataset_digest(iter(rows)) is None


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
