"""From a body to a `ScoreRequest`: everything that can be known to be wrong with one is said here, before it is queued."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dina_reward.checks.stored import parse_json
from dina_reward.checks.values import check_fields, fits
from dina_reward.families import Conditioning
from dina_reward.modeling.inputs import check_latents, check_size
from dina_reward.modeling.scoring import Ensemble
from dina_reward.reward import LatentReward
from dina_reward.serving.errors import RequestError, unscorable
from dina_reward.serving.settings import ServingConfig
from dina_reward.serving.wire import Header, TensorPlace, tensor_at


VERSIONS = (1, 2)
"""Versions of the protocol."""

OPTIONS_KEY = "options"
"""Name, in the safetensors metadata of version 2, of the JSON object with `ScoreOptions` and prompts."""

EMBEDDINGS = ("prompt_embeds", "pooled_prompt_embeds", "prompt_embeds_mask")
_V1 = {"latents", "prompt_embeds", "pooled_prompt_embeds", "u", "seeds"}
_V2 = {"latents", "noisy_latents", *EMBEDDINGS, "prompt_index", "u", "timesteps", "seeds", "noise"}
_INTEGERS = {"seeds", "prompt_index"}
_LONGEST_PROMPT = 20_000
_EMBEDDED = "\0embedded "


@dataclass(frozen=True)
class ScoreOptions:
    """What is the same for all rows of a request; arguments of `LatentReward.score`.

    Args:
        noise_level: level, or levels of an ensemble; default: the checkpoint's.
        ensemble, num_noise_samples, share_noise_across_levels, normalize: as there.
        height, width: size of the images in pixels, for packed latents.
    """

    noise_level: float | tuple[float, ...] | None = None
    ensemble: Ensemble = "tokens"
    num_noise_samples: int = 1
    share_noise_across_levels: bool = True
    normalize: bool = False
    height: int | None = None
    width: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.noise_level, list):
            object.__setattr__(self, "noise_level", tuple(self.noise_level))
        check_fields(self, noise_level=(0, 1), num_noise_samples=(1, 1 << 16), height=(1, 1 << 20), width=(1, 1 << 20))
        if self.noise_level == ():
            raise ValueError("noise_level is empty; name at least one level, e.g. 0.4")


_OPTION_NAMES = ", ".join(ScoreOptions.__dataclass_fields__)


@dataclass(frozen=True, eq=False)
class ScoreRequest:
    """Rows that can be scored, on the CPU.

    Args:
        latents: spatial layout, shape ``(rows, ...)``.
        noisy: whether they are states that carry noise already.
        prompts: one per row: a text, or a name in ``embedded``.
        embedded: encoded prompts of one row each, by names that stand for their content.
        options: what is the same for all rows.
        levels: the level of every row, shape ``(rows,)``; ``None`` with an ensemble or timesteps.
        timesteps: of noisy states instead, shape ``(rows,)``.
        seeds: of the noise, one per row; ``None`` where there is none to draw.
        noise: the noise itself, shape ``(rows, draws, ...)`` or ``(rows, levels, draws, ...)``.
    """

    latents: Tensor
    noisy: bool
    prompts: list[str]
    embedded: Mapping[str, Conditioning]
    options: ScoreOptions
    levels: Tensor | None = None
    timesteps: Tensor | None = None
    seeds: list[int] | None = None
    noise: Tensor | None = None
    default_levels: int = field(default=1)

    @property
    def rows(self) -> int:
        """Number of latents."""
        return len(self.latents)

    @property
    def draws(self) -> int:
        """Rows of a pass of the model that a latent becomes: levels times draws."""
        level = self.options.noise_level
        count = self.default_levels if level is None else len(level) if isinstance(level, tuple) else 1
        return 1 if self.levels is not None or self.noisy else count * self.options.num_noise_samples

    @cached_property
    def key(self) -> tuple[Any, ...]:
        """Requests with equal keys can be scored together."""
        embedding = next(iter(self.embedded.values())).prompt_embeds if self.embedded else None
        noise = None if self.noise is None else self.noise.shape[1:]
        kind = (self.noisy, self.levels is None, self.timesteps is None, noise)
        text = None if embedding is None else tuple(embedding.shape)
        return (kind, self.latents.shape[1:], self.latents.dtype, text, self._shared_options())

    def _shared_options(self) -> ScoreOptions:
        if self.levels is None and not self.noisy:
            return self.options
        return ScoreOptions(normalize=self.options.normalize)


def row_count(header: Header) -> int:
    """Rows that a body says it has, before any of it is read."""
    place = header.tensors.get("latents") or header.tensors.get("noisy_latents")
    return place.shape[0] if place is not None and place.shape else 1


def check_tensors(header: Header, version: int, limits: ServingConfig) -> None:
    """Names, dtypes and numbers of rows, by the header alone.

    Raises:
        RequestError: 422 with the fault.
    """
    places, known = header.tensors, _V1 if version == 1 else _V2
    unknown = sorted(places.keys() - known)
    if unknown:
        raise unscorable("unknown_tensors", f"{str(unknown)[:200]}", f"tensors among {', '.join(sorted(known))}")
    required = {"latents", "prompt_embeds", "u"} if version == 1 else set()
    missing = sorted(required - places.keys())
    if missing:
        raise unscorable("missing_tensors", f"no {', '.join(missing)}", f"the tensors {', '.join(sorted(required))}")
    if version == 2 and ("latents" in places) == ("noisy_latents" in places):
        raise unscorable("missing_tensors", "both or none of them", "latents (clean) or noisy_latents")
    for name, place in places.items():
        _check_dtype(name, place)
        if 0 in place.shape or not place.shape:
            raise unscorable("empty_tensor", f"{name} of shape {place.shape}", "at least one row")
    rows = row_count(header)
    if rows > limits.max_request_rows:
        raise RequestError(
            413,
            "too_many_rows",
            given=f"{rows} rows",
            expected=f"at most {limits.max_request_rows}",
            do="send them in several requests",
        )
    for name in ("u", "timesteps", "seeds", "prompt_index", "noise"):
        if name in places and places[name].shape[0] != rows:
            raise unscorable(
                "wrong_rows", f"{name} of shape {places[name].shape}", f"{rows} rows, as the latents have"
            )
        if name in places and name != "noise" and len(places[name].shape) != 1:
            raise unscorable("wrong_rank", f"{name} of shape {places[name].shape}", f"shape ({rows},)")


def _check_dtype(name: str, place: TensorPlace) -> None:
    wanted = "I64" if name in _INTEGERS else "BOOL" if name == "prompt_embeds_mask" else "a float"
    fitting = {"I64": place.dtype == torch.int64, "BOOL": place.dtype == torch.bool}
    if not fitting.get(wanted, place.dtype.is_floating_point):
        raise unscorable("wrong_dtype", f"{name} of dtype {place.dtype}", f"{name} of {wanted}")


def read_request(header: Header, data: bytearray, reward: LatentReward, limits: ServingConfig) -> ScoreRequest:
    """The request in a body whose header `check_tensors` has passed.

    Args:
        header, data: the body.
        reward: the reward that is asked for scores.
        limits: the server's.

    Raises:
        RequestError: 422 with the fault.
    """
    tensors = {name: tensor_at(data, place) for name, place in header.tensors.items()}
    values = _json_options(header.metadata)
    prompts = values.pop("prompts", None)
    try:
        options = ScoreOptions(**values)
    except (TypeError, ValueError) as error:
        raise unscorable("invalid_options", str(error)[:300], f"options among {_OPTION_NAMES}") from None
    noisy = "noisy_latents" in tensors
    latents = _latents(tensors["noisy_latents" if noisy else "latents"], options, reward)
    names, embedded = _prompts(tensors, prompts, len(latents), reward)
    request = ScoreRequest(latents, noisy, names, embedded, replace(options, height=None, width=None))
    request = _with_noise(request, tensors, options, reward)
    if request.draws > limits.max_draws:
        raise unscorable(
            "too_many_draws", f"{request.draws} levels times draws per row", f"at most {limits.max_draws}"
        )
    return request


def _json_options(metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        values = parse_json(metadata.get(OPTIONS_KEY, "{}"), "the options")
    except ValueError as error:
        raise unscorable("invalid_options", str(error)[:200], "a JSON object") from None
    if not isinstance(values, dict):
        raise unscorable("invalid_options", type(values).__name__, "a JSON object")
    return values


def _latents(given: Tensor, options: ScoreOptions, reward: LatentReward) -> Tensor:
    config = reward.config.backbone_config
    given = given.float() if given.dtype == torch.float64 else given
    try:
        latents = reward.family.unpack_latents(given, config, height=options.height, width=options.width)
        check_latents(latents, reward.family, config, latents.device)
        check_size(latents, options.height, options.width)
    except ValueError as error:
        raise unscorable("invalid_latents", f"latents of shape {tuple(given.shape)}", str(error)) from None
    return latents


def _prompts(
    tensors: Mapping[str, Tensor], texts: Any, rows: int, reward: LatentReward
) -> tuple[list[str], dict[str, Conditioning]]:
    """The prompt of every row, and the encoded ones among them."""
    parts = [tensors.get(name) for name in EMBEDDINGS]
    if (texts is None) == (parts[0] is None):
        raise unscorable("no_prompts", "both or none of them", "prompts (in the options) or prompt_embeds")
    if parts[0] is None:
        if any(part is not None for part in parts):
            raise unscorable("no_prompts", "parts of embeddings beside prompts", "prompt_embeds with them")
        return _of_rows(_texts(texts, reward), tensors.get("prompt_index"), rows), {}
    conditioning = Conditioning(*parts)  # type: ignore[arg-type]
    try:
        reward.family.check_conditioning(conditioning, reward.config.backbone_config)
    except ValueError as error:
        raise unscorable("invalid_embeddings", f"prompt_embeds {tuple(parts[0].shape)}", str(error)) from None
    if not all(bool(torch.isfinite(part).all()) for part in parts if part is not None):
        raise unscorable("not_finite", "prompt embeddings with NaN or infinity", "finite numbers")
    one_each = [conditioning[row : row + 1] for row in range(len(conditioning))]
    names = [_EMBEDDED + content_name(row) for row in one_each]
    return _of_rows(names, tensors.get("prompt_index"), rows), dict(zip(names, one_each, strict=True))


def _texts(texts: Any, reward: LatentReward) -> list[str]:
    texts = [texts] if isinstance(texts, str) else texts
    if not fits(texts, list[str]) or not texts:
        raise unscorable("invalid_prompts", f"{texts!r:.100}", "a text, or a list of texts")
    if any("\0" in text or len(text) > _LONGEST_PROMPT for text in texts):
        raise unscorable("invalid_prompts", "a prompt with NUL, or too long", f"at most {_LONGEST_PROMPT} characters")
    if reward.prompt_encoder.pipeline is None:
        raise unscorable(
            "no_text_encoders",
            "prompts",
            "prompt_embeds: this server has no text encoders",
            "send prompt_embeds, or start the server without --no-text-encoders",
        )
    return texts


def _of_rows(names: list[str], index: Tensor | None, rows: int) -> list[str]:
    """Of some prompts, that of every row: the row's own, the only one, or the one that its index says."""
    if index is None:
        if len(names) not in (1, rows):
            raise unscorable("wrong_rows", f"{len(names)} prompts", f"{rows} of them, or one, or prompt_index")
        return names if len(names) == rows else names * rows
    positions = index.tolist()
    if not all(0 <= position < len(names) for position in positions):
        raise unscorable("invalid_prompt_index", f"from {min(positions)} to {max(positions)}", f"below {len(names)}")
    return [names[position] for position in positions]


