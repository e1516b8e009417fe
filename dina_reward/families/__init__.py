"""Model families: one file per kind of generator, with everything that is particular to it and nothing else.

Every module in this directory is imported, so a new file is enough; families of other packages are found by their entry
points of the group ``dina_reward.families``. Begin at `base.ModelFamily` and README.md.
"""

import importlib
import pkgutil
from importlib.metadata import entry_points

from dina_reward.families.backbone import Backbone
from dina_reward.families.base import ModelFamily, RewardDefaults
from dina_reward.families.conditioning import Conditioning, FeatureSizes, TapFeatures
from dina_reward.families.registry import families, family_of, family_of_class, get_family, register_family


for _module in sorted(module.name for module in pkgutil.iter_modules(__path__)):
    importlib.import_module(f"{__name__}.{_module}")

__all__ = [
    "Backbone",
    "Conditioning",
    "FeatureSizes",
    "ModelFamily",
    "RewardDefaults",
    "TapFeatures",
    "families",
    "family_of",
    "family_of_class",
    "get_family",
    "register_family",
]

# Last, because these modules import from this one.
for _entry_point in entry_points(group="dina_reward.families"):
    _entry_point.load()
