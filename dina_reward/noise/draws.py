"""Standard normal draws for scoring: explicit, reproducible, independent of how a batch is split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any, SupportsIndex, cast

import numpy as np
import torch
from torch import Tensor

from dina_reward.checks.tensors import check_numbers
from dina_reward.checks.values import checked_int, integer


_LEVEL_STREAM = 1
_MOST_SAMPLES = 65_536


def draw_noise(
    latents: Tensor,
    *,
    num_samples: int = 1,
    seed: SupportsIndex | Sequence[SupportsIndex] | Tensor | None = None,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
    share_noise: bool = False,
) -> Tensor:
    """Noise for a batch of latents.

    With an integer ``seed``, row ``i`` has a stream of its own that depends on the seed and ``i`` alone. With a
    sequence of seeds, row ``i`` depends on ``seed[i]`` alone, so that rows keep their noise in any batch; a single row
    has the same noise for ``s`` and ``[s]``. Seeded draws are made on the CPU and are the same on every device.

    Args:
        latents: clean latents, shape ``(batch, ...)``.
        num_samples: draws per latent.
        seed: one seed, or one per row.
        generator: used instead of a seed; advances with every call.
        noise: the noise itself, shape ``(batch, ...)``, ``(1, ...)`` or ``(num_samples, batch, ...)``.
        share_noise: give every row the same draws (common random numbers).

    Returns:
        `Tensor`: shape ``(num_samples, batch, ...)``, float32, on the device of ``latents``.

    Raises:
        ValueError: several sources of noise at once, latents that are no floating-point tensor, or shapes that do not fit.
    """
    if sum(source is not None for source in (seed, generator, noise)) > 1:
        raise ValueError("give only one of `seed`, `generator` and `noise`")
    check_numbers("latents", latents, floating=True)
    if latents.ndim == 0:
        raise ValueError("latents must have a batch dimension, got a scalar")
    num_samples = checked_int("num_noise_samples", num_samples, 1, _MOST_SAMPLES)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ValueError(
            f"generator must be a torch.Generator, got {type(generator).__name__}; pass integers as `seed`"
        )
    if noise is not None:
        if share_noise:
            raise ValueError("share_noise=True has no effect on `noise` that is given; give one row of it instead")
        return _given_noise(noise, latents, num_samples)
    batch, shape = latents.shape[0], tuple(latents.shape[1:])
    rows = 1 if share_noise else batch
    if seed is None:
        device = latents.device if generator is None else generator.device
        drawn = torch.randn((num_samples, rows, *shape), generator=generator, device=device, dtype=torch.float32)
    else:
        if share_noise and np.ndim(cast(Any, seed)) > 0:
            raise ValueError("share_noise=True gives all rows one draw; pass a single integer seed with it")
        seeds = row_seeds(seed, rows)
        streams = (torch.Generator("cpu").manual_seed(row_seed) for row_seed in seeds)
        drawn = torch.stack([_samples(shape, num_samples, stream) for stream in streams], dim=1)
    return drawn.to(latents.device).expand(num_samples, batch, *shape)


def draw_level_noise(
    latents: Tensor,
    noise_levels: Sequence[float],
    *,
    num_samples: int = 1,
    seed: SupportsIndex | Sequence[SupportsIndex] | Tensor | None = None,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
    share_noise: bool = False,
) -> Tensor:
    """Noise of its own for each level of an ensemble.

    A seeded draw depends on the row's seed and the level, not on the other levels of the ensemble.

    Args:
        latents, num_samples, seed, generator, share_noise: as for `draw_noise`.
        noise_levels: the levels.
        noise: the noise itself, shape ``(levels, num_samples, batch, ...)``.

    Returns:
        `Tensor`: shape ``(levels, num_samples, batch, ...)``, float32, on the device of ``latents``.

    Raises:
        ValueError: as for `draw_noise`.
    """
    if noise is not None:
        check_noise(noise)
    if noise is not None and (noise.ndim != latents.ndim + 2 or noise.shape[0] != len(noise_levels)):
        raise ValueError(
            f"noise has shape {tuple(noise.shape)}; with share_noise_across_levels=False expected "
            f"{(len(noise_levels), num_samples, *latents.shape)}: levels, draws, then the shape of the latents"
        )
    return torch.stack(
        [
            draw_noise(
                latents,
                num_samples=num_samples,
                seed=_level_seed(seed, level),
                generator=generator,
                noise=None if noise is None else noise[place],
                share_noise=share_noise,
            )
            for place, level in enumerate(noise_levels)
        ]
    )


def fold_seed(*parts: int) -> int:
    """One 63-bit seed from several integers; different parts give unrelated seeds."""
    # SeedSequence ignores trailing zeros, hence the length.
    (word,) = np.random.SeedSequence([len(parts), *(part % 2**64 for part in parts)]).generate_state(1, np.uint64)
    return int(word >> np.uint64(1))


def _level_seed(seed: SupportsIndex | Sequence[SupportsIndex] | Tensor | None, level: float) -> int | list[int] | None:
    if seed is None:
        return None
    number, seeds = round(level * 1e6), checked_seeds(seed)
    if isinstance(seeds, int):
        return fold_seed(seeds, number, _LEVEL_STREAM)
    return [fold_seed(each, number, _LEVEL_STREAM) for each in seeds]


def _samples(shape: tuple[int, ...], num_samples: int, stream: torch.Generator) -> Tensor:
    # One call per sample: torch fills large and small tensors in different orders.
    # Dtype and device by name, so that torch's global defaults change nothing.
    draws = [torch.randn(shape, generator=stream, device="cpu", dtype=torch.float32) for _ in range(num_samples)]
    return torch.stack(draws)


def row_seeds(seed: SupportsIndex | Sequence[SupportsIndex] | Tensor, batch: int) -> list[int]:
    """The seed of every row's own stream: as given, or derived from an integer, which is that of the first row.

    Args:
        seed: an integer of any kind (also a 0-d array or tensor of integers), or one for each row.

    Raises:
        ValueError: another number of seeds than rows, or seeds that are no integers.
    """
    seeds = checked_seeds(seed)
    if isinstance(seeds, int):
        return [seeds, *(fold_seed(seeds, row) for row in range(1, batch))][:batch]
    if len(seeds) != batch:
        raise ValueError(f"got {len(seeds)} seeds for {batch} latents; pass one integer or one seed per latent")
    return seeds


def checked_seeds(seed: SupportsIndex | Sequence[SupportsIndex] | Tensor) -> int | list[int]:
    """One seed or several, as plain integers.

    Raises:
        ValueError: something else; sets, mappings and text have no numbers in an order of their own.
    """
    if isinstance(seed, (str, bytes, Set, Mapping, type)):
        raise ValueError(f"seed must be an integer or a sequence of integers, got {type(seed).__name__} {seed!r}")
    if isinstance(seed, Sequence) or np.ndim(cast(Any, seed)) > 0:
        return [checked_seed(value) for value in cast("Sequence[Any]", seed)]
    return checked_seed(seed)


def checked_seed(value: Any) -> int:
    """One seed, an integer of any kind; fractions are not cut.

    Raises:
        ValueError: something else, or more than 64 bits.
    """
    try:
        number = integer(value)
    except TypeError:
        raise ValueError(f"seeds must be integers, got {value!r}; fractions are not cut") from None
    if not -(2**63) <= number < 2**64:
        raise ValueError(f"seeds have 64 bits, got {number}")
    return number


def check_noise(noise: Any) -> None:
    """Refuses noise that is no tensor of finite floating-point numbers.

    Raises:
        ValueError: with the fault.
    """
    check_numbers("noise", noise, floating=True)
    if not bool(torch.isfinite(noise).all()):
        raise ValueError("noise holds NaN or infinite values")


def _given_noise(noise: Tensor, latents: Tensor, num_samples: int) -> Tensor:
    check_noise(noise)
    if num_samples > 1 and (noise.ndim == latents.ndim or len(noise) == 1):
        raise ValueError(
            f"num_noise_samples={num_samples}, but the given noise has one draw, which would be scored so often; give noise "
            f"of shape {(num_samples, *latents.shape)}"
        )
    target = (num_samples, *latents.shape)
    if noise.ndim == latents.ndim:
        noise = noise.unsqueeze(0)
    broadcastable = noise.ndim == len(target) and all(
        have in (want, 1) if axis < 2 else have == want
        for axis, (have, want) in enumerate(zip(noise.shape, target, strict=False))
    )
    if not broadcastable:
        raise ValueError(
            f"noise has shape {tuple(noise.shape)}; expected {tuple(latents.shape)}, one row of it, or "
            f"{target} for num_noise_samples={num_samples}"
        )
    if noise.device != latents.device:
        raise ValueError(f"noise is on {noise.device} but latents are on {latents.device}")
    return noise.float().expand(target)
