"""Preferences between image files, as people publish them: read them, make latents of them once, evaluate rewards on them.

    python examples/07_from_images_to_an_evaluation.py

The embedded world renders the images: for each caption one that fits, and one of another scene. The JSON file has the
columns of HPDv3; nine other published schemas are read the same way. In a shell: `dina-reward cache` and `dina-reward eval`.
"""

import json
from pathlib import Path

import torch
from PIL import Image

from dina_reward.data import BucketRule, CachedPreferences, CacheSettings, build_cache, read_preferences
from dina_reward.evaluation import (
    CallableScorer,
    LatentScorer,
    comparison_table,
    evaluate_scorers,
    evaluation_settings,
    plot_comparison,
)
from dina_reward.shapes import load_pipeline, load_reward, render, sample_scenes


output = Path("outputs/images_to_evaluation")
(output / "images").mkdir(parents=True, exist_ok=True)

# 1. Images and votes on the disk. Some votes are split, some files are missing: both happen.
scenes = sample_scenes(120, "held_out", seed=0)
pixels = (255 * render(scenes, torch.Generator().manual_seed(0))).round().byte().permute(0, 2, 3, 1).numpy()
rows = []
for number, scene in enumerate(scenes):
    Image.fromarray(pixels[number]).save(output / "images" / f"{number}.png")
    row = {"prompt": scene.caption, "path1": f"images/{number}.png", "path2": f"images/{(number + 1) % 120}.png"}
    votes = {"confidence": 0.97 if number % 3 else "null", "choice_dist": [8, 2] if number % 2 else [10, 0]}
    rows.append({**row, **votes})
rows[7]["path2"] = "images/lost.png"
(output / "train.json").write_text(json.dumps(rows))

# 2. One kind of record whatever the schema; what cannot be read is counted, and named in the report.
preferences = read_preferences(output / "train.json", min_confidence=0.95)
print(f"{len(preferences)} pairs; the first: {preferences[0].prompt!r}, P(a is preferred) = {preferences[0].p_a:.1f}")

# 3. Every image becomes a latent once, in buckets of one size each; started again, this continues where it was.
pipe = load_pipeline()
print(build_cache(preferences, pipe, output / "latents", CacheSettings(BucketRule.of(["32x32"])), progress=False))
pairs = CachedPreferences(output / "latents")


# 4. Any rewards side by side: the shipped one at two levels and as an ensemble, and a function of decoded images.
def colourfulness(images, prompts):
    return images.std(dim=1).mean(dim=(1, 2))


settings = evaluation_settings(levels=(0.1, 0.4), ensembles=((0.2, 0.4, 0.6),))
scorers = [LatentScorer(load_reward(pipeline=pipe), settings, name="shapes"), CallableScorer(colourfulness)]
comparison = evaluate_scorers(scorers, pairs, pipeline=pipe, ties="half", dataset="rendered pairs", progress=False)
plot_comparison(comparison, output / "evaluation.png")
print(comparison_table(comparison), f"\nOne page of plots: {output / 'evaluation.png'}", sep="\n")
