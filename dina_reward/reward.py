"""`LatentReward`: the object that scores latents."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack, cast

import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from dina_reward.attach import AttachedBackbone, BackboneSource, attach_backbone
from dina_reward.checkpoint import Checkpoint, check_state, read_checkpoint, resolve_checkpoint, write_checkpoint
from dina_reward.families import Conditioning, get_family
from dina_reward.inputs import NonFiniteError, check_embeddings, check_latents, expand_prompts
from dina_reward.likelihood import ThurstoneModel
from dina_reward.modeling import LatentRewardConfig, LatentRewardModel, default_lora_config
from dina_reward.noise import NoisePoint
from dina_reward.noise_draws import draw_noise
from dina_reward.prompt_encoding import PromptEncoder
from dina_reward.scoring import Ensemble, NoiseLevel, NoisyBatch, RewardOutput, ScoreOptions, score_batch


class LatentReward:
    """Scores diffusion latents: noise is added at one or several known levels, and the backbone judges what it sees.

    Example:
        >>> from dina_reward import LatentReward
        >>> reward = LatentReward.from_pretrained("path/or/hub-id", pipeline=pipe)
        >>> latents = pipe(prompts, output_type="latent").images
        >>> reward(latents, prompts)  # (batch,) float32

    Latents are what the pipeline returns for ``output_type="latent"``: clean, scaled, in the family's own layout.
    The constructor is internal; use `from_pretrained`, or `from_config` to train a new reward.
    """

    def __init__(
        self,
        attached: AttachedBackbone,
        lora_config: LoraConfig,
        *,
        pipeline: Any | None = None,
        prompt_cache_size: int = 128,
    ) -> None:
        self.config = attached.config
        self.family = get_family(self.config.family)
        self.noise_process = attached.noise_process
        self.model = LatentRewardModel(self.config, self.family, attached.backbone, lora_config)
        self.prompt_encoder = PromptEncoder(
            self.family,
            pipeline,
            max_sequence_length=self.config.max_sequence_length,
            cache_size=prompt_cache_size,
        )
        self._shared = attached.shared
        self.__name__ = "latent_reward"

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | os.PathLike[str],
        pipeline: Any | None = None,
        transformer: nn.Module | None = None,
        scheduler: Any | None = None,
        *,
        share_backbone: bool = False,
        backbone: str | None = None,
        torch_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        prompt_cache_size: int = 128,
    ) -> LatentReward:
        """Loads a reward for scoring.

        Args:
            path_or_id: directory or hub id of a native checkpoint or of one in the published reference layout.
            pipeline: diffusers pipeline of the reward's family; gives backbone, scheduler and text encoders.
            transformer: the denoiser alone, e.g. ``pipe.transformer``; wins over the pipeline's.
            scheduler: training scheduler (or its config) whose grid noise levels snap to; wins over all others.
            share_backbone: run on the generator's own tensors (extra memory: LoRA and head) instead of a copy with
                the LoRA merged into it. The generator itself is not wrapped, switched or re-flagged.
            backbone: model id or path to load the backbone from when neither pipeline nor transformer is given;
                default: the one the checkpoint names.
            torch_dtype: dtype the backbone computes in. LoRA, head and scores are float32 in any case.
            device: where to put the reward; in shared mode the generator's device.
            revision, token, cache_dir, local_files_only: options for the hub.
            prompt_cache_size: encoded prompts that are kept; ``0`` for none.

        Raises:
            CheckpointError: (a `ValueError`) the checkpoint is missing, damaged, or does not fit the backbone.
            SharedBackboneError: (a `ValueError`) sharing cannot be right for this generator.
            ValueError: a pipeline of another family or size.
        """
        hub = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        directory = resolve_checkpoint(path_or_id, revision=revision, **hub)  # type: ignore[arg-type]
        checkpoint = read_checkpoint(directory)
        source = BackboneSource(
            pipeline, transformer, scheduler, share_backbone, backbone, torch_dtype, device, directory, hub
        )
        attached = attach_backbone(checkpoint.config, source)
        reward = cls(attached, checkpoint.lora_config, pipeline=pipeline, prompt_cache_size=prompt_cache_size)
        reward._load(checkpoint)
        return reward.eval()

    @classmethod
    def from_config(
        cls,
        config: LatentRewardConfig,
        pipeline: Any | None = None,
        transformer: nn.Module | None = None,
        scheduler: Any | None = None,
        *,
        lora_config: LoraConfig | None = None,
        share_backbone: bool = False,
        torch_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        seed: int = 0,
        prompt_cache_size: int = 128,
    ) -> LatentReward:
        """New reward with a fresh LoRA and head, ready to train; never use it to score before it is trained.

        Args:
            config: what to build; ``backbone_config`` and ``scheduler_config`` are filled in from the backbone.
            lora_config: PEFT configuration; default `default_lora_config` (rank 64).
            seed: of the initial LoRA and head weights; the global random state is left as it was.

        Other arguments as for `from_pretrained`.
        """
        source = BackboneSource(
            pipeline, transformer, scheduler, share_backbone, torch_dtype=torch_dtype, device=device
        )
        attached = attach_backbone(config, source)
        lora_config = lora_config or default_lora_config(config)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            reward = cls(attached, lora_config, pipeline=pipeline, prompt_cache_size=prompt_cache_size)
        return reward.train()

    @property
    def device(self) -> torch.device:
        """Device scores are computed on."""
        return self.model.device

    @property
    def shares_backbone(self) -> bool:
        """Whether the backbone's tensors are a generator's."""
        return self._shared is not None

    @property
    def merged(self) -> bool:
        """Whether the LoRA is merged into the backbone."""
        return any(layer.merged for layer in self.model.backbone.modules() if isinstance(layer, BaseTunerLayer))

    def to(self, device: torch.device | str) -> LatentReward:
        """Moves a reward with a backbone of its own.

        Raises:
            ValueError: the backbone is shared; move the generator instead.
        """
        if self._shared is not None:
            raise ValueError("this reward lives on its generator's tensors; move the generator instead")
        self.model.to(device)
        self.prompt_encoder.clear()
        return self

    def eval(self) -> LatentReward:
        """Inference: no gradients on LoRA and head, LoRA merged where the backbone is the reward's own."""
        self.model.eval().set_trainable(False)
        if self._shared is None:
            self.merge_lora()
        return self

    def train(self) -> LatentReward:
        """Training: LoRA apart from the backbone, gradients on LoRA and head."""
        self.unmerge_lora()
        self.model.train().set_trainable(True)
        return self

    def compile(self, **kwargs: Any) -> LatentReward:
        """Compiles backbone and head with `torch.compile`; keyword arguments go there."""
        self.model.backbone.compile(**kwargs)
        self.model.head.compile(**kwargs)
        return self

    def merge_lora(self) -> None:
        """Folds the LoRA into the backbone's weights (faster scoring).

        Raises:
            ValueError: the backbone is shared, so that merging would alter the generator.
        """
        if self._shared is not None:
            raise ValueError("a shared backbone cannot hold the LoRA: merging would alter the generator")
        if not self.merged:
            self.model.backbone.merge_adapter()

    def unmerge_lora(self) -> None:
        """Takes the LoRA out of the backbone's weights again."""
        if self.merged:
            self.model.backbone.unmerge_adapter()

    def encode_prompts(self, prompts: Sequence[str]) -> tuple[Conditioning, Tensor]:
        """Conditioning of the unique prompts and, for each prompt, its position there, shape ``(len(prompts),)``."""
        return self.prompt_encoder(prompts, self.device)

    @torch.no_grad()
    def __call__(
        self,
        latents: Tensor,
        prompts: str | Sequence[str] | None = None,
        *,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        noise_level: NoiseLevel | None = None,
        ensemble: Ensemble = "tokens",
        num_noise_samples: int = 1,
        seed: int | Sequence[int] | Tensor | None = None,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        share_noise: bool = False,
        normalize: bool = False,
        batch_size: int | None = None,
    ) -> Tensor:
        """Scores clean latents without gradient.

        Args:
            latents: clean latents in the family's layout, shape ``(batch, ...)``, floating point.
            prompts: one prompt per latent, or one for all.
            prompt_embeds, pooled_prompt_embeds: encoded prompts instead, ``batch`` rows or one row for all.
            noise_level: target level(s) in ``[0, 1]``; several form an ensemble. Default: the checkpoint's.
            ensemble: ``"tokens"``: the head attends over all levels' tokens at once; ``"mean"``: average of scores.
            num_noise_samples: noise draws per latent, whose scores are averaged.
            seed: an integer (row ``i`` has its own stream) or one seed per row; the same on every device.
            generator: random generator instead of a seed. With neither, torch's global random state is used.
            noise: the noise itself; see `draw_noise`.
            share_noise: one draw for the whole batch, so that differences between rows are not noise.
            normalize: apply the checkpoint's ``(raw + score_shift) / score_scale``.
            batch_size: latents per backbone pass; does not change results.

        Returns:
            `Tensor`: shape ``(batch,)``, float32.

        Raises:
            ValueError: latents, prompts or noise do not fit; the message says what was expected.
            NonFiniteError: (a `ValueError`) latents or scores are not finite.
        """
        return self._evaluate(
            latents,
            prompts,
            level_scores=False,
            prompt_embeds=prompt_embeds,
            pooled_prompt_embeds=pooled_prompt_embeds,
            noise_level=noise_level,
            ensemble=ensemble,
            num_noise_samples=num_noise_samples,
            seed=seed,
            generator=generator,
            noise=noise,
            share_noise=share_noise,
            normalize=normalize,
            batch_size=batch_size,
        )[0]

    def score(
        self, latents: Tensor, prompts: str | Sequence[str] | None = None, **options: Unpack[ScoreOptions]
    ) -> RewardOutput:
        """Scores clean latents, differentiable with respect to them; options and errors as for `__call__`."""
        _, output = self._evaluate(latents, prompts, level_scores=True, **options)
        assert output is not None
        return output

    def score_noisy(
        self,
        noisy_latents: Tensor,
        prompts: str | Sequence[str] | None = None,
        *,
        noise_level: float | Sequence[float] | Tensor | None = None,
        timesteps: float | Sequence[float] | Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        normalize: bool = False,
        batch_size: int | None = None,
    ) -> Tensor:
        """Scores intermediate states of a sampler as they are, differentiable with respect to them.

        Args:
            noisy_latents: states that already carry noise, shape ``(batch, ...)``.
            noise_level: level they carry, one for all or one per row; or
            timesteps: the scheduler's timesteps instead.

        Other arguments and errors as for `__call__`.

        Returns:
            `Tensor`: shape ``(batch,)``, float32.
        """
        if (noise_level is None) == (timesteps is None):
            raise ValueError("give either `noise_level` or `timesteps`, to say how noisy the latents are")
        conditioning, prompt_index = self._conditioning(noisy_latents, prompts, prompt_embeds, pooled_prompt_embeds)
        process = self.noise_process
        points = process.snap(noise_level) if noise_level is not None else process.from_timesteps(timesteps)  # type: ignore[arg-type]
        batch = noisy_latents.shape[0]
        if len(points.timestep) not in (1, batch):
            raise ValueError(
                f"got {len(points.timestep)} noise levels for {batch} latents; give one, or one per latent"
            )
        timestep = points.timestep.expand(batch)
        step = batch_size or batch
        scores = [
            self.model(
                noisy_latents[start : start + step],
                timestep[start : start + step],
                conditioning,
                prompt_index[start : start + step],
            )
            for start in range(0, batch, step)
        ]
        return self._finish(torch.cat(scores), normalize)

    @torch.no_grad()
    def preference(
        self,
        latents_a: Tensor,
        latents_b: Tensor,
        prompts: str | Sequence[str] | None = None,
        **options: Unpack[ScoreOptions],
    ) -> Tensor:
        """Probability that ``a`` is preferred over ``b``, noise-calibrated Thurstone (arXiv 2602.11146).

        ``Phi((s_a - s_b) / sqrt(2 (k sigma^2 + c) + 1e-6))``. Both sides see the same noise: without a seed or noise, a
        fresh seed is drawn from torch's global random state. For an ensemble the variance is averaged over its levels.

        Args:
            latents_a, latents_b: clean latents, shape ``(batch, ...)``.
            options: as for `__call__`, except ``generator`` and ``normalize``.

        Returns:
            `Tensor`: shape ``(batch,)``, float32.
        """
        if latents_a.shape != latents_b.shape:
            raise ValueError(f"the two sides differ in shape: {tuple(latents_a.shape)} and {tuple(latents_b.shape)}")
        refused = sorted({"generator", "normalize"} & set(options))
        if refused:
            raise ValueError(f"preference does not take {refused}: it needs raw scores under equal noise")
        if options.get("seed") is None and options.get("noise") is None:
            options["seed"] = int(torch.randint(2**62, (1,)))
        scores_a, scores_b = self(latents_a, prompts, **options), self(latents_b, prompts, **options)
        points = self._points(options.get("noise_level"))
        model = ThurstoneModel(self.config.variance_scale, self.config.variance_offset)
        # The variance is linear in sigma^2, so its average over levels is the variance at their root mean square.
        return model.probability(scores_a, scores_b, points.level.square().mean().sqrt().to(self.device))

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Writes the native checkpoint (see `dina_reward.checkpoint`); it is never half written."""
        write_checkpoint(directory, self._checkpoint())

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload latent reward",
    ) -> str:
        """Uploads the native checkpoint to a hub repository, which is created if need be.

        Returns:
            Address of the commit.
        """
        from tempfile import TemporaryDirectory

        from huggingface_hub import HfApi

        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with TemporaryDirectory() as directory:
            self.save_pretrained(os.path.join(directory, "reward"))
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=os.path.join(directory, "reward"),
                revision=revision,
                commit_message=commit_message,
            )
        return str(commit.commit_url)

    def load_weights(self, directory: str | os.PathLike[str]) -> None:
        """Loads adapter and head of a native checkpoint of this same reward into it, strictly.

        Raises:
            CheckpointError: (a `ValueError`) keys, shapes or files do not fit.
        """
        merged = self.merged
        self.unmerge_lora()
        self._load(read_checkpoint(directory))
        if merged:
            self.merge_lora()

    def _load(self, checkpoint: Checkpoint) -> None:
        backbone, head = self.model.backbone, self.model.head
        check_state(checkpoint.adapter, get_peft_model_state_dict(backbone), "LoRA adapter")
        check_state(checkpoint.head, head.state_dict(), "head")
        set_peft_model_state_dict(backbone, checkpoint.adapter)
        head.load_state_dict(checkpoint.head)

    def _checkpoint(self) -> Checkpoint:
        backbone = self.model.backbone
        return Checkpoint(
            config=self.config,
            lora_config=cast(LoraConfig, backbone.peft_config["default"]),
            adapter=get_peft_model_state_dict(backbone),
            head=dict(self.model.head.state_dict()),
        )

    def _conditioning(
        self,
        latents: Tensor,
        prompts: str | Sequence[str] | None,
        prompt_embeds: Tensor | None,
        pooled_prompt_embeds: Tensor | None,
    ) -> tuple[Conditioning, Tensor]:
        """Checks the inputs; unique prompts and, for each latent, its prompt's position."""
        if self._shared is not None and self._shared.check():
            self.model.to(self.device)
        check_latents(latents, self.family, self.config.backbone_config, self.device)
        batch = latents.shape[0]
        if (prompts is None) == (prompt_embeds is None):
            raise ValueError("give either `prompts` or `prompt_embeds`")
        if prompts is not None:
            return self.encode_prompts(expand_prompts(prompts, batch))
        conditioning = Conditioning(prompt_embeds, pooled_prompt_embeds)  # type: ignore[arg-type]
        check_embeddings(conditioning, batch, self.family, self.config.backbone_config)
        rows = torch.arange(batch) if len(conditioning) == batch else torch.zeros(batch, dtype=torch.long)
        return conditioning, rows

    def _evaluate(
        self,
        latents: Tensor,
        prompts: str | Sequence[str] | None,
        *,
        level_scores: bool,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        noise_level: NoiseLevel | None = None,
        ensemble: Ensemble = "tokens",
        num_noise_samples: int = 1,
        seed: int | Sequence[int] | Tensor | None = None,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        share_noise: bool = False,
        normalize: bool = False,
        batch_size: int | None = None,
    ) -> tuple[Tensor, RewardOutput | None]:
        conditioning, prompt_index = self._conditioning(latents, prompts, prompt_embeds, pooled_prompt_embeds)
        draws = draw_noise(
            latents,
            num_samples=num_noise_samples,
            seed=seed,
            generator=generator,
            noise=noise,
            share_noise=share_noise,
        )
        points = self._points(noise_level)
        scores, levels = score_batch(
            self.model,
            self.noise_process,
            NoisyBatch(latents, draws, points, conditioning, prompt_index),
            ensemble=ensemble,
            batch_size=batch_size,
            level_scores=level_scores,
        )
        scores = self._finish(scores, normalize)
        if levels is None:
            return scores.mean(dim=0), None
        return scores.mean(dim=0), RewardOutput(
            scores=scores.mean(dim=0),
            level_scores=self._affine(levels, normalize).mean(dim=1).T,
            noise_std=scores.std(dim=0) if num_noise_samples > 1 else None,
            noise_levels=points.level.to(self.device),
            timesteps=points.timestep.to(self.device),
        )

    def _points(self, noise_level: NoiseLevel | None) -> NoisePoint:
        return self.noise_process.snap(self.config.noise_level if noise_level is None else noise_level)

    def _affine(self, scores: Tensor, normalize: bool) -> Tensor:
        return (scores + self.config.score_shift) / self.config.score_scale if normalize else scores

    def _finish(self, scores: Tensor, normalize: bool) -> Tensor:
        if not bool(torch.isfinite(scores).all()):
            bad = (~torch.isfinite(scores)).nonzero()[:, -1].unique().tolist()
            raise NonFiniteError(
                f"scores of rows {bad[:8]} are not finite; if the backbone runs in float16, load it in bfloat16 or float32"
            )
        return self._affine(scores, normalize)
