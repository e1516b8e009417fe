"""`RemoteReward`: a reward that is scored by servers, with the signature of one that is scored here."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, SupportsIndex

import torch
from safetensors.torch import save
from torch import Tensor

from dina_reward.checks.values import check_flags, check_number, check_text, checked_int, checked_texts
from dina_reward.families import Conditioning, get_family
from dina_reward.likelihood import PreferenceModel, ensemble_level
from dina_reward.modeling import LatentRewardConfig
from dina_reward.modeling.inputs import check_latents, check_size, expand_prompts
from dina_reward.modeling.scoring import Ensemble, NoiseLevel, RewardOutput
from dina_reward.noise import NoiseProcess
from dina_reward.noise.draws import draw_level_noise, draw_noise, row_seeds
from dina_reward.reward import options_for_both_sides, options_of
from dina_reward.serving.requests import EMBEDDINGS, OPTIONS_KEY, content_name
from dina_reward.serving.settings import TOKEN_VARIABLE
from dina_reward.serving.transport import RemoteRewardError, Transport, json_text


_MOST_CONNECTIONS = 1024
_LONGEST_SECONDS = 1e6  # what threads can wait for has an end
_HEADERS = {"content-type": "application/octet-stream", "x-drm-protocol-version": "2"}


class RemoteReward:
    """A reward on scoring servers (`dina-reward serve`), called as a `LatentReward` is, without gradients.

    Rows travel in requests of ``batch_size``, over connections that stay open, to all servers at once; each request holds a
    prompt's text or embeddings once, however many rows have it. Equal seeds give the scores of the reward itself, whatever
    the number of servers and the size of requests.

    Args:
        url: of one server, such as ``http://host:8000``, or of several: a sequence, or one text with commas.
        token: the servers' bearer token; default: the environment variable ``DINA_REWARD_TOKEN``.
        timeout: seconds that a request with all its attempts may take; attempts are as `Transport` says.
        batch_size: rows per request.
        max_connections: requests on their way at once, per server.

    Examples:
        >>> from dina_reward import RemoteReward
        >>> reward = RemoteReward("http://reward-host:8000")
        >>> reward(latents, prompts, seed=0)  # (batch,) float32, on the device of the latents

    Raises:
        ValueError: not the address of a server.
        RemoteRewardError: (a `ValueError`, from every call) a server refused the rows, none answered in time, or servers do
            not have the same reward.
    """

    def __init__(
        self,
        url: str | Sequence[str],
        *,
        token: str | None = None,
        timeout: float = 120.0,
        batch_size: int = 32,
        max_connections: int = 4,
    ) -> None:
        urls = [part for part in url.split(",") if part.strip()] if isinstance(url, str) else url
        if isinstance(urls, (list, tuple)) and not urls:
            raise ValueError("a remote reward needs the address of a server, such as http://host:8000")
        urls = checked_texts("url", urls)
        batch_size = checked_int("batch_size", batch_size, 1)
        max_connections = checked_int("max_connections", max_connections, 1, _MOST_CONNECTIONS)
        check_number("timeout", timeout, 1e-3, _LONGEST_SECONDS)
        if token is not None:
            check_text("token", token)
        token = os.environ.get(TOKEN_VARIABLE) if token is None else token
        self.batch_size = batch_size
        self._transport = Transport(urls, token=token, timeout=timeout, max_connections=max_connections)
        self._senders = ThreadPoolExecutor(max_connections * len(urls), thread_name_prefix="remote-reward")
        self._lock = threading.Lock()
        self._info: dict[str, Any] | None = None
        self._config: LatentRewardConfig | None = None
        self.__name__ = "latent_reward"

    def __repr__(self) -> str:
        return f"RemoteReward({', '.join(server.url for server in self._transport.servers)})"

    @property
    def info(self) -> Mapping[str, Any]:
        """The card of the servers' reward: configuration, digest of its weights, what it takes, limits."""
        with self._lock:
            if self._info is None:
                self._info = _checked_card(self._transport.send("GET", "/v1/info"))
            return self._info

    @property
    def config(self) -> LatentRewardConfig:
        """Configuration of the reward."""
        if self._config is None:
            self._config = LatentRewardConfig.from_dict(self.info["config"])
        return self._config

    @property
    def preference_model(self) -> PreferenceModel:
        """The reward's likelihood: from raw scores to the probability of a preference."""
        return self.config.preference_model()

    def weights_digest(self) -> str:
        """Digest of the reward's LoRA and head, the same as that of the reward itself."""
        return str(self.info["weights"])

    def close(self) -> None:
        """Closes connections and threads."""
        self._senders.shutdown(wait=False, cancel_futures=True)
        self._transport.close()

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
        normalize: bool = False,
        batch_size: int | None = None,
    ) -> RewardOutput:
        """Scores clean latents; arguments and errors as for `LatentReward.score`, but for these:

        Args:
            latents: on any device; nothing is differentiable with respect to them.
            seed: with no seed, generator or noise, torch's global random state gives one.
            generator, noise, share_noise_across_levels: noise of a generator, and noise of its own for every level, is drawn
                here and sent, which adds as many bytes per draw as a latent has.
            batch_size: rows per request, instead of the object's own.

        Returns:
            `RewardOutput`: on the device of the latents.
        """
        check_flags(normalize=normalize, share_noise=share_noise, share_noise_across_levels=share_noise_across_levels)
        given = latents
        latents = self._spatial(latents, height, width)
        options = {
            "noise_level": _plain(noise_level),
            "ensemble": ensemble,
            "num_noise_samples": num_noise_samples,
            "share_noise_across_levels": share_noise_across_levels,
            "normalize": normalize,
        }
        source: dict[str, Any] = {"generator": generator, "noise": noise, "share_noise": share_noise}
        if noise is not None:
            source["noise"] = self._spatial_noise(noise, given, height, width)
        if generator is None and noise is None and share_noise_across_levels:
            own = {"seeds": torch.tensor(_signed(_seeds(seed, len(latents), share_noise)), dtype=torch.int64)}
        elif share_noise_across_levels:
            own = {"noise": draw_noise(latents, num_samples=num_noise_samples, seed=seed, **source).movedim(1, 0)}
        else:
            levels = self._noise_process().snap(self.config.noise_level if noise_level is None else noise_level).level
            draws = draw_level_noise(latents, levels.tolist(), num_samples=num_noise_samples, seed=seed, **source)
            own = {"noise": draws.movedim(2, 0)}
        text = _Text(prompts, Conditioning(prompt_embeds, pooled_prompt_embeds, prompt_embeds_mask), len(latents))  # type: ignore[arg-type]
        return _joined(self._send({"latents": latents, **own}, text, options, batch_size), given.device)

    @torch.no_grad()
    @options_of(score)
    def __call__(self, *args: Any, **options: Any) -> Tensor:
        """Scores clean latents: the ``scores`` of `score`, which has the arguments and errors.

        Returns:
            `Tensor`: shape ``(batch,)``, float32, on the device of the latents.
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
        """Scores intermediate states of a sampler; arguments and errors as for `LatentReward.score_noisy`.

        Args:
            scheduler: not taken: states whose scheduler rescales them are scaled before they are sent, with
                `dina_reward.noise.model_states`, and given by their ``noise_level``.

        Returns:
            `Tensor`: shape ``(batch,)``, float32, on the device of the states.
        """
        check_flags(normalize=normalize)
        if scheduler is not None:
            raise ValueError(
                "a scheduler cannot be sent; scale the states with dina_reward.noise.model_states and give `noise_level`"
            )
        if (noise_level is None) == (timesteps is None):
            raise ValueError("give either `noise_level` or `timesteps`, to say how noisy the latents are")
        device, states = noisy_latents.device, self._spatial(noisy_latents, height, width)
        rows = len(states)
        name, given = ("u", noise_level) if noise_level is not None else ("timesteps", timesteps)
        points = torch.as_tensor(given, dtype=torch.float32).cpu().reshape(-1)
        if len(points) not in (1, rows):
            raise ValueError(f"got {len(points)} noise levels for {rows} latents; give one, or one per latent")
        text = _Text(prompts, Conditioning(prompt_embeds, pooled_prompt_embeds, prompt_embeds_mask), rows)  # type: ignore[arg-type]
        tensors = {"noisy_latents": states, name: points.expand(rows)}
        return _joined(self._send(tensors, text, {"normalize": normalize}, batch_size), device).scores

    def preference(
        self, latents_a: Tensor, latents_b: Tensor, prompts: str | Sequence[str] | None = None, **options: Any
    ) -> Tensor:
        """Probability that ``a`` is preferred over ``b``; arguments and errors as for `LatentReward.preference`.

        Returns:
            `Tensor`: shape ``(batch,)``, float32.
        """
        prompts, options = options_for_both_sides(latents_a, latents_b, prompts, options)
        output = self.score(torch.cat([latents_a, latents_b]), prompts, **options)
        scores_a, scores_b = output.scores.chunk(2)
        return self.preference_model.probability(scores_a, scores_b, ensemble_level(output.noise_levels))

    def _noise_process(self) -> NoiseProcess:
        config = self.config
        return get_family(config.family).noise_process(config.scheduler_config)

    def _spatial(self, latents: Tensor, height: int | None, width: int | None) -> Tensor:
        """Latents in the family's spatial layout, checked as the reward itself does."""
        config = self.config
        family = get_family(config.family)
        if isinstance(latents, Tensor):
            latents = family.unpack_latents(latents, config.backbone_config, height=height, width=width)
        check_latents(latents, family, config.backbone_config, getattr(latents, "device", torch.device("cpu")))
        check_size(latents, height, width)
        return latents

    def _spatial_noise(self, noise: Tensor, given: Tensor, height: int | None, width: int | None) -> Tensor:
        """Noise in the layout of the given latents, in that of the spatial ones."""
        if noise.ndim < given.ndim:
            return noise
        lead = noise.shape[: noise.ndim - given.ndim + 1]
        rows = self._spatial(noise.reshape(-1, *noise.shape[len(lead) :]), height, width)
        return rows.reshape(*lead, *rows.shape[1:])

    def _send(
        self, tensors: Mapping[str, Tensor], text: _Text, options: Mapping[str, Any], batch_size: int | None
    ) -> list[Any]:
        """Replies to the requests that the rows fall into, in their order."""
        weights = self.info["weights"]  # a wrong server is found before anything is sent
        step = self.batch_size if batch_size is None else batch_size
        step = checked_int("batch_size", step, 1)
        rows = len(next(iter(tensors.values())))
        bodies = (_body(tensors, text, options, slice(start, start + step)) for start in range(0, rows, step))
        futures = [self._senders.submit(self._transport.send, "POST", "/v2/score", body, _HEADERS) for body in bodies]
        try:
            replies = [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()
        for reply in replies:
            if reply.get("weights") != weights:
                raise RemoteRewardError(
                    f"{self!r} have different rewards, or theirs changed: weights {reply.get('weights')} beside {weights}; "
                    "start all of them with the same --model-path, and make a new RemoteReward"
                )
        return replies


@dataclass(frozen=True)
class _Text:
    """Prompts of the rows as they were given: texts, or embeddings."""

    prompts: str | Sequence[str] | None
    conditioning: Conditioning
    rows: int

    def __post_init__(self) -> None:
        embeds, pooled, mask = (getattr(self.conditioning, name) for name in EMBEDDINGS)
        if (self.prompts is None) == (embeds is None):
            raise ValueError("give either `prompts` or `prompt_embeds`")
        if embeds is None and (pooled is not None or mask is not None):
            raise ValueError("pooled_prompt_embeds and prompt_embeds_mask belong to prompt_embeds; give these too")
        if embeds is not None and len(embeds) not in (1, self.rows):
            raise ValueError(
                f"prompt_embeds have {len(embeds)} rows for {self.rows} latents; give one row per latent, or one for all"
            )

    def of_rows(self, rows: slice) -> tuple[dict[str, Tensor], list[str] | None]:
        """Tensors and texts of some rows, each different prompt once."""
        if self.prompts is not None:
            names = expand_prompts(self.prompts, self.rows)[rows]
            unique = list(dict.fromkeys(names))
            return {"prompt_index": _positions(names, unique)}, unique
        part = self.conditioning if len(self.conditioning) == 1 else self.conditioning[rows]
        part = part.to("cpu")
        names = [content_name(part[row : row + 1]) for row in range(len(part))]
        names = names * len(range(*rows.indices(self.rows))) if len(names) == 1 else names
        unique = list(dict.fromkeys(names))
        kept = part[[names.index(name) for name in unique]] if len(part) > 1 else part
        tensors = {name: getattr(kept, name) for name in EMBEDDINGS if getattr(kept, name) is not None}
        return {**tensors, "prompt_index": _positions(names, unique)}, None


def _positions(names: Sequence[str], unique: Sequence[str]) -> Tensor:
    places = {name: place for place, name in enumerate(unique)}
    return torch.tensor([places[name] for name in names], dtype=torch.int64)


def _body(tensors: Mapping[str, Tensor], text: _Text, options: Mapping[str, Any], rows: slice) -> bytes:
    """One request; large tensors leave their device here, a part at a time."""
    prompts, texts = text.of_rows(rows)
    part = {name: tensor[rows] for name, tensor in tensors.items()} | prompts
    # Copies, since tensors that share memory are not saved.
    part = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in part.items()}
    return save(part, {OPTIONS_KEY: json_text({**options, "prompts": texts})})


