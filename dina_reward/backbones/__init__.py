"""Where a reward's backbone comes from: a generator in memory, whose weights it copies or shares, or weights on disk.

What is particular to one model is its family's, and nothing here trains or scores. Begin at `attach.attach_backbone`;
`structures` and `cards` say what published models are and what a reward on them costs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dina_reward.lazy import lazy_exports


if TYPE_CHECKING:
    from dina_reward.backbones.attach import AttachedBackbone, BackboneSource, attach_backbone
    from dina_reward.backbones.cards import BackboneCard, card_of
    from dina_reward.backbones.sharing import SharedBackboneError
    from dina_reward.backbones.structures import ModelStructure, published_models

_MODULES = {
    "AttachedBackbone": "attach",
    "BackboneCard": "cards",
    "BackboneSource": "attach",
    "ModelStructure": "structures",
    "SharedBackboneError": "sharing",
    "attach_backbone": "attach",
    "card_of": "cards",
    "published_models": "structures",
}

__all__ = [
    "AttachedBackbone",
    "BackboneCard",
    "BackboneSource",
    "ModelStructure",
    "SharedBackboneError",
    "attach_backbone",
    "card_of",
    "published_models",
]

__getattr__, __dir__ = lazy_exports(__name__, _MODULES)
