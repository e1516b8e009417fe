"""The families that are known, found by name, by diffusers class, or by a model in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dina_reward.families.base import ModelFamily


_FAMILIES: dict[str, ModelFamily] = {}


def register_family(cls: type[ModelFamily]) -> type[ModelFamily]:
    """Class decorator that makes a family known under its name and its diffusers classes.

    Examples:
        >>> @register_family
        ... class MyFamily(SD3Family):
        ...     name = "my_family"
        ...     pipeline_classes = ("MyPipeline",)
    """
    _FAMILIES[cls.name] = cls()
    return cls


def families() -> tuple[ModelFamily, ...]:
    """All registered families."""
    return tuple(_FAMILIES.values())


def get_family(name: str) -> ModelFamily:
    """Family by its name in a checkpoint.

    Raises:
        ValueError: no family of this name.
    """
    try:
        return _FAMILIES[name]
    except KeyError:
        raise ValueError(f"unknown model family {name!r}; this version supports: {', '.join(_FAMILIES)}") from None


def family_of_class(cls: type, denoiser_config: Mapping[str, Any] | None = None) -> ModelFamily:
    """Family of a diffusers pipeline or denoiser class, looked up by name along its inheritance.

    Args:
        cls: the class.
        denoiser_config: configuration of the denoiser, which tells families apart that share a denoiser class.

    Raises:
        ValueError: the class belongs to no supported family.
    """
    for base in cls.__mro__:
        for family in families():
            if base.__name__ in family.pipeline_classes:
                return family
            fits = denoiser_config is None or family.matches(denoiser_config)
            if base.__name__ in family.denoiser_classes and fits:
                return family
    raise ValueError(
        f"{cls.__name__} belongs to no supported model family; this version supports: "
        + "; ".join(f"{f.name} ({', '.join(f.pipeline_classes)})" for f in families())
    )


def family_of(model: object) -> ModelFamily:
    """Family of a diffusers pipeline or denoiser.

    Raises:
        ValueError: the class belongs to no supported family.
    """
    config = getattr(model, "config", None)
    return family_of_class(type(model), config if isinstance(config, Mapping) else None)
