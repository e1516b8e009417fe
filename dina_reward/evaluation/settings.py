"""What a reward is asked: noise levels one by one, ensembles of levels, and how many noise draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dina_reward.modeling.scoring import Ensemble


@dataclass(frozen=True)
class Setting:
    """One column of an evaluation.

    Args:
        levels: noise levels; one is a single level, several an ensemble, none a function that takes no noise.
        draws: noise draws whose scores are averaged.
        ensemble: how several levels are combined, see `LatentReward.score`.
    """

    levels: tuple[float, ...] = ()
    draws: int = 1
    ensemble: Ensemble = "tokens"

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise ValueError(f"draws must be at least 1, got {self.draws}")
        if len(set(self.levels)) != len(self.levels):
            raise ValueError(f"an ensemble repeats a noise level: {self.levels}")
        bad = [level for level in self.levels if not 0 <= level <= 1]
        if bad:
            raise ValueError(f"noise levels must lie in [0, 1], got {bad}")
        if self.ensemble not in ("tokens", "mean"):
            raise ValueError(f"ensemble must be 'tokens' or 'mean', got {self.ensemble!r}")

    @property
    def name(self) -> str:
        """For tables and JSON: ``"0.4"``, ``"0.4 x4"`` (draws), ``"0.2+0.5+0.7 tokens"``, ``"score"`` without noise."""
        return self.levels_name + (f" x{self.draws}" if self.draws > 1 else "")

    @property
    def levels_name(self) -> str:
        """The name without the draws."""
        if not self.levels:
            return "score"
        kind = f" {self.ensemble}" if self.is_ensemble else ""
        return "+".join(f"{level:g}" for level in self.levels) + kind

    @property
    def is_ensemble(self) -> bool:
        """Whether several levels are combined."""
        return len(self.levels) > 1


def evaluation_settings(
    levels: Sequence[float] = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8),
    ensembles: Sequence[Sequence[float]] = ((0.2, 0.5, 0.7),),
    *,
    kinds: Sequence[Ensemble] = ("tokens",),
    draws: Sequence[int] = (1,),
) -> tuple[Setting, ...]:
    """Every level and every ensemble of every kind, each with every number of draws.

    Args:
        levels: single levels; the defaults are those of the published benchmark.
        ensembles: lists of levels.
        kinds: how ensembles are combined.
        draws: numbers of noise draws.

    Raises:
        ValueError: nothing to evaluate, an ensemble of less than two levels, or unusable levels or draws.
    """
    short = [list(ensemble) for ensemble in ensembles if len(ensemble) < 2]
    if short:
        raise ValueError(f"an ensemble needs at least two levels, got {short}; single levels go into `levels`")
    wanted = [Setting((level,), count) for count in draws for level in levels]
    wanted += [Setting(tuple(group), count, kind) for count in draws for kind in kinds for group in ensembles]
    settings = tuple(dict.fromkeys(wanted))
    if not settings:
        raise ValueError("nothing to evaluate: give levels, ensembles or both, and at least one number of draws")
    return settings
