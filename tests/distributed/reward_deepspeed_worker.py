"""Trains a tiny reward under DeepSpeed ZeRO-2 in two gloo processes.

python reward_deepspeed_worker.py OUTPUT_DIR
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import save_file
from torch import Tensor

from dina_reward.training import LatentRewardTrainer
from tests.distributed.reward_fsdp_worker import ARGUMENTS, metrics_of
from tests.tiny_models import tiny_sd3_pipeline
from tests.training.tiny_reward import tiny_trainer, trained_parameters


ZERO_2: dict[str, Any] = {
    "zero_optimization": {"stage": 2},
    "zero_allow_untested_optimizer": True,  # SGD
    "bf16": {"enabled": "auto"},
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "train_batch_size": "auto",
}


def start() -> None:
    """Connects the processes as accelerate would on GPUs; on CPUs it never turns DeepSpeed on."""
    import transformers.training_args

    os.environ.pop("ACCELERATE_USE_CPU", None)
    os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}
    PartialState(backend="gloo")
    PartialState._reset_state = staticmethod(lambda: None)
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True


def trainer(directory: Path, pipeline: Any = None, **overrides: Any) -> LatentRewardTrainer:
    arguments = {**ARGUMENTS, "per_device_train_batch_size": 4, "ddp_backend": "gloo", "use_cpu": False, **overrides}
    run = tiny_trainer(directory, pipeline, deepspeed=ZERO_2, **arguments)
    assert run.is_deepspeed_enabled
    assert run.args.world_size == 2
    return run


def parameters_of(run: LatentRewardTrainer, prefix: str = "") -> dict[str, Tensor]:
    return {f"{prefix}parameter/{name}": p.detach().clone() for name, p in trained_parameters(run).items()}


def mixed_precision(directory: Path) -> dict[str, Tensor]:
    """What a bfloat16 backbone is told and computes under bf16, scores, parameters and metrics."""
    pipeline = tiny_sd3_pipeline().to(torch.bfloat16)
    run = trainer(directory, pipeline, bf16=True, save_strategy="no", max_steps=2)
    assert torch.bfloat16 in {parameter.dtype for parameter in run.reward.model.parameters()}
    backbone = run.reward.model.backbone.get_base_model()
    timesteps: list[Tensor] = []
    computed: list[torch.dtype] = []
    backbone.time_text_embed.register_forward_pre_hook(lambda module, args: timesteps.append(args[0].detach()))
    backbone.context_embedder.register_forward_hook(lambda module, args, output: computed.append(output.dtype))
    run.train()
    assert set(computed) == {torch.bfloat16}
    batch = run.data_collator([run.train_dataset[row] for row in range(4)])
    _, scores = run.compute_loss(run.model_wrapped, batch, return_outputs=True)
    return {
        "mixed/timesteps": torch.cat(timesteps),
        "mixed/scores": scores["chosen"].detach().clone(),
        "mixed/metrics": metrics_of(run, 2),
        **parameters_of(run, "mixed/"),
    }


def work(directory: Path) -> None:
    start()
    run = trainer(directory)
    run.train()
    tensors = {**parameters_of(run), "metrics": metrics_of(run)}
    resumed = trainer(directory)
    resumed.train(resume_from_checkpoint=str(directory / "checkpoint-2"))
    tensors |= parameters_of(resumed, "resumed/") | mixed_precision(directory)
    save_file(tensors, directory / f"rank{run.args.process_index}.safetensors")


if __name__ == "__main__":
    work(Path(sys.argv[1]))
    torch.distributed.destroy_process_group()
