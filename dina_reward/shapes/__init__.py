"""A miniature text-to-image world for running everything in this package for real, offline, on a CPU.

It has a caption grammar, a renderer, an oracle that reads images, and shipped weights: a real `StableDiffusion3Pipeline`
that draws well but listens badly, and a `LatentReward` trained on the oracle's preferences.

Example:
    from dina_reward.shapes import Oracle, load_pipeline, sample_prompts

    pipeline = load_pipeline()
    prompts = sample_prompts(8, "held_out", seed=0)
    settings = {"num_inference_steps": 10, "guidance_scale": 1.0, "max_sequence_length": 6}
    images = pipeline(prompts, output_type="pt", **settings).images
    print(Oracle()(images, prompts).fit)

No other package may need this one, apart from recipes and commands; public names load on first use. Begin at
`shipped.load_pipeline`; `build` is how the weights were made.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from dina_reward.lazy import lazy_exports
from dina_reward.quiet import hide_library_notes


if TYPE_CHECKING:
    from dina_reward.shapes.autoencoder import decode_latents, encode_images
    from dina_reward.shapes.degradations import degrade
    from dina_reward.shapes.evaluation import PipelineEvaluation, evaluate_pipeline
    from dina_reward.shapes.generator import sample_latents
    from dina_reward.shapes.oracle import Oracle, OracleScores, Reading
    from dina_reward.shapes.preferences import PreferencePairs, build_pool, fresh_preferences, sample_pairs
    from dina_reward.shapes.prompts import Scene, all_scenes, sample_prompts, sample_scenes
    from dina_reward.shapes.renderer import render
    from dina_reward.shapes.shipped import load_aligned, load_pipeline, load_reward, weights_dir

if sys.argv[:1] == ["-m"]:  # while Python looks for the module of `python -m dina_reward.shapes...`, a command of ours
    hide_library_notes()

__getattr__, __dir__, __all__ = lazy_exports(__name__)
