"""`dina-reward cache`: a preference dataset of images becomes latents on disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dina_reward.cli.console import pipeline_path


if TYPE_CHECKING:
    import torch

    from dina_reward.data.cache import CacheReport


def cache(
    dataset: Annotated[
        str, typer.Argument(metavar="DATASET", help="Preferences between images: a file, directory or hub id.")
    ],
    pipeline: Annotated[
        str,
        typer.Option(
            help="Path or hub id of the diffusers pipeline; 'shapes' or 'shapes-ddpm' for the embedded ones."
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Directory of the cache; a run that ended early continues.")
    ],
    schema: Annotated[str | None, typer.Option(help="Schema of the dataset. Default: found from its columns.")] = None,
    split: Annotated[str, typer.Option(help="Split of the dataset.")] = "train",
    image_root: Annotated[Path | None, typer.Option(help="Folder that relative image paths start from.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sides and of the limit per prompt.")] = 0,
    min_confidence: Annotated[
        float | None, typer.Option(help="Leave out pairs whose annotators were less sure than this.")
    ] = None,
    max_pairs_per_prompt: Annotated[
        int | None, typer.Option(min=1, help="Leave out pairs at random where a prompt has more; published: 8.")
    ] = None,
    max_broken: Annotated[float, typer.Option(help="Share of broken pairs that is left out and reported.")] = 0.01,
    bucket: Annotated[
        list[str] | None,
        typer.Option(help="Image size WIDTHxHEIGHT; repeat it. Default: the 13 published ones.", show_default=False),
    ] = None,
    tolerance: Annotated[float, typer.Option(help="Largest |log aspect difference| between image and bucket.")] = 0.03,
    max_upscale: Annotated[float, typer.Option(help="Largest enlargement of an image.")] = 1.05,
    prompt_embeds: Annotated[bool, typer.Option(help="Store prompt embeddings too, without padding.")] = False,
    max_sequence_length: Annotated[
        int | None, typer.Option(min=1, help="Token limit of embedded prompts. Default: the pipeline's.")
    ] = None,
    latent_dtype: Annotated[str, typer.Option(help="Stored latents: float16, bfloat16, float32.")] = "float16",
    embeds_dtype: Annotated[str, typer.Option(help="Stored embeddings: float16, bfloat16, float32.")] = "float16",
    batch_size: Annotated[int, typer.Option(min=1, help="Images or prompts per pass of the encoders.")] = 8,
    images_per_shard: Annotated[int, typer.Option(min=1, help="Latents per file.")] = 256,
    workers: Annotated[int, typer.Option(min=1, help="Threads per process that decode images.")] = 4,
    device: Annotated[str | None, typer.Option(help="Default: this process's GPU if there is one, else cpu.")] = None,
    dtype: Annotated[
        str, typer.Option(help="Dtype of VAE and text encoders: float32, bfloat16, float16.")
    ] = "float32",
    dry_run: Annotated[
        bool, typer.Option(help="Read the dataset and print the size of the cache, encode nothing.")
    ] = False,
) -> None:
    """Encodes images (and prompts) once, in aspect-ratio buckets, for training: `dina-reward train`.

    Prints what the cache will hold before it starts. Killed runs continue where they were. On several GPUs:
    `accelerate launch --num_processes 8 -m dina_reward.cli cache ...`.
    """
    from dina_reward.data import read_preferences
    from dina_reward.data.buckets import BucketRule
    from dina_reward.data.cache import build_cache, processes
    from dina_reward.data.cache_manifest import CacheSettings

    settings = CacheSettings(
        BucketRule.of(bucket or (), tolerance=tolerance, max_upscale=max_upscale),
        latent_dtype=latent_dtype,
        embeds_dtype=embeds_dtype,
        prompt_embeds=prompt_embeds,
        max_sequence_length=max_sequence_length,
        batch_size=batch_size,
        images_per_shard=images_per_shard,
    )
    preferences = read_preferences(
        dataset,
        schema=schema,
        split=split,
        image_root=image_root,
        seed=seed,
        min_confidence=min_confidence,
        max_pairs_per_prompt=max_pairs_per_prompt,
        max_broken=max_broken,
    )
    state = processes()
    loaded = load_encoders(pipeline, dtype, device or state.device, text=prompt_embeds)
    build_cache(
        preferences,
        loaded,
        output,
        settings,
        max_broken=max_broken,
        workers=workers,
        dry_run=dry_run,
        on_report=_print_report,
    )
    if state.is_main_process:
        typer.echo("nothing was encoded (--dry-run)" if dry_run else f"wrote {output}")


def _print_report(report: CacheReport) -> None:
    typer.echo(str(report))
    if report.bytes > report.free_bytes:
        typer.secho("warning: the cache will not fit on the disk", err=True, fg=typer.colors.YELLOW)


def load_encoders(name: str, dtype: str, device: str | torch.device, *, text: bool) -> Any:
    """Loads the parts of a pipeline that encode; its denoiser is there as a structure without weights.

    Args:
        name: path or hub id, or ``shapes`` or ``shapes-ddpm``.
        dtype: name of a torch dtype.
        device: where VAE and text encoders go.
        text: whether text encoders are loaded.

    Raises:
        ValueError: no pipeline there, or not of a supported family.
    """
    import diffusers
    import torch
    from accelerate import init_empty_weights
    from huggingface_hub.errors import HFValidationError

    from dina_reward.backbones.pipelines import load_pipeline, pipeline_index
    from dina_reward.families import family_of_class

    torch_dtype = getattr(torch, dtype, None)
    if not isinstance(torch_dtype, torch.dtype) or not torch_dtype.is_floating_point:
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype!r}")
    name = pipeline_path(name)
    try:
        index = pipeline_index(name)
        family = family_of_class(getattr(diffusers, index["_class_name"]))
        attribute = family.denoiser_attribute
        denoiser_class = getattr(diffusers, index[attribute][1])
        config = denoiser_class.load_config(name, subfolder=attribute)
        with init_empty_weights():
            denoiser = denoiser_class.from_config(config)
        absent: tuple[str, ...] = ("safety_checker", "image_encoder", "feature_extractor")
        absent += () if text else ("text_encoder", "tokenizer")
        missing = {part: None for part in index if part.startswith(absent)}
        loaded = load_pipeline(name, torch_dtype=torch_dtype, **{attribute: denoiser}, **missing)
    except (OSError, HFValidationError, KeyError, AttributeError) as error:
        raise ValueError(f"{name!r} is no diffusers pipeline that can be loaded: {error}") from error
    for part, module in loaded.components.items():
        if part != attribute and isinstance(module, torch.nn.Module):
            module.to(device)
    return loaded
