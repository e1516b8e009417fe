"""`LatentReward`: the object that scores latents.

Each formula is one step from here: noise in `dina_reward.noise.processes`, the pass over levels and draws in
`dina_reward.modeling.scoring`, the network in `dina_reward.modeling.model` with the head in
`dina_reward.modeling.heads.query`, from scores to preferences in `dina_reward.likelihood`.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Concatenate, ParamSpec, SupportsIndex, TypeVar

import torch
from torch import Tensor

from dina_reward.checkpoints.pretrained import PretrainedReward
from dina_reward.checks.late import LateChecks
from dina_reward.checks.tensors import check_tensor
from dina_reward.checks.values import check_flags, checked_int, is_real
from dina_reward.families import Conditioning
from dina_reward.likelihood import PreferenceModel, ThurstoneModel, ensemble_level
from dina_reward.modeling.inputs import (
    NonFiniteError,
    check_embeddings,
    check_latents,
    check_size,
    expand_prompts,
    length_note,
    rows_outside,
    unscaled_note,
)
from dina_reward.modeling.scoring import Ensemble, NoiseLevel, NoisyBatch, RewardOutput, score_batch
from dina_reward.modeling.spread import ScoreParts, SpreadName, score_spread
from dina_reward.noise import FlowMatchingNoise, NoisePoint, model_states, rescales_states
from dina_reward.noise.draws import check_noise, draw_level_noise, draw_noise, row_seeds


Options = ParamSpec("Options")
Result = TypeVar("Result")


def options_of(
    source: Callable[Concatenate[Any, Options], Any],
) -> Callable[[Callable[..., Result]], Callable[Concatenate[Any, Options], Result]]:
    """Gives a method the parameters of another one, as type checkers, editors and `inspect.signature` see them."""

    def with_signature(method: Any) -> Any:
        method.__signature__ = inspect.signature(source).replace(return_annotation=method.__annotations__["return"])
        return method

    return with_signature


class LatentReward(PretrainedReward):
    """Scores diffusion latents: noise is added at one or several known levels, and the backbone judges what it sees.

    Examples:
        >>> from dina_reward import LatentReward
        >>> reward = LatentReward.from_pretrained("path/or/hub-id", pipeline=pipe)
        >>> latents = pipe(prompt=prompts, output_type="latent").images
        >>> reward(latents, prompts)  # (batch,) float32

    Latents are what the pipeline returns for ``output_type="latent"``: clean, scaled, in the family's own layout.
    The constructor is internal; use `from_pretrained`, or `from_config` to train a new reward.
    """

    def encode_prompts(self, prompts: Sequence[str]) -> tuple[Conditioning, Tensor]:
        """Conditioning of the unique prompts and, for each prompt, its position there, shape ``(len(prompts),)``."""
        return self.prompt_encoder(prompts, self.device)

    def score(
        self,
        latents: Tensor,
        prompts: str | Sequence[str] | None = None,
        *,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        prompt_embeds_mask: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        noise_level: NoiseLevel | None = None,
        ensemble: Ensemble = "tokens",
        num_noise_samples: int = 1,
        seed: SupportsIndex | Sequence[SupportsIndex] | Tensor | None = None,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        share_noise: bool = False,
        share_noise_across_levels: bool = True,
        kappa: float = 0.0,
        spread: SpreadName | None = None,
        normalize: bool = False,
        batch_size: int | None = None,
    ) -> RewardOutput:
        """Scores clean latents, differentiable with respect to them.

        Args:
            latents: clean latents as the pipeline returns them for ``output_type="latent"``, shape ``(batch, ...)``,
                floating point. Packed latents may also be given unpacked, ``(batch, channels, height, width)``.
            prompts: one prompt per latent, or one for all.
            prompt_embeds, pooled_prompt_embeds, prompt_embeds_mask: encoded prompts instead, ``batch`` rows or one row for
                all; which of them belong together depends on the family.
            height, width: size of the images in pixels, needed for packed latents of images that are not square.
            noise_level: target level(s) in ``[0, 1]``; several form an ensemble. Default: the checkpoint's.
            ensemble: ``"tokens"``: the head attends over all levels' tokens at once; ``"mean"``: average of scores.
            num_noise_samples: noise draws per latent, whose scores are averaged.
            seed: an integer of any kind (row ``i`` has its own stream) or one seed per row; the same on every device.
            generator: random generator instead of a seed. With neither, torch's global random state is used.
            noise: the noise itself, in the layout of ``latents``; see `draw_noise`.
            share_noise: one draw for the whole batch, so that differences between rows are not noise.
            share_noise_across_levels: all levels of an ensemble see the same draws, as in the reference. ``False``: every
                level has draws of its own (``noise`` then starts with a dimension of levels), so that their errors average
                out; a seed gives a level the same noise in any ensemble.
            kappa: conservative scoring, which makes what the reward is unsure of worth less: the mean minus ``kappa`` times
                its standard error, ``spread_scale`` (see `dina_reward.evaluation.calibrate_spread`) times its spread.
            spread: over noise ``"draws"``, over ``"levels"`` or over the ``"heads"`` of an ensemble; see
                `dina_reward.modeling.spread.score_spread`. Default: the first of heads, draws, levels with several of them.
            normalize: apply the checkpoint's ``(raw + score_shift) / score_scale``.
            batch_size: latents per backbone pass; does not change results.

        Returns:
            `RewardOutput`: scores, scores of each level on its own, and their spread over noise draws; float32.

        Raises:
            ValueError: latents, prompts or noise do not fit; the message says what was expected.
            NonFiniteError: (a `ValueError`) latents or scores are not finite.
        """
        check_flags(normalize=normalize, share_noise=share_noise, share_noise_across_levels=share_noise_across_levels)
        if noise is not None:
            noise = self._spatial_noise(noise, latents, height, width)
        late = LateChecks()
        latents = self._spatial(latents, height, width, late)
        self._warn_once("scale", lambda: unscaled_note(latents, self.prompt_encoder.pipeline))
        given = _given_conditioning(prompt_embeds, pooled_prompt_embeds, prompt_embeds_mask)
        conditioning, prompt_index = self._conditioning(len(latents), prompts, given)
        points = self._points(noise_level)
        source: dict[str, Any] = {"seed": seed, "generator": generator, "noise": noise, "share_noise": share_noise}
        if share_noise_across_levels:
            draws = draw_noise(latents, num_samples=num_noise_samples, **source)[None]
        else:
            draws = draw_level_noise(latents, points.level.tolist(), num_samples=num_noise_samples, **source)
        batch = NoisyBatch(latents, draws, points, conditioning, prompt_index)
        parts = score_batch(self.model, self.noise_process, batch, ensemble=ensemble, batch_size=batch_size)
        deviation = self._spread(parts, points, kappa, spread)
        drawn = self._finish(parts.draws, normalize, late)
        scores = drawn.mean(dim=0)
        if deviation is not None:
            deviation = deviation / self.config.score_scale if normalize else deviation
            scores = scores - kappa * deviation
        return RewardOutput(
            scores=scores,
            level_scores=self._affine(parts.levels, normalize).mean(dim=1).T,
            noise_std=drawn.std(dim=0) if num_noise_samples > 1 else None,
            noise_levels=points.level.to(self.device),
            timesteps=points.timestep.to(self.device),
            spread=deviation,
        )

    @torch.no_grad()
    @options_of(score)
    def __call__(self, *args: Any, **options: Any) -> Tensor:
        """Scores clean latents without gradient: the ``scores`` of `score`, which has the arguments and errors.

        Returns:
            `Tensor`: shape ``(batch,)``, float32.
        """
        return self.score(*args, **options).scores

    def score_noisy(
        self,
        noisy_latents: Tensor,
        prompts: str | Sequence[str] | None = None,
        *,
        noise_level: float | Sequence[float] | Tensor | None = None,
        timesteps: float | Sequence[float] | Tensor | None = None,
        scheduler: Any | None = None,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        prompt_embeds_mask: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        normalize: bool = False,
        batch_size: int | None = None,
    ) -> Tensor:
        """Scores intermediate states of a sampler, differentiable with respect to them.

        Args:
            noisy_latents: states that already carry noise, shape ``(batch, ...)``.
            noise_level: level they carry in the model's own process, one for all or one per row; or
            timesteps: the scheduler's timesteps instead. In a pipeline's callback, the state after step ``i`` is at
                ``pipe.scheduler.timesteps[i + 1]``.
            scheduler: with ``timesteps``, the sampler's scheduler, whose rule brings the states to the scale that the model
                sees: Euler, Heun and their kin keep states unscaled. Not needed for flow matching, nor where the
                pipeline's scheduler keeps states in that scale already (DDIM, DPM-Solver++, ...).

        Other arguments and errors as for `score`.

        Raises:
            ValueError: also, the scale of the states cannot be known.

        Returns:
            `Tensor`: shape ``(batch,)``, float32.
        """
        check_flags(normalize=normalize)
        if (noise_level is None) == (timesteps is None):
            raise ValueError("give either `noise_level` or `timesteps`, to say how noisy the latents are")
        late = LateChecks()
        noisy_latents = self._spatial(noisy_latents, height, width, late)
        given = _given_conditioning(prompt_embeds, pooled_prompt_embeds, prompt_embeds_mask)
        conditioning, prompt_index = self._conditioning(len(noisy_latents), prompts, given)
        process = self.noise_process
        points = process.snap(noise_level) if noise_level is not None else process.from_timesteps(timesteps)  # type: ignore[arg-type]
        batch = noisy_latents.shape[0]
        if len(points.timestep) not in (1, batch):
            raise ValueError(
                f"got {len(points.timestep)} noise levels for {batch} latents; give one, or one per latent"
            )
        noisy_latents = self._in_model_scale(noisy_latents, timesteps, scheduler)
        timestep = points.timestep.expand(batch)
        step = batch if batch_size is None else checked_int("batch_size", batch_size, 1)
        scores = [
            self.model(
                noisy_latents[start : start + step],
                timestep[start : start + step],
                conditioning,
                prompt_index[start : start + step],
            )
            for start in range(0, batch, step)
        ]
        return self._finish(torch.cat(scores), normalize, late)

    @torch.no_grad()
    def preference(
        self, latents_a: Tensor, latents_b: Tensor, prompts: str | Sequence[str] | None = None, **options: Any
    ) -> Tensor:
        """Probability that ``a`` is preferred over ``b`` under the reward's likelihood; both are scored in one pass.

        Noise-calibrated Thurstone (arXiv 2602.11146): ``Phi((s_a - s_b) / sqrt(2 (k sigma^2 + c) + 1e-6))``, for an
        ensemble with the variance averaged over its levels. Bradley-Terry: ``sigmoid(s_a - s_b)``. Both sides see the same
        noise: without a seed or noise, a fresh seed is drawn from torch's global random state.

        Args:
            latents_a, latents_b: clean latents, shape ``(batch, ...)``.
            prompts: one prompt per pair, or one for all.
            options: as for `score`, except ``generator``, ``normalize``, ``kappa`` and ``spread``; rows are pairs.

        Returns:
            `Tensor`: shape ``(batch,)``, float32.
        """
        prompts, options = options_for_both_sides(latents_a, latents_b, prompts, options)
        scores_a, scores_b = self(torch.cat([latents_a, latents_b]), prompts, **options).chunk(2)
        level = ensemble_level(self._points(options.get("noise_level")).level)
        return self.preference_model.probability(scores_a, scores_b, level.to(self.device))

    @property
    def preference_model(self) -> PreferenceModel:
        """The reward's likelihood: from raw scores to the probability of a preference."""
        return self.config.preference_model()

    def _spatial(self, latents: Tensor, height: int | None, width: int | None, late: LateChecks) -> Tensor:
        """Checked latents in the family's spatial layout; what only the device knows is left to ``late``."""
        if self._shared is not None and self._shared.check(late):
            self.model.to(self.device)
        denoiser_config = self.config.backbone_config
        if isinstance(latents, Tensor):
            latents = self.family.unpack_latents(latents, denoiser_config, height=height, width=width)
        check_latents(latents, self.family, denoiser_config, self.device, late)
        check_size(latents, height, width)
        return latents

    def _in_model_scale(self, states: Tensor, timesteps: Any, scheduler: Any | None) -> Tensor:
        """States as the model sees them; those given by their noise level are, by definition."""
        if timesteps is None:
            if scheduler is not None:
                raise ValueError(
                    "`scheduler` goes with its `timesteps`; states at a `noise_level` are taken as they are"
                )
            return states
        if scheduler is not None:
            return model_states(states, timesteps, scheduler)
        if isinstance(self.noise_process, FlowMatchingNoise):
            return states
        known = getattr(self.prompt_encoder.pipeline, "scheduler", None)
        if known is None or rescales_states(known):
            whose = "an unknown scheduler" if known is None else f"the pipeline's {type(known).__name__}"
            raise ValueError(
                f"the scale of these states cannot be known: with {whose} they may be unscaled. Pass `scheduler=` (such "
                "as pipe.scheduler) to have them scaled by its rule, or `noise_level=` if they are variance preserving"
            )
        return states

    def _spatial_noise(self, noise: Tensor, latents: Tensor, height: int | None, width: int | None) -> Tensor:
        """Noise that was given in the layout of ``latents``, with or without a dimension of draws."""
        check_noise(noise)
        if not isinstance(latents, Tensor) or noise.ndim < latents.ndim:
            return noise  # the latents, or its shape, will be refused
        lead = noise.shape[: noise.ndim - latents.ndim + 1]
        rows = noise.reshape(-1, *noise.shape[len(lead) :])
        rows = self.family.unpack_latents(rows, self.config.backbone_config, height=height, width=width)
        return rows.reshape(*lead, *rows.shape[1:])

    def _conditioning(
        self, batch: int, prompts: str | Sequence[str] | None, given: Conditioning | None
    ) -> tuple[Conditioning, Tensor]:
        """Checks what was given for the text; unique prompts and, for each latent, its prompt's position."""
        if (prompts is None) == (given is None):
            raise ValueError("give either `prompts` or `prompt_embeds`")
        if prompts is not None:
            return self.encode_prompts(expand_prompts(prompts, batch))
        assert given is not None
        check_embeddings(given, batch, self.family, self.config.backbone_config)
        self._warn_once("length", lambda: length_note(given, self._embeds_length()))
        rows = (
            torch.arange(batch, device="cpu")
            if len(given) == batch
            else torch.zeros(batch, dtype=torch.long, device="cpu")
        )
        return given, rows

    def _embeds_length(self) -> int | None:
        pipeline = self.prompt_encoder.pipeline
        return None if pipeline is None else self.family.embeds_length(pipeline, self.config.max_sequence_length)

    def _warn_once(self, kind: str, note: Callable[[], str | None]) -> None:
        """Says what looks wrong but may be right; looks at the first call alone, since to look waits for the device."""
        if kind in self._warned:
            return
        self._warned.add(kind)
        if (text := note()) is not None:
            warnings.warn(text, stacklevel=3)

    def _points(self, noise_level: NoiseLevel | None) -> NoisePoint:
        return self.noise_process.snap(self.config.noise_level if noise_level is None else noise_level)

    def _spread(self, parts: ScoreParts, points: NoisePoint, kappa: float, name: SpreadName | None) -> Tensor | None:
        """Standard error of the scores, if it is asked for."""
        if not kappa and name is None:
            return None
        if not (is_real(kappa) and kappa >= 0):
            raise ValueError(f"kappa must be a finite number that is not negative, got {kappa!r}")
        model, levels = self.preference_model, points.level.to(self.device)
        variance = model.variance(levels) if isinstance(model, ThurstoneModel) else torch.ones_like(levels)
        return self.config.spread_scale * score_spread(parts, variance, name)

    def _affine(self, scores: Tensor, normalize: bool) -> Tensor:
        return (scores + self.config.score_shift) / self.config.score_scale if normalize else scores

    def _finish(self, scores: Tensor, normalize: bool, late: LateChecks) -> Tensor:
        finite = torch.isfinite(scores)
        advice = "if the backbone runs in float16, load it in bfloat16 or float32"
        late.add(finite, lambda: NonFiniteError(f"scores of rows {rows_outside(finite)} are not finite; {advice}"))
        late.settle()
        return self._affine(scores, normalize)


