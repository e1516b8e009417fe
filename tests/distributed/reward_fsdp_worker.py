"""Trains a tiny reward whose backbone FSDP2 shards over two gloo processes; a job of together.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from dina_reward.training import LatentRewardTrainer
from dina_reward.training.sharding import local, reshard, whole
from tests.training.tiny_reward import tiny_trainer


ARGUMENTS: dict[str, Any] = {
    "per_device_eval_batch_size": 5,
    "max_steps": 3,
    "optim": "sgd",  # Adam turns rounding errors of small gradients into full steps
    "learning_rate": 0.1,
    "save_strategy": "steps",
    "save_steps": 2,
    "ema_decay": 0.9,
}


class ShardingTrainer(LatentRewardTrainer):
    """Turns FSDP2 on as accelerate would on GPUs; on CPUs it never does."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["JointTransformerBlock"],
            reshard_after_forward=True,
            cpu_ram_efficient_loading=False,
            state_dict_type="SHARDED_STATE_DICT",
        )
        if self.args.bf16:
            state.fsdp_plugin.set_mixed_precision("bf16")
        state.distributed_type = DistributedType.FSDP
        self.is_fsdp_enabled = True


def whole_parameters(trainer: LatentRewardTrainer) -> dict[str, Tensor]:
    reshard(trainer.model)
    return {f"parameter/{name}": whole(p).clone() for name, p in trainer.reward.model.trainable_state().items()}


def sharded_share(trainer: LatentRewardTrainer) -> Tensor:
    """Share of the model's numbers that this rank holds."""
    reshard(trainer.model)
    parameters = list(trainer.reward.model.parameters())
    assert all(isinstance(parameter, DTensor) for parameter in parameters)
    return torch.tensor(sum(local(p).numel() for p in parameters) / sum(p.numel() for p in parameters))


def metrics_of(trainer: LatentRewardTrainer, steps: int = 3) -> Tensor:
    """Of the last training step and of an evaluation."""
    evaluation = trainer.evaluate()
    metrics = [trainer.state.log_history[steps - 1][name] for name in ("loss", "accuracy", "margin")]
    return torch.tensor([*metrics, *(evaluation[name] for name in ("eval_loss", "eval_accuracy", "eval_margin"))])


def trainer(directory: Path, **overrides: Any) -> LatentRewardTrainer:
    arguments = {**ARGUMENTS, "per_device_train_batch_size": 4, "ddp_backend": "gloo", **overrides}
    return tiny_trainer(directory, None, ShardingTrainer, **arguments)


def mixed_precision(directory: Path) -> dict[str, Tensor]:
    """Timesteps that the backbone is told in bfloat16, scores, and the parameters before and after training."""
    run = trainer(directory, bf16=True, save_strategy="no", max_steps=2)
    backbone = run.reward.model.backbone.get_base_model()
    before = {name: p.detach().clone() for name, p in run.reward.model.trainable_state().items()}
    seen: list[Tensor] = []
    backbone.time_text_embed.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().cpu()))
    run.train()
    after = whole_parameters(run)
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    moved = torch.stack([(after[f"parameter/{name}"] - tensor).abs().max() for name, tensor in before.items()])
    batch = run.data_collator([run.train_dataset[row] for row in range(4)])
    _, scores = run.compute_loss(run.model_wrapped, batch, return_outputs=True)
    return {
        "mixed/timesteps": torch.cat(seen).float(),
        "mixed/scores": scores["chosen"].detach().clone(),
        "mixed/moved": moved.max(),
        "mixed/metrics": metrics_of(run, 2),
    }


def work(directory: Path) -> None:
    whole_run = trainer(directory)
    whole_run.train()
    tensors = whole_parameters(whole_run)
    tensors |= {"share": sharded_share(whole_run), "metrics": metrics_of(whole_run)}
    whole_run.save_model(str(directory / "final"))
    assert all(torch.equal(a, tensors[name]) for name, a in whole_parameters(whole_run).items())

    resumed = trainer(directory)
    resumed.train(resume_from_checkpoint=str(directory / "checkpoint-2"))
    tensors |= {f"resumed/{name}": tensor for name, tensor in whole_parameters(resumed).items()}
    tensors |= mixed_precision(directory)
    save_file(tensors, directory / f"rank{whole_run.args.process_index}.safetensors")
