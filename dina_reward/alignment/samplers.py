"""Where `build_sampler` was before sampling had a package of its own; nothing else lives here. See `sampling.samplers`."""

from dina_reward.alignment.sampling.samplers import build_sampler


__all__ = ["build_sampler"]
