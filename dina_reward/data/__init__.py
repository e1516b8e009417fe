"""Preference data: the record, its collator, and datasets in memory and on disk."""

from dina_reward.data.records import PreferenceBatch, PreferencePair, collate_preferences
from dina_reward.data.storage import LatentPreferenceDataset, load_preferences, preference_rows


__all__ = [
    "LatentPreferenceDataset",
    "PreferenceBatch",
    "PreferencePair",
    "collate_preferences",
    "load_preferences",
    "preference_rows",
]
