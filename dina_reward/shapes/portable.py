"""Makes a saved pipeline readable for transformers 4 and 5 alike; what it computes stays as it is, bit for bit.

    python -m dina_reward.shapes.portable dina_reward/shapes/weights/flow dina_reward/shapes/weights/ddpm

transformers 5 renamed the class of plain tokenizers, and writes the tensors of a `CLIPTextModel` without the prefix that
transformers 4 looks for; it reads the older forms of both. transformers 4 builds no `T5EncoderModel` without layers; one
whose projections are zero adds nothing.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from dina_reward.checks.stored import read_json


_NEW_TOKENIZER, _OLD_TOKENIZER = "TokenizersBackend", "PreTrainedTokenizerFast"
_PREFIX = "text_model."


def make_portable(directory: str | Path) -> None:
    """Rewrites tokenizers' class names and the text encoders of the pipeline in a directory; once is enough."""
    directory = Path(directory)
    index = read_json(directory / "model_index.json")
    for name, value in index.items():
        if value == ["transformers", _NEW_TOKENIZER]:
            index[name] = ["transformers", _OLD_TOKENIZER]
        if value == ["transformers", "CLIPTextModel"]:
            _prefix_tensors(directory / name / "model.safetensors")
        if value == ["transformers", "T5EncoderModel"]:
            _give_a_layer(directory / name)
    _write(directory / "model_index.json", index)
    for path in sorted(directory.glob("tokenizer*/tokenizer_config.json")):
        config = read_json(path)
        config.pop("backend", None)
        if config["tokenizer_class"] == _NEW_TOKENIZER:
            config["tokenizer_class"] = _OLD_TOKENIZER
        _write(path, config)


def _prefix_tensors(path: Path) -> None:
    tensors = load_file(path)
    if not all(name.startswith(_PREFIX) for name in tensors):
        save_file({_PREFIX + name: tensor for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def _give_a_layer(directory: Path) -> None:
    """One layer of width 1 that adds zero, in a T5 encoder that has none."""
    config = read_json(directory / "config.json")
    if config["num_layers"] > 0:
        return
    width, tensors = config["d_model"], load_file(directory / "model.safetensors")
    attention, forward = (f"encoder.block.0.layer.{number}" for number in (0, 1))
    for name in "qkv":
        tensors[f"{attention}.SelfAttention.{name}.weight"] = torch.zeros(1, width)
    tensors |= {
        f"{attention}.SelfAttention.o.weight": torch.zeros(width, 1),
        f"{attention}.SelfAttention.relative_attention_bias.weight": torch.zeros(
            config["relative_attention_num_buckets"], 1
        ),
        f"{attention}.layer_norm.weight": torch.ones(width),
        f"{forward}.DenseReluDense.wi.weight": torch.zeros(1, width),
        f"{forward}.DenseReluDense.wo.weight": torch.zeros(width, 1),
        f"{forward}.layer_norm.weight": torch.ones(width),
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    _write(directory / "config.json", {**config, "num_layers": 1, "num_heads": 1, "d_kv": 1, "d_ff": 1})


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make saved pipelines readable for transformers 4 and 5.")
    parser.add_argument("directories", nargs="+", type=Path, help="pipelines, as save_pretrained wrote them")
    for directory in parser.parse_args().directories:
        make_portable(directory)


if __name__ == "__main__":
    main()