def _given_conditioning(embeds: Tensor | None, pooled: Tensor | None, mask: Tensor | None) -> Conditioning | None:
    if embeds is None:
        if pooled is not None or mask is not None:
            raise ValueError("pooled_prompt_embeds and prompt_embeds_mask belong to prompt_embeds; give these too")
        return None
    given = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled, "prompt_embeds_mask": mask}
    for name, tensor in given.items():
        if tensor is not None:
            check_tensor(name, tensor)
    if mask is not None and not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError("prompt_embeds_mask must be true for tokens of the prompt and false for padding")
    return Conditioning(embeds, pooled, None if mask is None else mask.bool())


def options_for_both_sides(
    latents_a: Tensor, latents_b: Tensor, prompts: str | Sequence[str] | None, options: Mapping[str, Any]
) -> tuple[list[str] | None, dict[str, Any]]:
    """Prompts and options of `LatentReward.preference` for one pass over both sides, which see the same noise.

    Raises:
        ValueError: sides of different shapes, or options that give the sides different noise.
    """
    for side in (latents_a, latents_b):
        check_tensor("latents", side, "call the pipeline with output_type='latent'")
    if latents_a.shape != latents_b.shape:
        raise ValueError(f"the two sides differ in shape: {tuple(latents_a.shape)} and {tuple(latents_b.shape)}")
    first, second = ((side.dtype, side.device, side.layout) for side in (latents_a, latents_b))
    if first != second:
        raise ValueError(f"the two sides differ: {first[0]} on {first[1]}, {second[0]} on {second[1]}")
    refused = sorted({"generator", "normalize", "kappa", "spread"} & set(options))
    if refused:
        raise ValueError(f"preference does not take {refused}: it needs raw scores under equal noise")
    options = dict(options)
    if options.get("seed") is None and options.get("noise") is None:
        options["seed"] = int(torch.randint(2**62, (1,), device="cpu"))
    both = {name: _of_both_sides(name, value, latents_a, options) for name, value in options.items()}
    return None if prompts is None else 2 * expand_prompts(prompts, len(latents_a)), both


def _of_both_sides(name: str, value: Any, side: Tensor, options: Mapping[str, Any]) -> Any:
    """An option of `score` for one side's latents, repeated for both; what all rows have in common stays as it is."""
    if name == "seed" and value is not None and not options.get("share_noise"):
        return 2 * row_seeds(value, len(side))
    if name not in ("noise", "prompt_embeds", "pooled_prompt_embeds", "prompt_embeds_mask") or value is None:
        return value
    check_tensor(name, value)
    dim = value.ndim - side.ndim if name == "noise" and value.ndim > side.ndim else 0
    if value.shape[dim] not in (1, len(side)):
        raise ValueError(
            f"{name} has {value.shape[dim]} rows for {len(side)} pairs; give one row per pair, or one for all"
        )
    return value if value.shape[dim] == 1 else torch.cat([value, value], dim=dim)
