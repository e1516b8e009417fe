"""Model families: one file per kind of generator."""

from dina_reward.families import sd3 as _sd3  # noqa: F401  (registers the family)
from dina_reward.families import stable_diffusion as _stable_diffusion  # noqa: F401
from dina_reward.families.base import (
    Backbone,
    Conditioning,
    FeatureSizes,
    ModelFamily,
    TapFeatures,
    families,
    family_of,
    get_family,
    register_family,
)


__all__ = [
    "Backbone",
    "Conditioning",
    "FeatureSizes",
    "ModelFamily",
    "TapFeatures",
    "families",
    "family_of",
    "get_family",
    "register_family",
]
