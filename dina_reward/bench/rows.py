"""One measured row, and the rows there are: scores, what pixels would cost, training steps, denoiser calls."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dina_reward.bench.machine import Machine, durations, spread
from dina_reward.bench.subject import Subject
from dina_reward.evaluation.cost import peak_memory, reset_peak_memory
from dina_reward.likelihood import PreferenceLoss
from dina_reward.reward import LatentReward


LEVELS = (0.2, 0.4, 0.6)
POLICY_LORA_RANK = 32
TOWER: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "patch_size": 14,
}
"""The image tower of CLIP-H, on which PickScore and HPSv2 stand."""

SCORE, DECODE, TRAIN, CALL, GRADIENT = (
    "score",
    "decode by the VAE",
    "reward training step, pairs",
    "denoiser call",
    "denoiser call with gradient",
)
IMAGE_TOWER = "CLIP-H image tower"


@dataclass(frozen=True)
class Row:
    """One thing measured.

    Args:
        what: what ran: one of the names above.
        mode: ``"standalone"`` or ``"shared"`` for rewards, else empty.
        compiled: whether through `torch.compile`.
        batch: samples (pairs, for a training step) per call.
        levels: noise levels of a score.
        seconds: median of the calls.
        spread: half the distance between their quartiles; ``None`` where there were fewer than three.
        samples_per_second: ``batch / seconds``.
        flops: of one call, counted; a multiply-add is two.
        rate_share: FLOP/s attained over the machine's own rate of matrix products.
        roof_share: FLOP/s attained over what the roofline allows, with every weight read once per call.
        peak_memory: bytes, with the weights.
    """

    what: str
    mode: str
    compiled: bool
    batch: int
    levels: int
    seconds: float
    spread: float | None
    samples_per_second: float
    flops: int
    rate_share: float
    roof_share: float
    peak_memory: int

    @property
    def name(self) -> str:
        """For tables and pictures."""
        return _name(self)


@dataclass(frozen=True)
class Work:
    """What a row calls again and again.

    Args:
        run: the call.
        modules: whose weights it reads.
        flops: of one call.
    """

    run: Callable[[], Any]
    modules: Sequence[nn.Module]
    flops: int


@dataclass(frozen=True)
class Case:
    """A row to come; ``prepare`` makes its `Work`, and nothing of it outlives the measurement."""

    what: str
    batch: int
    prepare: Callable[[], Work]
    mode: str = ""
    compiled: bool = False
    levels: int = 1

    @property
    def name(self) -> str:
        """That of the row."""
        return _name(self)

    def measure(self, machine: Machine, device: torch.device, seconds: float, slow_once: bool = False) -> Row:
        """Counts, times and forgets; ``slow_once`` as for `durations`."""
        reset_peak_memory()
        work = self.prepare()
        times = durations(work.run, device, seconds, slow_once=slow_once)
        median = statistics.median(times)
        read = sum(p.numel() * p.element_size() for module in work.modules for p in module.parameters())
        row = Row(
            what=self.what,
            mode=self.mode,
            compiled=self.compiled,
            batch=self.batch,
            levels=self.levels,
            seconds=median,
            spread=spread(times),
            samples_per_second=self.batch / median,
            flops=work.flops,
            rate_share=work.flops / median / machine.matrix_rate,
            roof_share=work.flops / median / machine.attainable(work.flops, read),
            peak_memory=peak_memory()[0],
        )
        del work
        if self.compiled:
            torch.compiler.reset()
        gc.collect()
        return row


def _name(row: Row | Case) -> str:
    details = (row.mode, f"K = {row.levels}" if row.levels > 1 else "", "compiled" if row.compiled else "")
    return ", ".join([row.what, *filter(None, details), f"batch {row.batch}"])


def counted_flops(run: Callable[[], Any]) -> int:
    """FLOPs of matrix products, attention and convolutions, those of a backward pass included."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def score_cases(
    subject: Subject, batch_sizes: Sequence[int], *, levels: Sequence[int] = (1, 3), compiled: bool = True
) -> Iterator[Case]:
    """Scores with weights of their own (LoRA merged) and on the generator's, by levels, eager and compiled."""
    for mode in ("standalone", "shared"):
        for eager in (True, False) if compiled else (True,):
            for count in levels:
                for batch in batch_sizes:
                    prepare = partial(_score, subject, mode == "shared", batch, count, not eager)
                    yield Case(SCORE, batch, prepare, mode, not eager, count)


def _score(subject: Subject, shared: bool, batch: int, count: int, compiled: bool) -> Work:
    reward, latents, text = subject.reward(shared), subject.latents(batch), subject.conditioning(batch)
    embeds: dict[str, Any] = {
        "prompt_embeds": text.prompt_embeds,
        "pooled_prompt_embeds": text.pooled_prompt_embeds,
        "prompt_embeds_mask": text.prompt_embeds_mask,
    }

    def run() -> Tensor:
        return reward(latents, **embeds, noise_level=LEVELS[:count], seed=0)

    flops = counted_flops(run)
    if compiled:
        reward.compile(dynamic=False)
    return Work(run, [reward.model], flops)


