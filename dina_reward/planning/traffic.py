"""Bytes that a rank sends to the others in an iteration: gradients, gathered weights, scores; and to a scoring server."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends in an iteration, with ring algorithms.

    Args:
        gradients: all-reduced (DDP) or reduce-scattered (FSDP2), once per optimizer step.
        weights: slices of the denoiser, gathered block by block for every pass (FSDP2).
        scores: rewards and row numbers of the generation batch, gathered on all ranks.
        server: latents to a scoring server, in their own dtype.
    """

    gradients: int
    weights: int
    scores: int
    server: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.gradients + self.weights + self.scores + self.server


def all_reduce_bytes(payload: int, ranks: int) -> int:
    """Bytes that one of so many ranks sends in a ring all-reduce: ``2 (n - 1) / n`` of the payload."""
    return 2 * (ranks - 1) * payload // ranks


def gather_bytes(payload: int, ranks: int) -> int:
    """Bytes that one rank sends where ``payload`` is gathered on all, or reduced and scattered: ``(n - 1) / n`` of it."""
    return (ranks - 1) * payload // ranks


def traffic_of(
    *,
    ranks: int,
    sharded: bool,
    trained: int,
    optimizer_steps: float,
    denoiser_bytes: int,
    passes: float,
    backward_passes: float,
    samples: int,
    reward_functions: int,
    server_bytes: int,
) -> Traffic:
    """Bytes that a rank sends in an iteration.

    Args:
        ranks: how many.
        sharded: FSDP2 rather than DDP.
        trained: parameters with float32 gradients.
        optimizer_steps: per iteration; gradients are summed on each rank until then.
        denoiser_bytes: of the whole denoiser.
        passes: forward passes of the denoiser on one rank, in micro-batches.
        backward_passes: backward passes, for which weights are gathered again.
        samples: of the generation batch over all ranks.
        reward_functions: scores per sample.
        server_bytes: what one rank sends to a scoring server.
    """
    gradients = 4 * trained
    once = gather_bytes(gradients, ranks) if sharded else all_reduce_bytes(gradients, ranks)
    gathered = gather_bytes(denoiser_bytes, ranks) if sharded else 0
    return Traffic(
        gradients=int(optimizer_steps * once),
        weights=int((passes + backward_passes) * gathered),
        scores=gather_bytes(samples * (8 + 4 * reward_functions), ranks),
        server=server_bytes,
    )
