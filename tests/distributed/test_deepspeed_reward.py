"""A reward trained under DeepSpeed ZeRO-2 in two gloo processes against the same reward in one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dina_reward.training.sharding import compute_by_autocast
from tests.distributed.launch import launch_two_processes
from tests.distributed.reward_fsdp_worker import ARGUMENTS, metrics_of
from tests.training.tiny_reward import tiny_trainer, trained_parameters


pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed; it is not a dependency")
    directory = tmp_path_factory.mktemp("two")
    # DeepSpeed compiles an operator when it is first used.
    launch_two_processes(Path(__file__).with_name("reward_deepspeed_worker.py"), directory, timeout=800)
    return [load_file(directory / f"rank{rank}.safetensors") for rank in range(2)]


@pytest.mark.distributed
def test_training_and_averaged_evaluation_equal_those_of_one_process(
    two_ranks: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    alone = tiny_trainer(tmp_path, per_device_train_batch_size=8, **ARGUMENTS)
    alone.train()
    for rank in two_ranks:
        for name, parameter in trained_parameters(alone).items():
            torch.testing.assert_close(rank[f"parameter/{name}"], parameter, rtol=1e-4, atol=1e-6)
    for rank in two_ranks:
        torch.testing.assert_close(rank["metrics"], metrics_of(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.distributed
def test_resume_equals_the_uninterrupted_run(two_ranks: list[dict[str, Tensor]]) -> None:
    for rank in two_ranks:
        for name in [name for name in rank if name.startswith("parameter/")]:
            torch.testing.assert_close(rank[f"resumed/{name}"], rank[name], rtol=0, atol=1e-7)


@pytest.mark.distributed
def test_bf16_rounds_neither_parameters_nor_timesteps_nor_scores(two_ranks: list[dict[str, Tensor]]) -> None:
    for rank in two_ranks:
        for name in [name for name in rank if name.startswith("mixed/")]:
            assert rank[name].dtype == torch.float32
        for name in ("timesteps", "scores", "parameter/head.query_tokens"):
            values = rank[f"mixed/{name}"]
            assert not torch.equal(values, values.bfloat16().float()), name
        assert rank["mixed/metrics"].isfinite().all()


def test_bfloat16_is_left_to_autocast() -> None:
    config = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}
    compute_by_autocast(config)
    assert config["bf16"] == {"enabled": False}
    assert config["torch_autocast"] == {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    assert config["zero_optimization"] == {"stage": 2}
