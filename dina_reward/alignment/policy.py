"""The generator as a policy: its denoiser with a LoRA adapter, and the reference that is the same model without it."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dina_reward.alignment.rollout import VelocityFunction
from dina_reward.families.base import Conditioning, ModelFamily, family_of
from dina_reward.noise import FlowMatchingNoise


ADAPTER_NAME = "policy"
LORA_WEIGHTS_NAME = "pytorch_lora_weights.safetensors"


class Policy:
    """A diffusers pipeline whose denoiser carries one trainable LoRA adapter in float32 over frozen weights.

    Args:
        pipeline: a text-to-image pipeline of a supported flow-matching family.
        rank, alpha (`int`): of the LoRA.
        target_modules: suffixes of the layers to adapt; those of the family by default.
        guidance_scale (`float`): classifier-free guidance runs above 1, in sampling and in training alike.
        max_sequence_length (`int`, *optional*): length that prompts are encoded to.

    Raises:
        ValueError: the family does not use flow matching, or the denoiser has an adapter already.
    """

    def __init__(
        self,
        pipeline: Any,
        *,
        rank: int,
        alpha: int,
        target_modules: Sequence[str] | None = None,
        guidance_scale: float = 1.0,
        max_sequence_length: int | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.family: ModelFamily = family_of(pipeline)
        if not isinstance(self.family.noise_process(pipeline.scheduler.config), FlowMatchingNoise):
            raise ValueError(f"{type(pipeline).__name__} is not a flow-matching pipeline; these samplers need one")
        self.denoiser: nn.Module = getattr(pipeline, self.family.denoiser_attribute)
        self.guidance_scale = guidance_scale
        self.max_sequence_length = max_sequence_length
        _add_lora(self.denoiser, rank, alpha, target_modules or self.family.policy_lora_targets)

    @property
    def storage_dtype(self) -> torch.dtype:
        """Dtype in which latents are kept between steps: that of the denoiser, as in the pipeline itself."""
        dtype: torch.dtype = self.denoiser.dtype  # type: ignore[assignment]
        return dtype

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Shape of one latent without its batch dimension."""
        return self.family.latent_shape(self.pipeline, height, width, self.denoiser.config)  # type: ignore[arg-type]

    def encode(self, prompts: Sequence[str], device: torch.device) -> Conditioning:
        """Encodes prompts in one call, cast to the denoiser's dtype."""
        conditioning = self.family.encode_prompts(
            self.pipeline, prompts, max_sequence_length=self.max_sequence_length, device=device
        )
        return conditioning.to(device, self.storage_dtype)

    def encode_negative(self, device: torch.device) -> Conditioning | None:
        """The empty prompt, one row, when guidance is on."""
        return self.encode([""], device) if self.guidance_scale > 1 else None

    def bind(
        self, conditioning: Conditioning, negative: Conditioning | None, model: nn.Module | None = None
    ) -> VelocityFunction:
        """Velocity function of a batch of prompts.

        Args:
            conditioning: one row per latent.
            negative: the single row of `encode_negative`.
            model: the denoiser as wrapped for training (DDP); the bare one by default.
        """
        expanded = None if negative is None else negative[[0] * len(conditioning)]

        def velocity(latents: Tensor, timestep: Tensor) -> Tensor:
            return self.family.predict_velocity(
                self.denoiser if model is None else model,
                latents,
                timestep,
                conditioning,
                negative_conditioning=expanded,
                guidance_scale=self.guidance_scale,
            )

        return velocity

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """Switches the adapter off; on leaving it is on again with the same parameters trainable."""
        self.denoiser.disable_adapters()  # type: ignore[operator]
        try:
            yield
        finally:
            self.denoiser.enable_adapters()  # type: ignore[operator]

    def save_lora(self, directory: str) -> None:
        """Writes the adapter in the format that ``pipeline.load_lora_weights(directory)`` reads; never a partial file."""
        os.makedirs(directory, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory, prefix=".lora-") as staging:
            self.family.save_policy_lora(self.denoiser, staging, ADAPTER_NAME)
            for name in os.listdir(staging):
                os.replace(os.path.join(staging, name), os.path.join(directory, name))

    def load_lora(self, directory: str) -> None:
        """Restores the adapter from a directory that `save_lora` wrote.

        Raises:
            ValueError: the file is missing, or does not hold exactly the adapter's tensors.
        """
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        path = os.path.join(directory, LORA_WEIGHTS_NAME)
        if not os.path.isfile(path):
            raise ValueError(f"{directory} holds no {LORA_WEIGHTS_NAME}; it is not a checkpoint of this trainer")
        prefix = f"{self.family.denoiser_attribute}."
        stored = {name.removeprefix(prefix): tensor for name, tensor in load_file(path).items()}
        expected = get_peft_model_state_dict(self.denoiser, adapter_name=ADAPTER_NAME)
        faults = sorted(stored.keys() ^ expected.keys()) or sorted(
            name for name, tensor in stored.items() if tensor.shape != expected[name].shape
        )
        if faults:
            raise ValueError(
                f"{path} does not fit this run's LoRA: {len(faults)} tensors are missing, unexpected or of another "
                f"shape, the first is {faults[0]!r}. Resume with the lora_rank and lora_target_modules of that run"
            )
        set_peft_model_state_dict(self.denoiser, stored, adapter_name=ADAPTER_NAME)


def _add_lora(denoiser: nn.Module, rank: int, alpha: int, target_modules: Sequence[str]) -> None:
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    existing = sorted(getattr(denoiser, "peft_config", {}))
    if existing:
        raise ValueError(
            f"the denoiser already has the adapter(s) {', '.join(existing)}; the reference of the KL penalty is the model "
            "without any. Fuse them (`pipeline.fuse_lora()`, `pipeline.unload_lora_weights()`) before training"
        )
    denoiser.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(target_modules), init_lora_weights="gaussian")
    denoiser.add_adapter(config, adapter_name=ADAPTER_NAME)  # type: ignore[operator]
    cast_training_params(denoiser, dtype=torch.float32)
    # Sampling and training must be the same function of the weights, so dropout stays off in both.
    denoiser.eval()
