"""What a labelling is asked for, what it will draw, and what it came to."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dina_reward.checks.values import check_fields
from dina_reward.data.cache_manifest import read_manifest
from dina_reward.distill.soft_labels import JudgeScale


@dataclass(frozen=True)
class LabelSettings:
    """What is judged, and how answers become labels.

    Args:
        group_size: samples of each prompt that are judged; all pairs of them become preferences.
        candidates: samples of each prompt that are drawn, of which the informative ones are judged. Without a reward that
            says which those are, ``group_size`` of them are drawn.
        exploration: share of prompts whose samples are judged at random, whatever the reward thinks of them.
        repeat_share: questions asked twice, by which temperatures and slips are fitted, over those asked once.
        temperature: of labels from score gaps, in the judge's units; fitted by default.
        tie_margin: score gaps up to this are ties, ``p = 1/2``.
        noise_draws: of the reward, to see its uncertainty.
        samples_per_shard: latents of one file.
    """

    group_size: int = 4
    candidates: int = 8
    exploration: float = 0.25
    repeat_share: float = 0.1
    temperature: float | None = None
    tie_margin: float = 0.0
    noise_draws: int = 4
    samples_per_shard: int = 64

    def __post_init__(self) -> None:
        check_fields(
            self,
            group_size=(2, 1000),
            candidates=(2, 1000),
            exploration=(0, 1),
            repeat_share=(0, 1),
            temperature=(1e-12, math.inf),
            tie_margin=(0, math.inf),
            noise_draws=(2, 1000),
            samples_per_shard=(1, 1_000_000),
        )
        if self.candidates < self.group_size:
            raise ValueError(
                f"candidates is {self.candidates}, below group_size {self.group_size}, so none are left out"
            )


@dataclass(frozen=True)
class LabelReport:
    """What a labelling came to.

    Args:
        samples: latents that were drawn.
        judged: of them, how many some judge has scored or compared.
        pairs: preferences.
        ties: of them, pairs of probability 1/2.
        groups: prompts with samples, one prompt counted once for each group.
        calls: judged samples and pairs, all judges together.
        cost: what they cost.
        seconds: that the judges took, decoding for them included.
        decoded: latents that were decoded.
        scales: what is known of each judge's answers.
    """

    samples: int
    judged: int
    pairs: int
    ties: int
    groups: int
    calls: int
    cost: float
    seconds: float
    decoded: int
    scales: dict[str, JudgeScale] = field(default_factory=dict)

    @classmethod
    def read(cls, directory: str | Path) -> LabelReport:
        """The report of a finished labelling.

        Raises:
            ValueError: there is none.
        """
        manifest = read_manifest(Path(directory))
        values = dict(manifest.get("report") or {})
        if not manifest["complete"] or "scales" not in values:
            raise ValueError(f"{directory} holds no finished labels of a judge")
        scales = {name: JudgeScale.from_json(scale) for name, scale in values.pop("scales").items()}
        return cls(scales=scales, **values)

    def to_json(self) -> dict[str, Any]:
        """As JSON has it, NaN as null."""
        values = asdict(self)
        for scale in values["scales"].values():
            scale["agreement"] = None if math.isnan(scale["agreement"]) else scale["agreement"]
        return values

    def __str__(self) -> str:
        lines = [
            f"{self.calls:,} judgements of {self.judged:,} of {self.samples:,} samples made {self.pairs:,} pairs "
            f"({self.ties:,} ties) in {self.groups:,} groups; {self.seconds:.1f} s of judging, cost {self.cost:g}"
        ]
        for name, scale in self.scales.items():
            said = (
                f"agrees with itself in {100 * scale.agreement:.1f} %" if scale.repeats else "was asked nothing twice"
            )
            lines.append(f"{name}: {said} of {scale.repeats} repeats; temperature {scale.temperature:.4g}")
        return "\n".join(lines)


@dataclass(frozen=True)
class LabelPlan:
    """The samples of a labelling: group by group, ``members`` each.

    Args:
        prompts, seeds: one per sample.
        members: samples of a group.
        groups: groups.
        repeats: of them, the first ones, whose questions are asked twice.
        seed: of the labelling.
    """

    prompts: list[str]
    seeds: list[int]
    members: int
    groups: int
    repeats: int
    seed: int

    def candidates(self) -> list[list[int]]:
        """Samples of each group."""
        return [list(range(start, start + self.members)) for start in range(0, len(self.prompts), self.members)]
