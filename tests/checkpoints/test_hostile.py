"""Damaged and hostile checkpoints: each is refused by name, at once, and nothing of it is executed or half loaded."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dina_reward import CheckpointError
from dina_reward.checkpoints import check_state, read_checkpoint
from dina_reward.checkpoints.native import ADAPTER_FILE, HEAD_FILE, NATIVE_FILES, _config_digest
from dina_reward.checkpoints.parts import ADAPTER_CONFIG_FILE, CONFIG_FILE, is_bounded_pattern
from dina_reward.checks.stored import file_digest
from tests.test_reward import make_reward


ENDLESS = "(([a-z_0-9.]+)+)+X"
WEIGHTS = (ADAPTER_CONFIG_FILE, ADAPTER_FILE, HEAD_FILE)

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def good(sd3_pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("good") / "reward"
    make_reward(sd3_pipeline).save_pretrained(directory)
    return directory


@pytest.fixture
def bad(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "bad"))


def seal(directory: Path) -> None:
    """Makes the digests right again, as whoever means harm does."""
    values = json.loads((directory / CONFIG_FILE).read_text())
    settings = {
        name: value for name, value in values.items() if name not in ("model_type", "format_version", "sha256")
    }
    digests = {name: file_digest(directory / name) for name in WEIGHTS}
    values["sha256"] = {**digests, CONFIG_FILE: _config_digest(settings)}
    (directory / CONFIG_FILE).write_text(json.dumps(values))


def edit(directory: Path, name: str, **changes: Any) -> None:
    values = json.loads((directory / name).read_text())
    (directory / name).write_text(json.dumps({**values, **changes}))
    seal(directory)


def test_sealing_alone_changes_nothing(bad: Path) -> None:
    seal(bad)
    assert read_checkpoint(bad).config.num_layers == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": ENDLESS}, "in target_modules, which is invalid or could take forever"),
        ({"exclude_modules": ENDLESS}, "in exclude_modules"),
        ({"alpha_pattern": {ENDLESS: 1}}, "in alpha_pattern"),
        ({"rank_pattern": {ENDLESS: 16}}, "in rank_pattern"),
        ({"layers_pattern": [ENDLESS]}, "in layers_pattern"),
        ({"target_modules": "(("}, "in target_modules"),
        ({"target_modules": [1]}, "no list of names of layers"),
        ({"target_modules": 3}, "adapter_config"),
        ({"r": 10**8}, "LoRA rank is 100000000, but its tensors have at most 64"),
        ({"r": "64"}, "LoRA rank"),
        ({"rank_pattern": {"to_q": 10**8}}, "LoRA rank is 100000000"),
        ({"megatron_config": {"a": 1}, "megatron_core": "evil.module"}, "does not have: .'megatron_config'"),
        ({"layer_replication": [[0, 1000000]]}, "layer_replication"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"init_lora_weights": "pissa"}, "alters base weights"),
        ({"peft_type": "IA3"}, "holds a IA3 adapter"),
        ({"future_option": True}, "future_option"),
    ],
)
def test_hostile_adapter_configurations(bad: Path, changes: dict[str, Any], message: str) -> None:
    edit(bad, ADAPTER_CONFIG_FILE, **changes)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(bad)


def head(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda values: {"head": {**values["head"], **changes}}


def scheduler(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda values: {"scheduler_config": {**values["scheduler_config"], **changes}}


POOLED = {"kind": "pooled", "use_text_features": False, "use_time_embedding": False}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (scheduler(num_train_timesteps=10**9), "num_train_timesteps must be an integer from 2 to 100000"),
        (scheduler(num_train_timesteps=1), "num_train_timesteps"),
        (scheduler(shift=-1.0), "shift must be a positive number"),
        (scheduler(shift=float("nan")), "shift must be finite"),
        (head(num_hidden_layers=10**6, **POOLED), "num_hidden_layers is 1000000"),
        (head(width=2**30), "head width is 1073741824, but its tensors have at most"),
        (head(num_queries=10**9), "num_queries is 1000000000"),
        (head(width=True), "width must be int"),
        (head(kind=["query"]), "unknown head kind"),
        (head(unknown=1), "unknown keys"),
        (lambda _: {"head": None}, "head"),
        (lambda _: {"head": []}, "head"),
        (lambda _: {"score_scale": float("nan")}, "score_scale must be finite float, got nan"),
        (lambda _: {"score_scale": "10"}, "score_scale must be finite float, got '10'"),
        (lambda _: {"variance_offset": float("inf")}, "variance_offset"),
        (lambda _: {"noise_level": True}, "noise_level"),
        (lambda _: {"noise_level": 1.5}, r"noise_level must lie in \[0, 1\]"),
        (lambda _: {"noise_level": []}, "noise_level"),
        (lambda _: {"max_sequence_length": 10**6}, "max_sequence_length must lie in"),
        (lambda _: {"num_layers": 10**9}, "num_layers must lie in"),
        (lambda _: {"visual_taps": "12"}, "visual_taps"),
        (lambda _: {"backbone_config": None}, "backbone_config must be dict"),
        (lambda _: {"backbone_model_id": 3}, "backbone_model_id must be str"),
        (lambda _: {"family": ["sd3"]}, "family must be str"),
        (lambda _: {"family": "sd9"}, "unknown model family 'sd9'.*sd3"),
        (lambda _: {"format_version": 99}, "format version 99"),
    ],
)
def test_hostile_configurations(bad: Path, change: Callable[[dict[str, Any]], dict[str, Any]], message: str) -> None:
    edit(bad, CONFIG_FILE, **change(json.loads((bad / CONFIG_FILE).read_text())))
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(bad)


@pytest.mark.parametrize("changes", [{"num_attention_heads": 2}, {"num_attention_heads": 4}])
def test_what_no_tensor_shows_is_sealed(bad: Path, changes: dict[str, Any]) -> None:
    values = json.loads((bad / CONFIG_FILE).read_text())
    values["head"].update(changes)
    (bad / CONFIG_FILE).write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"config\.json was changed after it was saved"):
        read_checkpoint(bad)


def test_some_settings_may_be_edited_by_hand(bad: Path) -> None:
    values = json.loads((bad / CONFIG_FILE).read_text())
    (bad / CONFIG_FILE).write_text(json.dumps({**values, "noise_level": 0.2, "score_shift": 1}))
    assert read_checkpoint(bad).config.noise_level == 0.2


@pytest.mark.parametrize("name", [CONFIG_FILE, ADAPTER_CONFIG_FILE])
@pytest.mark.parametrize(
    "text", ["[" * 10**6, '{"a":' * 10**5, "[]", "null", "", "{", '{"r": ' + "9" * 5000 + "}", "\ufeff{}", "\x00"]
)
def test_texts_that_are_no_configuration(bad: Path, name: str, text: str) -> None:
    (bad / name).write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=name if name == CONFIG_FILE else "json"):
        read_checkpoint(bad)


@pytest.mark.parametrize("digests", [None, [], "x", {}, {"head.safetensors": None}])
def test_digests_of_the_wrong_kind(bad: Path, digests: Any) -> None:
    values = json.loads((bad / CONFIG_FILE).read_text())
    (bad / CONFIG_FILE).write_text(json.dumps({**values, "sha256": digests}))
    with pytest.raises(CheckpointError, match="SHA-256"):
        read_checkpoint(bad)


@pytest.mark.parametrize("name", [ADAPTER_FILE, HEAD_FILE])
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_tensors_of_other_kinds_of_numbers(bad: Path, name: str, dtype: torch.dtype) -> None:
    save_file({key: tensor.to(dtype) for key, tensor in load_file(bad / name).items()}, bad / name)
    seal(bad)
    with pytest.raises(CheckpointError, match="expected float32, bfloat16 or float16"):
        read_checkpoint(bad)


def cuts(data: bytes, name: str) -> Iterator[int]:
    """Ends at which something is half there."""
    size = len(data)
    yield from {0, 1, size // 2, size - 1}
    if name.endswith(".safetensors"):
        (header,) = struct.unpack("<Q", data[:8])
        yield from {7, 8, 9, 8 + header - 1, 8 + header, 8 + header + 1}


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("name", [name for name in NATIVE_FILES if name != "README.md"])
def test_truncated_files(good: Path, bad: Path, name: str, sealed: bool) -> None:
    data = (good / name).read_bytes()
    for end in cuts(data, name):
        (bad / name).write_bytes(data[:end])
        if sealed and name != CONFIG_FILE:
            seal(bad)
        # The last byte of a JSON file is a line feed at most, which nobody misses.
        if name.endswith(".json") and data[end:].strip() == b"" and (sealed or name == CONFIG_FILE):
            continue
        with pytest.raises(CheckpointError):
            read_checkpoint(bad)


@pytest.mark.parametrize("name", [ADAPTER_FILE, HEAD_FILE])
def test_flipped_bits_in_the_header_of_tensors(good: Path, bad: Path, name: str) -> None:
    """Refused, or so harmless that every name, shape and kind is still right."""
    expected = read_checkpoint(good)
    data = (good / name).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    refused = 0
    for position in [*range(16), *range(16, 8 + length, max(1, length // 40))]:
        flipped = bytearray(data)
        flipped[position] ^= 1 << (position % 7)
        (bad / name).write_bytes(flipped)
        with pytest.raises(CheckpointError, match="SHA-256"):
            read_checkpoint(bad)
        seal(bad)
        try:
            found = read_checkpoint(bad)
            check_state(found.adapter, expected.adapter, "LoRA adapter")
            check_state(found.head, expected.head, "head")
        except CheckpointError:
            refused += 1
    assert refused > 30


class Runs:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_a_pickled_head_never_runs(parity_dir: Path, tmp_path: Path) -> None:
    reference = Path(shutil.copytree(parity_dir / "reward", tmp_path / "reference"))
    file = reference / "checkpoint" / "rm_head.pt"
    data = file.read_bytes()
    for evil in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))):
        evil({"head.bias": Runs(tmp_path / "ran")}, file)
        with pytest.raises(CheckpointError, match="rm_head"):
            read_checkpoint(reference)
        assert not (tmp_path / "ran").exists()
    for end in range(0, len(data), max(1, len(data) // 12)):
        file.write_bytes(data[:end])
        with pytest.raises(CheckpointError, match="rm_head"):
            read_checkpoint(reference)


@pytest.mark.parametrize(
    "change",
    [
        {"reward_head": [1]},
        {"num_transformer_layers": "x"},
        {"visual_head_idx": 3},
        {"visual_head_idx": None},
        {"backbone_model_id": 3},
    ],
)
def test_published_configurations_of_the_wrong_kind(parity_dir: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    reference = Path(shutil.copytree(parity_dir / "reward", tmp_path / "reference"))
    values = json.loads((reference / CONFIG_FILE).read_text())
    values["model"].update(change)
    (reference / CONFIG_FILE).write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"config\.json describes no"):
        read_checkpoint(reference)


@pytest.mark.parametrize(
    ("pattern", "bounded"),
    [
        (r".*\.23\..*\.(add_[qkv]_proj|to_add_out)", True),
        ("to_q", True),
        (r"blocks\.\d{1,2}\.attn\.(to_q|to_k)$", True),
        (ENDLESS, False),
        ("(a|a)*", False),
        ("(a*)*b", False),
        (".*" * 5, False),
        (r"(a)\1", False),
        ("((", False),
        ("a" * 501, False),
        ("(?=a*)a", False),
    ],
)
def test_patterns_are_bounded(pattern: str, bounded: bool) -> None:
    assert is_bounded_pattern(pattern) == bounded
