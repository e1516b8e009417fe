"""Better samples without training: search, steering and guidance at inference, judged by rewards that read noisy states.

On the samplers, families and rewards of `dina_reward.alignment`; nothing is trained here. Begin at `api.search`, then
`run.SearchRun`, of whose moves every method is made, and `best_of_n.Halving`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dina_reward.lazy import lazy_exports


if TYPE_CHECKING:
    from dina_reward.search.api import search
    from dina_reward.search.best_of_n import BestOfN, Halving
    from dina_reward.search.callback import SearchCallback
    from dina_reward.search.distillation import SearchDistillationConfig, SearchDistillationTrainer
    from dina_reward.search.gradient import Guidance, NoiseOptimization
    from dina_reward.search.method import SearchMethod
    from dina_reward.search.noise_search import PathSearch, ZeroOrder
    from dina_reward.search.pairs import SearchPair
    from dina_reward.search.report import result_grid, write_page
    from dina_reward.search.result import SearchResult
    from dina_reward.search.steering import FKSteering
    from dina_reward.search.stepwise import Stepwise

__getattr__, __dir__, __all__ = lazy_exports(__name__)
