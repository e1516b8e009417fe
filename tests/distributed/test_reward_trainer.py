"""Two gloo processes train the same reward as one process with twice the batch; `work` is a job of together.py."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dina_reward.training.pair_noise import NoisedPairs, PairNoiser
from tests.training.tiny_reward import tiny_trainer, trained_parameters


JOB = "reward"
STEPS = 3


@pytest.fixture(scope="module")
def runs(two_processes: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    alone = tmp_path_factory.mktemp("one")
    work(alone, batch_size=8)
    return {"one": alone, "two": two_processes(JOB)}


@pytest.mark.distributed
def test_two_processes_equal_one_with_the_double_batch(runs: dict[str, Path]) -> None:
    whole, parts = (load_file(runs[name] / "rank0.safetensors") for name in ("one", "two"))
    for name in whole:
        if name.startswith("parameter/"):
            torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=1e-6)


@pytest.mark.distributed
def test_ranks_hold_the_same_parameters_but_draw_different_noise(runs: dict[str, Path]) -> None:
    first, second = (load_file(runs["two"] / f"rank{rank}.safetensors") for rank in (0, 1))
    assert torch.equal(first["parameter/head.head.weight"], second["parameter/head.head.weight"])
    assert not torch.equal(first["noise"], second["noise"])
    both = torch.cat([first["noise"], second["noise"]], dim=1)
    torch.testing.assert_close(both, load_file(runs["one"] / "rank0.safetensors")["noise"], rtol=0, atol=0)


@pytest.mark.distributed
def test_evaluation_and_metrics_do_not_depend_on_the_number_of_processes(runs: dict[str, Path]) -> None:
    whole, parts = (load_file(runs[name] / "rank0.safetensors")["metrics"] for name in ("one", "two"))
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.distributed
def test_every_rank_writes_into_whole_checkpoints(runs: dict[str, Path]) -> None:
    names = sorted(path.name for path in runs["two"].iterdir() if "checkpoint" in path.name)
    assert names == ["checkpoint-2", "checkpoint-3"]
    files = {path.name for path in (runs["two"] / "checkpoint-3").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt", "head.safetensors", "ema.safetensors"} <= files


class RecordingNoiser:
    """Keeps the noise that the trainer's own noiser draws."""

    def __init__(self, noiser: PairNoiser) -> None:
        self.noiser = noiser
        self.drawn: list[Tensor] = []

    def __call__(self, *args: Any, **kwargs: Any) -> NoisedPairs:
        pairs = self.noiser(*args, **kwargs)
        self.drawn.append(pairs.noise)
        return pairs


def work(output_dir: Path, batch_size: int = 4) -> None:
    trainer = tiny_trainer(
        output_dir,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=5,
        max_steps=STEPS,
        optim="sgd",  # Adam turns rounding errors of small gradients into full steps
        learning_rate=0.1,
        save_strategy="steps",
        save_steps=2,
        ema_decay=0.9,
        ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None,
    )
    assert trainer.args.world_size == int(os.environ.get("WORLD_SIZE", "1"))
    trainer.noiser = noiser = RecordingNoiser(trainer.noiser)  # type: ignore[assignment]
    trainer.train()
    evaluation = trainer.evaluate()
    metrics = [trainer.state.log_history[STEPS - 1][name] for name in ("loss", "accuracy", "margin")]
    metrics += [evaluation[name] for name in ("eval_loss", "eval_accuracy", "eval_margin")]
    tensors = {f"parameter/{name}": tensor for name, tensor in trained_parameters(trainer).items()}
    tensors |= {"noise": torch.stack(noiser.drawn), "metrics": torch.tensor(metrics)}
    save_file(tensors, output_dir / f"rank{trainer.args.process_index}.safetensors")
