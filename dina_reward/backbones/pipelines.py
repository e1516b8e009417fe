"""The one door through which pipelines come from a path or hub id: no code of their own is run, no weight is made up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dina_reward.families import family_of_class
from dina_reward.quiet import dtype_option, text_dtype_option
from dina_reward.shipped import pipeline_path


_LIBRARIES = ("diffusers", "transformers")
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token", "variant")
_OTHER_TOWERS = ("lm_head.", "logit_scale", "vision_model.", "visual.", "visual_projection.", "vision_tower.")
"""Beginnings of tensors that a whole model has and a text encoder that was cut out of it need not read."""


def load_pipeline(name: str, *, dtype: Any = None, **options: Any) -> Any:
    """`DiffusionPipeline.from_pretrained` for pipelines of supported families, made of known libraries' classes alone.

    A checkpoint may name any directory as its backbone, and some versions of diffusers import Python files from there.
    Text encoders are loaded with account of every tensor: transformers itself fills those that are missing, or named
    otherwise than it expects, with random numbers and a line in the log.

    Args:
        name: path or hub id; ``shapes`` and ``shapes-ddpm`` ship with the package.
        dtype: of all parts, a `torch.dtype`; float32 by default.
        options: those of `DiffusionPipeline.from_pretrained`.

    Raises:
        ValueError: its index names a class of another library, or one that belongs to no supported family; or tensors of
            a text encoder are missing, left over, or of another shape.
        OSError: there is no such pipeline.
    """
    import diffusers

    name = pipeline_path(name)
    index = pipeline_index(name)
    encoders = {} if "quantization_config" in options else _text_encoders(name, index, dtype, options)
    options |= {} if dtype is None else dtype_option(dtype)
    return diffusers.DiffusionPipeline.from_pretrained(name, **encoders, **options)


def _text_encoders(name: str, index: Mapping[str, Any], dtype: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    import torch
    import transformers

    hub = {key: options[key] for key in _HUB_OPTIONS if key in options}
    loaded = {}
    for part, value in index.items():
        if not part.startswith("text_encoder") or part in options or not value or value[0] != "transformers":
            continue
        model_class = getattr(transformers, value[1])
        encoder, report = model_class.from_pretrained(
            name, subfolder=part, output_loading_info=True, **text_dtype_option(dtype or torch.float32), **hub
        )
        check_loading_report(f"{name}/{part}", value[1], report)
        loaded[part] = encoder
    return loaded


def check_loading_report(where: str, class_name: str, report: Mapping[str, Any]) -> None:
    """Refuses a text encoder whose weights are not all those of its checkpoint.

    Args:
        where: for the message.
        class_name: of the encoder.
        report: the loading info of transformers.

    Raises:
        ValueError: naming tensors that are missing, unexpected or of another shape.
    """
    left_over = [key for key in report["unexpected_keys"] if not str(key).startswith(_OTHER_TOWERS)]
    faults = {
        "missing": list(report["missing_keys"]),
        "not of this model": left_over,
        "of another shape": list(report["mismatched_keys"]),
    }
    found = [f"{len(keys)} {what} ({', '.join(sorted(map(str, keys))[:3])})" for what, keys in faults.items() if keys]
    if found:
        import transformers

        raise ValueError(
            f"the text encoder {where} is not loaded: of the tensors of a {class_name} there are {', '.join(found)}. Its "
            "prompts would be encoded with random weights. The file may be damaged, or written by another version of "
            f"transformers than {transformers.__version__} can read"
        )


def pipeline_index(name: str) -> dict[str, Any]:
    """Content of a pipeline's ``model_index.json``, checked; see `load_pipeline` for the errors."""
    import diffusers

    name = pipeline_path(name)
    index = diffusers.DiffusionPipeline.load_config(name)
    index = index[0] if isinstance(index, tuple) else index
    class_name = index.get("_class_name")
    pipeline_class = getattr(diffusers, class_name, None) if isinstance(class_name, str) else None
    if not (isinstance(pipeline_class, type) and issubclass(pipeline_class, diffusers.DiffusionPipeline)):
        raise ValueError(
            f"{name} is no pipeline that can be loaded: its model_index.json names the class {class_name!r}, which is not "
            "one of diffusers'"
        )
    family_of_class(pipeline_class)
    _refuse_foreign_classes(name, index)
    return index


def _refuse_foreign_classes(name: str, index: Mapping[str, Any]) -> None:
    import diffusers

    for part, value in index.items():
        if part.startswith("_") or not isinstance(value, (list, tuple)) or value in ([None, None], [None, ""]):
            continue
        library = value[0] if value else None
        known = isinstance(library, str) and (
            library in _LIBRARIES or (library.isidentifier() and hasattr(diffusers.pipelines, library))
        )
        if len(value) == 2 and not (known and isinstance(value[1], str)):
            raise ValueError(
                f"{name} is not loaded: its model_index.json takes {part!r} from {library!r}, and only classes of diffusers "
                "and transformers are used"
            )
