"""Preference data: the record, its collator, datasets, readers of published schemas, and the latent cache.

No reward is known here: images become latents and rows become batches, nothing is scored. Begin at `preference.Preference`
and `readers.read_preferences`; the cache, `cache.build_cache`, loads on first use.
"""

from typing import TYPE_CHECKING

from dina_reward.lazy import lazy_exports


if TYPE_CHECKING:
    from dina_reward.data.broken import BrokenRowError, BrokenRows
    from dina_reward.data.buckets import Bucket, BucketRule
    from dina_reward.data.cache import CacheReport, build_cache
    from dina_reward.data.cache_manifest import CacheSettings
    from dina_reward.data.cache_writer import LatentCacheWriter, LatentPair
    from dina_reward.data.cached import CachedPreferences
    from dina_reward.data.latent_rows import LatentRows
    from dina_reward.data.preference import Preference
    from dina_reward.data.readers import PreferenceReader, read_preferences
    from dina_reward.data.records import PreferenceBatch, PreferencePair, collate_preferences
    from dina_reward.data.sampler import BucketBatchSampler, bucketed_loader
    from dina_reward.data.storage import LatentPreferenceDataset, load_preferences, preference_rows

__getattr__, __dir__, __all__ = lazy_exports(__name__)
