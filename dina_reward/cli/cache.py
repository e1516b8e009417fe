"""`dina-reward cache`: a preference dataset of images becomes latents on disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dina_reward.cli.console import in_terminal
from dina_reward.cli.options import (
    BatchSizeOption,
    DtypeChoice,
    ImageRootOption,
    MinConfidenceOption,
    SchemaOption,
    SplitOption,
)
from dina_reward.quiet import no_loading_bars


if TYPE_CHECKING:
    import torch

    from dina_reward.data import CacheSettings, PreferenceReader
    from dina_reward.data.cache import CacheReport


DatasetArgument = Annotated[
    str, typer.Argument(metavar="DATASET", help="Preferences between images: a file, directory or hub id.")
]
PipelineOption = Annotated[
    str,
    typer.Option(help="Path or hub id of the diffusers pipeline; 'shapes' or 'shapes-ddpm' for the embedded ones."),
]
OutputOption = Annotated[
    Path, typer.Option("--output", "-o", help="Directory of the cache; a run that ended early continues.")
]
SeedOption = Annotated[int, typer.Option(min=0, help="Seed of the sides and of the limit per prompt.")]
MaxPairsPerPromptOption = Annotated[
    int | None, typer.Option(min=1, help="Leave out pairs at random where a prompt has more; published: 8.")
]
MaxBrokenOption = Annotated[float, typer.Option(help="Share of broken pairs that is left out and reported.")]
BucketOption = Annotated[
    list[str] | None,
    typer.Option(help="Image size WIDTHxHEIGHT; repeat it. Default: the 13 published ones.", show_default=False),
]
ToleranceOption = Annotated[float, typer.Option(help="Largest |log aspect difference| between image and bucket.")]
MaxUpscaleOption = Annotated[float, typer.Option(help="Largest enlargement of an image.")]
PromptEmbedsOption = Annotated[bool, typer.Option(help="Store prompt embeddings too, without padding.")]
MaxSequenceLengthOption = Annotated[
    int | None, typer.Option(min=1, help="Token limit of embedded prompts. Default: the pipeline's.")
]
LatentDtypeOption = Annotated[str, typer.Option(help="Stored latents: float16, bfloat16, float32.")]
EmbedsDtypeOption = Annotated[str, typer.Option(help="Stored embeddings: float16, bfloat16, float32.")]
ImagesPerShardOption = Annotated[int, typer.Option(min=1, help="Latents per file.")]
WorkersOption = Annotated[int, typer.Option(min=1, help="Threads per process that decode images.")]
DeviceOption = Annotated[str | None, typer.Option(help="Default: this process's GPU if there is one, else cpu.")]
DtypeOption = Annotated[DtypeChoice, typer.Option(help="Dtype of VAE and text encoders.")]
DryRunOption = Annotated[bool, typer.Option(help="Read the dataset and print the size of the cache, encode nothing.")]


def cache(
    dataset: DatasetArgument,
    pipeline: PipelineOption,
    output: OutputOption,
    schema: SchemaOption = None,
    split: SplitOption = "train",
    image_root: ImageRootOption = None,
    seed: SeedOption = 0,
    min_confidence: MinConfidenceOption = None,
    max_pairs_per_prompt: MaxPairsPerPromptOption = None,
    max_broken: MaxBrokenOption = 0.01,
    bucket: BucketOption = None,
    tolerance: ToleranceOption = 0.03,
    max_upscale: MaxUpscaleOption = 1.05,
    prompt_embeds: PromptEmbedsOption = False,
    max_sequence_length: MaxSequenceLengthOption = None,
    latent_dtype: LatentDtypeOption = "float16",
    embeds_dtype: EmbedsDtypeOption = "float16",
    batch_size: BatchSizeOption = 8,
    images_per_shard: ImagesPerShardOption = 256,
    workers: WorkersOption = 4,
    device: DeviceOption = None,
    dtype: DtypeOption = DtypeChoice.float32,
    dry_run: DryRunOption = False,
) -> None:
    """Encodes images (and prompts) once, in aspect-ratio buckets, for training: `dina-reward train`.

    Prints what the cache will hold before it starts. Killed runs continue where they were. On several GPUs:
    `accelerate launch --num_processes 8 -m dina_reward.cli cache ...`.
    """
    from dina_reward.data import read_preferences
    from dina_reward.data.buckets import BucketRule
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
    _build(
        preferences,
        settings,
        output,
        pipeline=pipeline,
        device=device,
        dtype=dtype.value,
        max_broken=max_broken,
        workers=workers,
        dry_run=dry_run,
    )


def _build(
    preferences: PreferenceReader,
    settings: CacheSettings,
    output: Path,
    *,
    pipeline: str,
    device: str | None,
    dtype: str,
    max_broken: float,
    workers: int,
    dry_run: bool,
) -> None:
    from dina_reward.data.cache import build_cache, processes

    state = processes()
    loaded = load_encoders(pipeline, dtype, device or state.device, text=settings.prompt_embeds)
    build_cache(
        preferences,
        loaded,
        output,
        settings,
        max_broken=max_broken,
        workers=workers,
        dry_run=dry_run,
        on_report=_print_report,
        progress=in_terminal(),
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
    from dina_reward.shipped import pipeline_path

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
        with no_loading_bars():
            loaded = load_pipeline(name, dtype=getattr(torch, dtype), **{attribute: denoiser}, **missing)
    except (OSError, HFValidationError, KeyError, AttributeError) as error:
        raise ValueError(f"{name!r} is no diffusers pipeline that can be loaded: {error}") from error
    for part, module in loaded.components.items():
        if part != attribute and isinstance(module, torch.nn.Module):
            module.to(device)
    return loaded