def _with_noise(
    request: ScoreRequest, tensors: Mapping[str, Tensor], options: ScoreOptions, reward: LatentReward
) -> ScoreRequest:
    """With levels, timesteps, seeds and noise, as far as rows have their own."""
    levels, timesteps, noise = (_floats(tensors.get(name)) for name in ("u", "timesteps", "noise"))
    _check_points(levels, timesteps, reward)
    if request.noisy:
        if (levels is None) == (timesteps is None) or noise is not None or "seeds" in tensors:
            raise unscorable(
                "invalid_levels", "noisy_latents", "u or timesteps with them, and neither seeds nor noise"
            )
        return replace(request, levels=levels, timesteps=timesteps)
    if timesteps is not None or (levels is not None and (noise is not None or options.noise_level is not None)):
        raise unscorable("invalid_levels", "several levels", "u, or the option noise_level; timesteps if noisy")
    default = reward.config.noise_level
    wanted = options.noise_level if options.noise_level is not None else default
    wanted = wanted[0] if isinstance(wanted, tuple) and len(wanted) == 1 else wanted
    single = not isinstance(wanted, tuple) and options.num_noise_samples == 1 and noise is None
    if levels is None and single and options.share_noise_across_levels:
        levels = torch.full((request.rows,), float(wanted), device="cpu")  # type: ignore[arg-type]
    if levels is not None and options.num_noise_samples > 1:
        raise unscorable("invalid_options", "num_noise_samples with u", "the option noise_level with it")
    if noise is not None:
        if "seeds" in tensors:
            raise unscorable("invalid_noise", "noise and seeds", "one of them")
        noise = _spatial_noise(noise, tensors["latents"], options, request, reward)
        return replace(request, noise=noise, default_levels=_count(default))
    seeds = tensors["seeds"].tolist() if "seeds" in tensors else [secrets.randbits(63) for _ in range(request.rows)]
    return replace(request, levels=levels, seeds=seeds, default_levels=_count(default))


