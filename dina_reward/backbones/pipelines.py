"""The one door through which pipelines come from a path or hub id: none of their own code is ever run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dina_reward.families import family_of_class
from dina_reward.quiet import dtype_option


_LIBRARIES = ("diffusers", "transformers")


def load_pipeline(name: str, *, dtype: Any = None, **options: Any) -> Any:
    """`DiffusionPipeline.from_pretrained` for pipelines of supported families, made of known libraries' classes alone.

    A checkpoint may name any directory as its backbone, and some versions of diffusers import Python files from there.

    Args:
        name: path or hub id.
        dtype: of all parts, a `torch.dtype`; float32 by default.
        options: those of `DiffusionPipeline.from_pretrained`.

    Raises:
        ValueError: its index names a class of another library, or one that belongs to no supported family.
        OSError: there is no such pipeline.
    """
    import diffusers

    pipeline_index(name)
    options |= {} if dtype is None else dtype_option(dtype)
    return diffusers.DiffusionPipeline.from_pretrained(name, trust_remote_code=False, **options)


def pipeline_index(name: str) -> dict[str, Any]:
    """Content of a pipeline's ``model_index.json``, checked; see `load_pipeline` for the errors."""
    import diffusers

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
