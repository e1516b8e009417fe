"""Structures of published models: class names and configurations without weights, from package data or a repository.

Package data are JSON files, ``families/published/<family>.json``: settings that all models of a file share, and a list
``models`` whose entries add to them or replace them. A configuration holds only what differs from the class's defaults.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from dina_reward.families import ModelFamily, families, family_of_class, get_family


@dataclass(frozen=True)
class ModelStructure:
    """What a generator is, apart from its weights.

    Args:
        name: short name.
        pipeline_class, denoiser_class, vae_class, scheduler_class: names of diffusers classes.
        denoiser_config, vae_config, scheduler_config: settings that differ from the classes' defaults.
        text_tokens: length of an encoded prompt.
        height, width: of an image, in pixels; ``None``: what the model calls its sample size.
        num_frames: of a video; 1 for images.
        model_id: hub id or path of the model.
        text_encoders: for each, the name of its transformers ``class`` and its ``config``.
    """

    name: str
    pipeline_class: str
    denoiser_class: str
    denoiser_config: Mapping[str, Any]
    vae_class: str
    scheduler_class: str
    text_tokens: int
    height: int | None = None
    width: int | None = None
    vae_config: Mapping[str, Any] = field(default_factory=dict)
    scheduler_config: Mapping[str, Any] = field(default_factory=dict)
    num_frames: int = 1
    model_id: str | None = None
    text_encoders: Sequence[Mapping[str, Any]] = ()

    @property
    def family(self) -> ModelFamily:
        """The model family."""
        return _family_of_pipeline(self.pipeline_class)


def published_models(family: str | None = None) -> tuple[ModelStructure, ...]:
    """Published models whose structure is known: of one family, or of all of them.

    Raises:
        ValueError: no family of this name.
    """
    known = families() if family is None else (get_family(family),)
    return tuple(model for each in known for model in _read(each.name))


def published_as(target: str) -> tuple[ModelStructure, ...]:
    """Published models with this name or hub id; none if there are none."""
    return tuple(model for model in published_models() if target in (model.name, model.model_id))


@cache
def _read(family: str) -> tuple[ModelStructure, ...]:
    file = resources.files("dina_reward.families").joinpath("published", f"{family}.json")
    if not file.is_file():
        return ()
    shared = json.loads(file.read_text(encoding="utf-8"))
    models = shared.pop("models")
    return tuple(ModelStructure(**{**shared, **model}) for model in models)


def structures_of_class(class_name: str) -> tuple[ModelStructure, ...]:
    """Published models that a diffusers pipeline or denoiser class takes.

    Raises:
        ValueError: the class belongs to no supported family, or nothing of it is published.
    """
    found = [family for family in families() if class_name in (*family.pipeline_classes, *family.denoiser_classes)]
    if not found:
        raise ValueError(f"{class_name} belongs to no supported model family. Supported classes: {_supported()}")
    models = [
        model
        for family in found
        for model in published_models(family.name)
        if class_name in (model.pipeline_class, model.denoiser_class) or class_name not in _published_pipelines(family)
    ]
    if not models:
        names = ", ".join(family.name for family in found)
        raise ValueError(
            f"{class_name} belongs to {names}, of which no published structure is known; give a directory"
        )
    return tuple(models)


def structure_of_repository(directory: Path | str) -> ModelStructure:
    """Structure of a diffusers pipeline in a directory or hub repository; reads ``model_index.json`` and ``config.json``.

    The length of a prompt, and the size of an image where the model has no sample size, are those of the family's published
    model with the most settings in common.

    Raises:
        ValueError: no pipeline there, or one of no supported family.
    """
    root = str(directory)
    index = _json_of(root, "model_index.json")
    pipeline_class = str(index["_class_name"])
    family = _family_of_pipeline(pipeline_class)
    names = {part: index.get(part, [None, None])[1] for part in (family.denoiser_attribute, "vae", "scheduler")}
    missing = [part for part, name in names.items() if name is None]
    if missing:
        raise ValueError(f"the pipeline {root} has no {', '.join(missing)}")
    configs = {
        part: _plain(_json_of(root, f"{part}/{'scheduler_' if part == 'scheduler' else ''}config.json"))
        for part in names
    }
    denoiser_config = configs[family.denoiser_attribute]
    nearest = _nearest(family, denoiser_config)
    sized_by = None if isinstance(denoiser_config.get("sample_size"), int) else nearest
    return ModelStructure(
        name=Path(root).name,
        model_id=root,
        pipeline_class=pipeline_class,
        denoiser_class=names[family.denoiser_attribute],
        denoiser_config=denoiser_config,
        vae_class=names["vae"],
        vae_config=configs["vae"],
        scheduler_class=names["scheduler"],
        scheduler_config=configs["scheduler"],
        text_tokens=256 if nearest is None else nearest.text_tokens,
        height=None if sized_by is None else sized_by.height,
        width=None if sized_by is None else sized_by.width,
        num_frames=1 if nearest is None else nearest.num_frames,
        text_encoders=tuple(
            {"class": value[1], "config": _plain(_json_of(root, f"{part}/config.json"))}
            for part, value in index.items()
            if part.startswith("text_encoder") and value[0] == "transformers"
        ),
    )


def is_pipeline(path_or_id: str) -> bool:
    """Whether a directory or a hub repository that can be reached holds a diffusers pipeline."""
    if Path(path_or_id).expanduser().is_dir():
        return (Path(path_or_id).expanduser() / "model_index.json").is_file()
    try:
        return _downloaded(path_or_id, "model_index.json").is_file()
    except ValueError:
        return False


def _nearest(family: ModelFamily, config: Mapping[str, Any]) -> ModelStructure | None:
    def agreement(model: ModelStructure) -> int:
        return sum(config.get(key) == value for key, value in model.denoiser_config.items())

    return max(published_models(family.name), key=agreement, default=None)


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith("_")}


def _json_of(root: str, name: str) -> dict[str, Any]:
    path = Path(root).expanduser() / name
    if not Path(root).expanduser().is_dir():
        path = _downloaded(root, name)
    if not path.is_file():
        raise ValueError(f"{root} holds no diffusers pipeline: {name} is missing")
    return json.loads(path.read_text(encoding="utf-8"))


def _downloaded(model_id: str, name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(model_id, name))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ValueError(
            f"{model_id!r} is neither a directory here nor a pipeline repository that can be downloaded ({name}): {error}"
        ) from error


def _family_of_pipeline(class_name: str) -> ModelFamily:
    for family in families():
        if class_name in family.pipeline_classes:
            return family
    import diffusers

    cls = getattr(diffusers, class_name, None)
    if cls is None:
        raise ValueError(f"{class_name} belongs to no supported model family. Supported classes: {_supported()}")
    return family_of_class(cls)


def _published_pipelines(family: ModelFamily) -> set[str]:
    return {model.pipeline_class for model in published_models(family.name)}


def _supported() -> str:
    return "; ".join(f"{f.name}: {', '.join((*f.pipeline_classes, *f.denoiser_classes))}" for f in families())
