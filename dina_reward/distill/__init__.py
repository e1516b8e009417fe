"""From a judge to a latent reward: samples, judgements, labels; and a reward that is kept true while a policy moves.

No judge is defined here beyond adapters, and rewards are trained by `dina_reward.training`. Begin at
`labeller.JudgeLabeller`, then `refresh.RewardRefresh`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dina_reward.lazy import lazy_exports


if TYPE_CHECKING:
    from dina_reward.distill.drift import DriftSettings
    from dina_reward.distill.judges import CallableJudge, Judge, JudgeBatch, JudgeError
    from dina_reward.distill.labeller import JudgeLabeller
    from dina_reward.distill.labels import LabelReport, LabelSettings
    from dina_reward.distill.ledger import JudgeLimits
    from dina_reward.distill.naming import open_judge, open_judges
    from dina_reward.distill.refresh import RewardRefresh
    from dina_reward.distill.refresh_settings import RefreshRecord, RefreshSettings
    from dina_reward.distill.remote import CommandJudge, EndpointJudge
    from dina_reward.distill.sources import PipelineSource, PolicySource, SampleSource
    from dina_reward.distill.vision import VisionEndpointJudge

__getattr__, __dir__, __all__ = lazy_exports(__name__)