def _count(level: float | tuple[float, ...]) -> int:
    return len(level) if isinstance(level, tuple) else 1


def _floats(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float()


def _check_points(levels: Tensor | None, timesteps: Tensor | None, reward: LatentReward) -> None:
    try:
        if levels is not None:
            reward.noise_process.snap(levels)
        if timesteps is not None:
            reward.noise_process.from_timesteps(timesteps)
    except ValueError as error:
        raise unscorable("invalid_levels", "u or timesteps", str(error)[:300]) from None


def _spatial_noise(
    noise: Tensor, given: Tensor, options: ScoreOptions, request: ScoreRequest, reward: LatentReward
) -> Tensor:
    """Noise that came in the layout of the latents, in the spatial layout."""
    lead = noise.shape[: noise.ndim - given.ndim + 1]
    wanted = 2 if options.share_noise_across_levels else 3
    if len(lead) != wanted or noise.shape[len(lead) :] != given.shape[1:]:
        between = "draws" if wanted == 2 else "levels, draws"
        expected = f"shape (rows, {between}, {', '.join(map(str, given.shape[1:]))})"
        raise unscorable("invalid_noise", f"noise of shape {tuple(noise.shape)}", expected)
    if not bool(torch.isfinite(noise).all()):
        raise unscorable("not_finite", "noise with NaN or infinity", "finite numbers")
    rows = noise.reshape(-1, *given.shape[1:])
    config = reward.config.backbone_config
    rows = reward.family.unpack_latents(rows, config, height=options.height, width=options.width)
    return rows.reshape(*lead, *request.latents.shape[1:])


def content_name(conditioning: Conditioning) -> str:
    """A name for encoded prompts by what they are: dtypes, shapes and every byte."""
    digest = hashlib.blake2b(digest_size=24)
    for part in (conditioning.prompt_embeds, conditioning.pooled_prompt_embeds, conditioning.prompt_embeds_mask):
        digest.update(b"-" if part is None else f"{part.dtype}{tuple(part.shape)}".encode())
        if part is not None:
            digest.update(part.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
