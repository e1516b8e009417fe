"""Where samples to judge come from: a pipeline as it is, or a policy in training; both by the package's own samplers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dina_reward.alignment.experience.images import checked_images, still_images
from dina_reward.alignment.policy import Policy
from dina_reward.alignment.sampling.rollout import PredictFunction, sample
from dina_reward.alignment.sampling.samplers import Sampler, build_sampler
from dina_reward.alignment.sampling.seeding import noise_by_row
from dina_reward.backbones.wrappers import check_not_offloaded, unwrap
from dina_reward.data.cache_manifest import pipeline_fingerprint
from dina_reward.families import family_of
from dina_reward.training.run_settings import tensor_digest


class SampleSource(ABC):
    """Draws latents for prompts, reproducibly, and decodes them.

    Args:
        pipeline: diffusers pipeline whose autoencoder decodes.
        height, width: size of the images in pixels.
        num_frames: frames of a video; judges of images see the one in the middle.
    """

    def __init__(self, pipeline: Any, height: int, width: int, num_frames: int = 1) -> None:
        self.pipeline, self.family = pipeline, family_of(pipeline)
        self.height, self.width = height, width
        denoiser = unwrap(getattr(pipeline, self.family.denoiser_attribute))
        self.latent_shape = self.family.latent_shape(pipeline, height, width, denoiser.config, num_frames)

    @abstractmethod
    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Samples, spatial layout, shape ``(len(prompts), *latent_shape)``, float32, on the CPU.

        Args:
            prompts, seeds: one per sample.
        """

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What the samples depend on besides prompts and seeds, as JSON has it."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Device that samples are made on."""

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images of samples, shape ``(batch, 3, height, width)``, float32, in [0, 1], on the CPU."""
        images = self.family.decode_latents(self.pipeline, latents.to(self.device))
        return still_images(checked_images(images, len(latents))).clamp(0, 1).cpu()


class PipelineSource(SampleSource):
    """Samples of a pipeline as it is, by deterministic steps on its own grid.

    Args:
        pipeline: a text-to-image pipeline of a supported family; it is not altered.
        height, width: size of the images in pixels.
        num_inference_steps: steps.
        guidance_scale: classifier-free guidance runs above 1.
        max_sequence_length: length that prompts are encoded to.
        batch_size: samples at once.
    """

    def __init__(
        self,
        pipeline: Any,
        height: int,
        width: int,
        *,
        num_inference_steps: int = 28,
        guidance_scale: float = 1.0,
        max_sequence_length: int | None = None,
        batch_size: int = 8,
    ) -> None:
        super().__init__(pipeline, height, width)
        self.family.check_pipeline(pipeline)
        self.denoiser = unwrap(getattr(pipeline, self.family.denoiser_attribute))
        check_not_offloaded(self.denoiser)
        self.steps, self.guidance_scale = num_inference_steps, guidance_scale
        self.max_sequence_length, self.batch_size = max_sequence_length, batch_size

        def set_timesteps(scheduler: Any, steps: int) -> None:
            self.family.set_timesteps(scheduler, steps, self.latent_shape)

        self.sampler: Sampler = build_sampler(
            pipeline.scheduler, num_inference_steps, device=self.device, set_timesteps=set_timesteps
        )

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    @torch.no_grad()
    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        parts = []
        for start in range(0, len(prompts), self.batch_size):
            rows = slice(start, start + self.batch_size)
            initial = noise_by_row(seeds[rows], self.latent_shape).to(self.device, self.denoiser.dtype)
            parts.append(sample(self._predict(prompts[rows]), initial, self.sampler).latents.float().cpu())
        return torch.cat(parts)

    def _predict(self, prompts: Sequence[str]) -> PredictFunction:
        options: dict[str, Any] = {"max_sequence_length": self.max_sequence_length, "device": self.device}
        unique = list(dict.fromkeys(prompts))
        encoded = self.family.encode_prompts(self.pipeline, unique, **options).to(self.device, self.denoiser.dtype)
        conditioning = encoded[[unique.index(prompt) for prompt in prompts]]
        negative = None
        if self.family.uses_negative_prompt(self.denoiser.config, self.guidance_scale):
            negative = self.family.encode_negative(self.pipeline, **options).to(self.device, self.denoiser.dtype)
            negative = negative[[0] * len(prompts)]

        def predict(latents: Tensor, timestep: Tensor) -> Tensor:
            return self.family.predict_velocity(
                self.denoiser,
                latents,
                timestep,
                conditioning,
                negative_conditioning=negative,
                guidance_scale=self.guidance_scale,
            )

        return predict

    def identity(self) -> dict[str, Any]:
        settings = {name: getattr(self, name) for name in ("height", "width", "steps", "guidance_scale")}
        return {
            **settings,
            "max_sequence_length": self.max_sequence_length,
            "pipeline": pipeline_fingerprint(self.pipeline, self.family, prompt_embeds=True),
            "denoiser": tensor_digest(self.denoiser.parameters()),
        }


class PolicySource(SampleSource):
    """Samples of a policy as it is now, by the deterministic steps of a run's own sampler; ranks share the work.

    Every rank has to call `draw` together and gets all samples; their noise depends on the seeds alone.

    Args:
        policy: the policy.
        sampler: of the run's rollouts.
        height, width, num_frames: of the samples.
        batch_size: samples at once, on one rank.
        accelerator: the `accelerate.Accelerator` of the run.
    """

    def __init__(
        self,
        policy: Policy,
        sampler: Sampler,
        height: int,
        width: int,
        *,
        num_frames: int = 1,
        batch_size: int,
        accelerator: Any,
    ) -> None:
        super().__init__(policy.pipeline, height, width, num_frames)
        self.policy, self.sampler, self.batch_size, self.accelerator = policy, sampler, batch_size, accelerator

    @property
    def device(self) -> torch.device:
        device: torch.device = self.accelerator.device
        return device

    @torch.no_grad()
    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        per_rank = -(-len(prompts) // ranks)
        # Ranks make the same number of calls, as sharded parameters need; rows beyond the end are drawn again and cut off.
        mine = [min(row, len(prompts) - 1) for row in range(rank * per_rank, (rank + 1) * per_rank)]
        parts = []
        for start in range(0, per_rank, self.batch_size):
            rows = mine[start : start + self.batch_size]
            # Calls of rows that are only there to fill up are no work of one process.
            extra = sum(rank * per_rank + start + place >= len(prompts) for place in range(len(rows)))
            parts.append(self._sample([prompts[row] for row in rows], [seeds[row] for row in rows], extra))
        gathered: Tensor = self.accelerator.gather(torch.cat(parts).float())
        return gathered[: len(prompts)].cpu()

    def _sample(self, prompts: Sequence[str], seeds: Sequence[int], extra: int) -> Tensor:
        unique = list(dict.fromkeys(prompts))
        conditioning = self.policy.encode(unique, self.device)[[unique.index(prompt) for prompt in prompts]]
        negative = self.policy.encode_negative(self.device)
        initial = noise_by_row(seeds, self.latent_shape).to(self.device, self.policy.storage_dtype)
        calls = self.policy.calls
        before = calls.rollout
        latents = sample(self.policy.bind(conditioning, negative), initial, self.sampler).latents
        calls.rollout -= (calls.rollout - before) * extra // len(prompts)
        return latents

    def identity(self) -> dict[str, Any]:
        return {
            "height": self.height,
            "width": self.width,
            "steps": len(self.sampler),
            "guidance_scale": self.policy.guidance_scale,
            "policy": tensor_digest(self.policy.snapshot()),
        }