def pixel_cases(subject: Subject, batch_sizes: Sequence[int]) -> Iterator[Case]:
    """What a reward on pixels has to do for each sample: decode the latent, then look at the image."""
    for batch in batch_sizes:
        yield Case(DECODE, batch, partial(_decode, subject, batch))
    for batch in batch_sizes:
        yield Case(IMAGE_TOWER, batch, partial(_tower, subject, batch))


def _decode(subject: Subject, batch: int) -> Work:
    latents = subject.latents(batch)

    @torch.no_grad()
    def run() -> Tensor:
        return subject.family.decode_latents(subject.pipeline, latents)

    return Work(run, [subject.pipeline.vae.decoder], counted_flops(run))


def _tower(subject: Subject, batch: int) -> Work:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    with torch.device("meta"):
        tower = CLIPVisionModel(CLIPVisionConfig(**TOWER)).eval().requires_grad_(False)
        flops = counted_flops(lambda: tower(pixel_values=torch.empty(batch, 3, 224, 224)))
    # Which values they are decides nothing, and drawing normal ones for 630 million weights takes longer than a call.
    tower = tower.to(subject.dtype).to_empty(device=subject.device)
    for parameter in tower.parameters():
        parameter.fill_(0.01)
    for positions in tower.buffers():  # the numbers of the patches, its only buffer
        positions.copy_(torch.arange(positions.numel()).view_as(positions))
    images = torch.randn(batch, 3, 224, 224, device=subject.device).to(subject.dtype)

    def run() -> Any:
        with torch.no_grad():
            return tower(pixel_values=images)

    return Work(run, [tower], flops)


def training_cases(subject: Subject, batch_sizes: Sequence[int]) -> Iterator[Case]:
    """Steps of reward training: both sides of each pair forward and backward, and the optimizer."""
    for batch in batch_sizes:
        yield Case(TRAIN, batch, partial(_training_step, subject, batch), "standalone")


def _training_step(subject: Subject, pairs: int) -> Work:
    reward = LatentReward.from_config(subject.reward_config, pipeline=subject.pipeline).train()
    loss_of = PreferenceLoss()
    trained = [p for p in reward.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    point = reward.noise_process.snap(0.4)
    latents, text = subject.latents(2 * pairs), subject.conditioning(pairs)
    index = torch.arange(pairs, device=subject.device).repeat(2)
    timestep = point.timestep.to(subject.device).expand(2 * pairs)

    def run() -> None:
        with torch.autocast(subject.device.type, torch.bfloat16, enabled=subject.dtype is torch.bfloat16):
            scores = reward.model(latents, timestep, text, index)
        chosen, rejected = scores.float().chunk(2)
        loss_of(chosen, rejected, point.level.to(subject.device).expand(pairs)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Work(run, [reward.model], counted_flops(run))


def denoiser_cases(subject: Subject, batch_sizes: Sequence[int]) -> Iterator[Case]:
    """Calls of the generator: one sampler step, and one loss of its LoRA with the backward pass."""
    for batch in batch_sizes:
        yield Case(CALL, batch, partial(_call, subject, batch))
    for batch in batch_sizes:
        yield Case(GRADIENT, batch, partial(_gradient, subject, batch))


def _velocity(subject: Subject, batch: int) -> Callable[[], Tensor]:
    latents, text = subject.latents(batch), subject.conditioning(batch)
    timestep = torch.full((batch,), 500.0, device=subject.device)
    return partial(subject.family.predict_velocity, subject.denoiser, latents, timestep, text, guidance_scale=1.0)


def _call(subject: Subject, batch: int) -> Work:
    run = torch.no_grad()(_velocity(subject, batch))
    return Work(run, [subject.denoiser], counted_flops(run))


def _gradient(subject: Subject, batch: int) -> Work:
    predict, denoiser = _velocity(subject, batch), subject.denoiser
    if not _has_lora(denoiser):
        targets = list(subject.family.policy_lora_targets)
        denoiser.add_adapter(LoraConfig(r=POLICY_LORA_RANK, target_modules=targets))  # type: ignore[operator]

    def run() -> None:
        predict().float().square().mean().backward()

    return Work(run, [denoiser], counted_flops(run))


@contextmanager
def without_new_lora(subject: Subject) -> Iterator[None]:
    """Takes the LoRA of `denoiser_cases` out of the generator again."""
    had = _has_lora(subject.denoiser)
    yield
    if not had and _has_lora(subject.denoiser):
        subject.denoiser.unload_lora()  # type: ignore[operator]


def _has_lora(denoiser: nn.Module) -> bool:
    return bool(getattr(denoiser, "peft_config", None))
