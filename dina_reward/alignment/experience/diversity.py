"""How far apart the members of a group are, so that a collapse of the policy shows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def diversity(latents: Tensor, group_index: Sequence[int] | Tensor) -> float:
    """Mean distance between the members of a group, ``mean_{i<j} sqrt(mean_k (x_ik - x_jk)^2 / 2)``, averaged over groups.

    Independent noise of unit variance gives 1, equal latents give 0. Falls when the policy collapses.

    Args:
        latents (`Tensor`): final latents, shape ``(batch, ...)``.
        group_index: group of each latent, ``batch`` integers.

    Returns:
        NaN if no group has two members.

    Raises:
        ValueError: another number of group indices than of latents.
    """
    index = torch.as_tensor(group_index, device=latents.device)
    if index.shape != latents.shape[:1]:
        raise ValueError(f"group_index has shape {tuple(index.shape)} for {latents.shape[0]} latents; give one each")
    flat = latents.detach().float().flatten(start_dim=1)
    means = []
    for group in index.unique():
        members = flat[index == group]
        if len(members) > 1:
            # Distances by matrix products lose the small ones, which are those that matter.
            distances = torch.cdist(members, members, compute_mode="donot_use_mm_for_euclid_dist")
            pairs = len(members) * (len(members) - 1)
            means.append(distances.sum() / (pairs * math.sqrt(2 * flat.shape[1])))
    return float(torch.stack(means).mean()) if means else math.nan
