"""What `dina-reward sample` does: load a pipeline and its reward, search, write pictures."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dina_reward.alignment.monitoring.pictures import save_picture
from dina_reward.cli.score_run import load_pipeline
from dina_reward.reward import LatentReward
from dina_reward.search import SearchResult, result_grid, search, write_page
from dina_reward.shapes.text import MAX_PROMPT_TOKENS
from dina_reward.shipped import WORLDS


def sample_prompts(
    pipeline: str,
    prompts: Sequence[str],
    reward: str | None = None,
    *,
    device: str | None = None,
    dtype: str = "float32",
    **options: Any,
) -> SearchResult:
    """Searches with a reward on the generator's own tensors.

    Args:
        pipeline: path or hub id; ``shapes`` and ``shapes-ddpm`` ship with the package.
        prompts: the prompts.
        reward: directory or hub id; that of the embedded world by default.
        device, dtype: of the pipeline.
        options: of `dina_reward.search.search`.

    Raises:
        ValueError: no reward is named for a pipeline that has none of its own; see `search` for others.
    """
    if reward is None and pipeline not in WORLDS:
        raise ValueError(
            f"name a reward on {pipeline!r} with --reward; only 'shapes' and 'shapes-ddpm' have one of their own"
        )
    loaded = load_pipeline(pipeline, device=device, dtype=dtype)
    scorer = LatentReward.from_pretrained(reward or pipeline, pipeline=loaded, share_backbone=True)
    if pipeline in WORLDS and options.get("max_sequence_length") is None:
        options["max_sequence_length"] = MAX_PROMPT_TOKENS
    return search(loaded, scorer, list(prompts), **options)


def write_files(result: SearchResult, output: Path, report: bool) -> list[Path]:
    """Writes the picture, and with ``report`` a page beside it, ``NAME-report.png``; returns what was written."""
    save_picture(result_grid(result), output)
    if not report:
        return [output]
    page = output.with_name(f"{output.stem}-report.png")
    write_page(result, page)
    return [output, page]


def parsed_settings(settings: Sequence[str]) -> dict[str, Any]:
    """``name=value`` words as options: numbers, several numbers with commas between them, or text.

    Raises:
        ValueError: a word without a name or value.
    """
    options: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not (name and equals and text):
            raise ValueError(f"--set takes name=value, such as --set strength=5, got {setting!r}")
        try:
            options[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            options[name] = text
    return options