def _plain(noise_level: Any) -> Any:
    """Levels as JSON has them."""
    if noise_level is None or isinstance(noise_level, (int, float)):
        return noise_level
    levels = noise_level.tolist() if hasattr(noise_level, "tolist") else list(noise_level)
    return levels if isinstance(levels, float) else [float(level) for level in levels]


def _seeds(seed: Any, rows: int, share_noise: bool) -> list[int]:
    if seed is None:
        seed = int(torch.randint(2**62, (1,), device="cpu"))
    if not share_noise:
        return row_seeds(seed, rows)
    if getattr(seed, "ndim", 0) > 0 or isinstance(seed, Sequence):
        raise ValueError("share_noise=True gives all rows one draw; pass a single integer seed with it")
    return row_seeds(seed, 1) * rows


def _signed(seeds: Sequence[int]) -> list[int]:
    """Seeds of 64 bits as integers with a sign, which stand for the same streams."""
    return [seed - (1 << 64) if seed >= 1 << 63 else seed for seed in seeds]


def _joined(replies: Sequence[Any], device: torch.device) -> RewardOutput:
    try:
        scores = torch.tensor([score for reply in replies for score in reply["scores"]], dtype=torch.float32)
        levels = torch.tensor([row for reply in replies for row in reply["level_scores"]], dtype=torch.float32)
        std = [value for reply in replies for value in reply["noise_std"] or ()]
        first = replies[0]
        return RewardOutput(
            scores=scores.to(device),
            level_scores=levels.to(device),
            noise_std=torch.tensor(std, dtype=torch.float32).to(device) if std else None,
            noise_levels=_level_points(first["noise_levels"], levels).to(device),
            timesteps=_level_points(first["timesteps"], levels).to(device),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise RemoteRewardError(f"a reply holds no scores of protocol version 2 ({error})") from error


def _level_points(points: Sequence[float], level_scores: Tensor) -> Tensor:
    """One point per level; rows that share a single level all say it."""
    return torch.tensor(points, dtype=torch.float32)[: level_scores.shape[1]]


def _checked_card(card: Any) -> dict[str, Any]:
    if not isinstance(card, dict) or 2 not in card.get("protocol_versions", ()):
        raise RemoteRewardError("the server does not speak protocol version 2; start it with `dina-reward serve`")
    return card


def remote_urls(path: str) -> Iterator[str]:
    """Addresses in what may also be a path or hub id of a checkpoint: all of them, or none."""
    parts = [part.strip() for part in path.split(",")]
    if all(part.startswith(("http://", "https://")) for part in parts):
        yield from parts
