"""Files of a policy: its LoRA, or its whole denoiser; read and written as whole tensors whatever way it is sharded."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from torch import Tensor, nn

from dina_reward.checkpoints.atomic import atomic_directory, atomic_files, settled
from dina_reward.checks.stored import open_tensors, parse_json
from dina_reward.training.sharding import assign, is_main_process, whole


LORA_WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
FULL_WEIGHTS_PATTERN = "diffusion_pytorch_model{suffix}.safetensors"
FULL_MARKER = ".dina_reward"


def save_lora(
    pipeline: Any, denoiser: nn.Module, directory: str, attribute: str, adapter_name: str, write: bool | None = None
) -> None:
    """Writes an adapter so that ``pipeline.load_lora_weights(directory)`` reads it, at full strength in every reader.

    Readers of the tensors alone (state dicts, ComfyUI, kohya's tools) take ``alpha`` for the rank, so ``alpha / rank`` is
    multiplied into ``lora_B`` and the file says that they are equal.

    Args:
        attribute: name of the denoiser in the pipeline, the prefix of the stored names.
        write: whether this process writes; rank 0 by default. Sharded tensors are gathered on every rank.
    """
    from peft import get_peft_model_state_dict

    tensors = _gathered(get_peft_model_state_dict(denoiser, adapter_name=adapter_name), write)
    if tensors is None:
        return
    config = denoiser.peft_config[adapter_name].to_dict()  # type: ignore[union-attr, index]
    scale = config["lora_alpha"] / config["r"]
    tensors = {name: _scaled(tensor, scale) if ".lora_B." in name else tensor for name, tensor in tensors.items()}
    metadata = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    metadata["lora_alpha"] = config["r"]
    with atomic_files(directory) as staging:
        # The keywords of every diffusers pipeline with a LoRA loader are named after the denoiser.
        type(pipeline).save_lora_weights(
            staging, **{f"{attribute}_lora_layers": tensors, f"{attribute}_lora_adapter_metadata": metadata}
        )


def load_lora(denoiser: nn.Module, directory: str, attribute: str, adapter_name: str) -> None:
    """Reads what `save_lora` wrote into an adapter, in place; sharded tensors are scattered from rank 0.

    Raises:
        ValueError: the file is missing or damaged, or does not hold exactly the adapter's tensors.
    """
    from peft import get_peft_model_state_dict

    path = settled(Path(directory, LORA_WEIGHTS_NAME))
    if not path.is_file():
        raise ValueError(f"{directory} holds no {LORA_WEIGHTS_NAME}; it is not a checkpoint of this trainer")
    stored, metadata = _read_lora(path, f"{attribute}.")
    expected = get_peft_model_state_dict(denoiser, adapter_name=adapter_name)
    _check_fit(
        {name: tuple(tensor.shape) for name, tensor in stored.items()},
        expected,
        f"{path} does not fit this run's LoRA",
        "Resume with the lora_rank and lora_target_modules of that run",
    )
    config: Any = denoiser.peft_config[adapter_name]  # type: ignore[index]
    strength = metadata.get("lora_alpha", 1) / metadata.get("r", 1)
    for name, tensor in expected.items():
        value = stored[name]
        assign(tensor, _scaled(value, strength * config.r / config.lora_alpha) if ".lora_B." in name else value)


def _scaled(tensor: Tensor, scale: float) -> Tensor:
    """A product that the inverse scale takes back bit for bit: powers of two are exact, others get 64 bits."""
    return tensor * scale if math.frexp(scale)[0] == 0.5 else tensor.double() * scale


def _read_lora(path: Path, prefix: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and PEFT configuration of the denoiser's adapter in a file, by their names in the denoiser."""
    try:
        with open_tensors(path) as file:
            tensors = {name.removeprefix(prefix): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = parse_json(
                (file.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY, "{}"), f"the metadata of {path}"
            )
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}. Resume from an earlier checkpoint") from error
    return tensors, {name.removeprefix(prefix): value for name, value in metadata.items()}


def save_full(denoiser: nn.Module, directory: str, attribute: str, class_name: str, write: bool | None = None) -> None:
    """Writes the denoiser as ``save_pretrained`` does, into ``directory/attribute``, replacing what a run wrote there.

    Args:
        attribute: name of the denoiser in the pipeline.
        class_name: of the diffusers class; FSDP2 puts a class of its own in its place.
        write: whether this process writes; rank 0 by default. Sharded tensors are gathered on every rank.

    Raises:
        ValueError: the folder holds weights that no run wrote, such as those of the pipeline itself.
    """
    from huggingface_hub import save_torch_state_dict

    tensors = _gathered(denoiser.state_dict(), write)
    if tensors is None:
        return
    config = {**json.loads(denoiser.to_json_string()), "_class_name": class_name}  # type: ignore[operator]
    with atomic_directory(os.path.join(directory, attribute), marker=FULL_MARKER) as staging:
        (staging / FULL_MARKER).write_text("Weights that dina_reward trained; the next save replaces this folder.\n")
        (staging / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        save_torch_state_dict(
            tensors, staging, filename_pattern=FULL_WEIGHTS_PATTERN, max_shard_size="10GB", metadata={"format": "pt"}
        )


def load_full(denoiser: nn.Module, directory: str, attribute: str) -> None:
    """Reads what `save_full` wrote into the denoiser, in place; sharded tensors are scattered from rank 0.

    Raises:
        ValueError: the files are missing, or do not hold exactly the denoiser's tensors.
    """
    folder = settled(Path(directory, attribute))
    paths = sorted(folder.glob(FULL_WEIGHTS_PATTERN.format(suffix="*")))
    if not paths:
        raise ValueError(f"{folder} holds no {FULL_WEIGHTS_PATTERN.format(suffix='')}; is it a checkpoint of a LoRA?")
    expected = denoiser.state_dict()
    shapes = {name: shape for path in paths for name, shape in _stored_shapes(path)}
    _check_fit(shapes, expected, f"{folder} does not fit this denoiser", "Resume with the pipeline of that run")
    for path in paths:
        with open_tensors(path) as file:
            for name in file.keys():  # noqa: SIM118
                assign(expected[name], file.get_tensor(name))


def _gathered(tensors: Mapping[str, Tensor], write: bool | None) -> dict[str, Tensor] | None:
    """Whole tensors in host memory where they will be written, nothing elsewhere; one at a time on the device."""
    write = is_main_process() if write is None else write
    gathered = {}
    for name, tensor in tensors.items():
        complete = whole(tensor)
        if write:
            gathered[name] = complete.contiguous().cpu()
    return gathered if write else None


def _stored_shapes(path: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    with open_tensors(path) as file:
        for name in file.keys():  # noqa: SIM118
            yield name, tuple(file.get_slice(name).get_shape())


def _check_fit(stored: Mapping[str, tuple[int, ...]], expected: Mapping[str, Tensor], fault: str, advice: str) -> None:
    names = sorted(stored.keys() ^ expected.keys()) or sorted(
        name for name, shape in stored.items() if shape != tuple(expected[name].shape)
    )
    if names:
        raise ValueError(
            f"{fault}: {len(names)} tensors are missing, unexpected or of another shape, the first is {names[0]!r}. {advice}"
        )
