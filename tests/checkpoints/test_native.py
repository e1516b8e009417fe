"""Checkpoints: round trips, loud refusals, nothing half written."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dina_reward import CheckpointError, LatentReward, convert_checkpoint
from dina_reward.checkpoints import atomic, read_checkpoint, resolve_checkpoint, write_checkpoint
from dina_reward.checkpoints.native import NATIVE_FILES
from dina_reward.modeling import default_lora_config
from dina_reward.modeling.heads.config import RewardHeadConfig
from dina_reward.modeling.lora import EXCLUDES
from tests.test_reward import CONFIG, PROMPTS, make_reward


Spoil = Callable[[Path], None]


@pytest.fixture(scope="module")
def saved(sd3_pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved") / "reward"
    make_reward(sd3_pipeline).save_pretrained(directory)
    return directory


@pytest.fixture
def native(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "native"))


@pytest.fixture
def reference(parity_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(parity_dir / "reward", tmp_path / "reference"))


def test_round_trip(sd3_pipeline: Any, native: Path, tmp_path: Path) -> None:
    latents = torch.randn(3, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = make_reward(sd3_pipeline)(latents, PROMPTS, seed=0)
    reward = LatentReward.from_pretrained(native, pipeline=sd3_pipeline)
    assert reward.merged
    torch.testing.assert_close(reward(latents, PROMPTS, seed=0), expected, atol=1e-6, rtol=0)
    assert reward.config.backbone_config["num_attention_heads"] == 4
    assert reward.config.scheduler_config["shift"] == 3.0
    assert {path.name for path in native.iterdir()} == set(NATIVE_FILES)
    reward.save_pretrained(tmp_path / "again")
    for name in ("adapter_model.safetensors", "head.safetensors"):
        first, second = load_file(native / name), load_file(tmp_path / "again" / name)
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_configurations_are_equal_bytes(sd3_pipeline: Any, native: Path) -> None:
    values = json.loads((native / "adapter_config.json").read_text())
    assert list(values) == sorted(values)
    assert values["target_modules"] == sorted(values["target_modules"])


def test_loading_leaves_the_global_seed_alone(sd3_pipeline: Any, native: Path) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    LatentReward.from_pretrained(native, pipeline=sd3_pipeline)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    "name", ["config.json", "adapter_config.json", "adapter_model.safetensors", "head.safetensors"]
)
def test_files_of_another_model_are_not_overwritten(sd3_pipeline: Any, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match=f"holds {name} of another model"):
        make_reward(sd3_pipeline).save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("others", [[], ["notes.txt"]])
def test_a_card_written_by_hand_stays(sd3_pipeline: Any, tmp_path: Path, others: list[str]) -> None:
    for name in ("README.md", *others):
        (tmp_path / name).write_text("precious")
    for _ in range(2):
        make_reward(sd3_pipeline).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*NATIVE_FILES, *others}
    assert (tmp_path / "README.md").read_text() == "precious"
    (tmp_path / "README.md").write_text("---\nlibrary_name: dina_reward\n---\nold card")
    make_reward(sd3_pipeline).save_pretrained(tmp_path)
    assert "old card" not in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("killed_at", range(6))
def test_a_kill_while_files_are_replaced_loses_nothing(
    sd3_pipeline: Any, native: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int
) -> None:
    """In a directory that also holds checkpoints of a run, as every output_dir does."""
    (native / "checkpoint-2").mkdir()
    other = make_reward(sd3_pipeline)
    with torch.no_grad():
        other.model.head.head.bias.add_(1)
    replace, calls = os.replace, iter(range(10))

    def dies(*paths: Any) -> None:
        if next(calls) == killed_at:
            raise KeyboardInterrupt
        replace(*paths)

    monkeypatch.setattr(atomic.os, "replace", dies)
    with pytest.raises(KeyboardInterrupt) if killed_at < 5 else contextlib.nullcontext():
        other.save_pretrained(native)
    monkeypatch.setattr(atomic.os, "replace", replace)
    assert torch.equal(read_checkpoint(native).head["head.bias"], other.model.head.head.bias)
    other.save_pretrained(native)
    assert {path.name for path in native.iterdir()} == {*NATIVE_FILES, "checkpoint-2"}


def test_a_kill_between_the_renames_loses_nothing(sd3_pipeline: Any, native: Path) -> None:
    native.rename(native.with_name(f".{native.name}.previous"))
    assert LatentReward.from_pretrained(native, pipeline=sd3_pipeline).config.num_layers == 2


@pytest.mark.skipif(
    not EXCLUDES, reason="PEFT before 0.14 does not know a setting of the adapter that newer ones write"
)
def test_plain_peft_reads_the_adapter(sd3_pipeline: Any, native: Path) -> None:
    from peft import PeftModel

    from dina_reward.families import get_family
    from tests.tiny_models import tiny_sd3_pipeline

    transformer = tiny_sd3_pipeline().transformer
    backbone = get_family("sd3").build_backbone(transformer, num_layers=2, visual_taps=(1, 2), text_taps=(1, 2))
    peft_model = PeftModel.from_pretrained(backbone, str(native))
    weight = load_file(native / "adapter_model.safetensors")
    key = "base_model.model.transformer_blocks.0.attn.to_q.lora_B"
    assert torch.equal(peft_model.state_dict()[f"{key}.default.weight"], weight[f"{key}.weight"])


def test_backbone_beside_the_checkpoint_is_found(sd3_pipeline: Any, tmp_path: Path) -> None:
    sd3_pipeline.transformer.save_pretrained(tmp_path / "base" / "transformer")
    sd3_pipeline.scheduler.save_pretrained(tmp_path / "base" / "scheduler")
    reward = make_reward(sd3_pipeline)
    object.__setattr__(reward.config, "backbone_model_id", "../base")
    reward.save_pretrained(tmp_path / "reward")
    loaded = LatentReward.from_pretrained(tmp_path / "reward")
    latents = torch.randn(3, 16, 8, 8)
    conditioning, index = reward.encode_prompts(PROMPTS)
    rows = conditioning[index]
    embeds = {"prompt_embeds": rows.prompt_embeds, "pooled_prompt_embeds": rows.pooled_prompt_embeds}
    torch.testing.assert_close(loaded(latents, seed=0, **embeds), reward(latents, PROMPTS, seed=0), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="no text encoders"):
        loaded(latents, PROMPTS)


def test_load_weights_is_exact(sd3_pipeline: Any, native: Path) -> None:
    reward = make_reward(sd3_pipeline, trained=False, seed=7).train()
    reward.load_weights(native)
    saved = load_file(native / "head.safetensors")
    assert all(torch.equal(reward.model.head.state_dict()[key], tensor) for key, tensor in saved.items())
    other = LatentReward.from_pretrained(native, pipeline=sd3_pipeline)
    assert all(
        torch.equal(tensor, reward.model.trainable_state()[key])
        for key, tensor in other.model.trainable_state().items()
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise_level": 0.3}, "noise_level: 0.4 there, 0.3 here"),
        ({"variance_scale": 1.0, "variance_offset": 0.1}, "2 of its settings differ .variance_scale: 2.0 there, 1.0"),
        ({"likelihood": "bradley_terry"}, "likelihood"),
        ({"head": RewardHeadConfig(num_attention_heads=4)}, "head: "),
        ({"max_sequence_length": 8}, "max_sequence_length: 16 there, 8 here"),
    ],
)
def test_weights_of_another_reward_are_refused(
    sd3_pipeline: Any, native: Path, changes: dict[str, Any], message: str
) -> None:
    other = LatentReward.from_config(replace(CONFIG, **changes), pipeline=sd3_pipeline)
    with pytest.raises(CheckpointError, match=f"of another reward; .*{message}"):
        other.load_weights(native)


def test_weights_of_another_lora_are_refused(sd3_pipeline: Any, native: Path) -> None:
    lora = default_lora_config(CONFIG, alpha=16)
    other = LatentReward.from_config(CONFIG, pipeline=sd3_pipeline, lora_config=lora)
    with pytest.raises(CheckpointError, match="LoRA lora_alpha: 128 there, 16 here"):
        other.load_weights(native)


def truncate(name: str) -> Spoil:
    def spoil(directory: Path) -> None:
        data = (directory / name).read_bytes()
        (directory / name).write_bytes(data[: len(data) // 2])

    return spoil


def remove(name: str) -> Spoil:
    return lambda directory: (directory / name).unlink()


def edit_json(name: str, change: Callable[[dict[str, Any]], Any]) -> Spoil:
    def spoil(directory: Path) -> None:
        values = json.loads((directory / name).read_text())
        change(values)
        (directory / name).write_text(json.dumps(values))

    return spoil


def flip_a_weight(directory: Path) -> None:
    tensors = load_file(directory / "head.safetensors")
    tensors["head.bias"] += 1
    save_file(tensors, directory / "head.safetensors")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (truncate("head.safetensors"), "head.safetensors is not the file that was saved"),
        (truncate("adapter_model.safetensors"), "adapter_model.safetensors is not the file that was saved"),
        (flip_a_weight, "SHA-256 differs"),
        (remove("head.safetensors"), "incomplete: .*head.safetensors is missing"),
        (remove("adapter_model.safetensors"), "incomplete: .*adapter_model.safetensors is missing"),
        (remove("adapter_config.json"), "incomplete: .*adapter_config.json is missing"),
        (remove("config.json"), "incomplete: .*config.json is missing"),
        (truncate("config.json"), "config.json is not valid JSON"),
        (edit_json("config.json", lambda c: c.pop("sha256")), "is not the file that was saved"),
        (
            edit_json("config.json", lambda c: c.update(depth=3)),
            r"unknown keys in the reward configuration: \['depth'\]",
        ),
        (edit_json("config.json", lambda c: c.update(format_version=9)), "format version 9.*Upgrade"),
        (edit_json("config.json", lambda c: c.update(model_type="bert")), "describes no latent reward"),
        (edit_json("config.json", lambda c: c.update(family="sd9")), "unknown model family 'sd9'"),
        (edit_json("config.json", lambda c: c.update(visual_taps=[1])), "was changed after it was saved"),
        (edit_json("adapter_config.json", lambda c: c.update(r=8)), "adapter_config.json is not the file"),
    ],
)
def test_damaged_native_checkpoints_are_refused(sd3_pipeline: Any, native: Path, spoil: Spoil, message: str) -> None:
    spoil(native)
    with pytest.raises(ValueError, match=message):
        LatentReward.from_pretrained(native, pipeline=sd3_pipeline)


def drop_head_key(directory: Path) -> None:
    path = directory / "checkpoint" / "rm_head.pt"
    state = torch.load(path, weights_only=True)
    del state["query_tokens"]
    torch.save(state, path)


def poison_head(directory: Path) -> None:
    path = directory / "checkpoint" / "rm_head.pt"
    state = torch.load(path, weights_only=True)
    state["head.weight"][0, 0] = float("nan")
    torch.save(state, path)


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (eval, ("1/0",))


def pickle_bomb(directory: Path) -> None:
    torch.save({"head.weight": Payload()}, directory / "checkpoint" / "rm_head.pt")


LORA = "checkpoint/backbone_lora"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop_head_key, r"head does not fit: 1 keys missing \['query_tokens'\]"),
        (poison_head, "not finite in head.weight"),
        (pickle_bomb, "holds more than tensors"),
        (truncate("checkpoint/rm_head.pt"), "truncated or holds more"),
        (remove("checkpoint/rm_head.pt"), "rm_head.pt is missing"),
        (remove(f"{LORA}/adapter_model.safetensors"), "adapter_model.safetensors is missing"),
        (truncate(f"{LORA}/adapter_model.safetensors"), "truncated or no safetensors"),
        (
            edit_json(f"{LORA}/adapter_config.json", lambda c: c.update(r=8)),
            "LoRA rank is 8, .* at most 4",
        ),
        (edit_json(f"{LORA}/adapter_config.json", lambda c: c.update(target_modules=["to_q"])), "keys surplus"),
        (
            edit_json(f"{LORA}/adapter_config.json", lambda c: c.update(peft_type="LOHA")),
            "LOHA adapter; a reward needs",
        ),
        (
            edit_json(f"{LORA}/adapter_config.json", lambda c: c.update(init_lora_weights="pissa")),
            "alters base weights",
        ),
        (edit_json(f"{LORA}/adapter_config.json", lambda c: c.update(new_option=5)), r"\['new_option'\]"),
        (edit_json("config.json", lambda c: c["model"].update(use_t_embed=False)), "use_t_embed=False"),
        (edit_json("config.json", lambda c: c["model"].update(visual_head_idx=[1, 2])), "keys surplus"),
        (
            edit_json(f"{LORA}/adapter_config.json", lambda c: c.update(auto_mapping={"base_model_class": "X"})),
            "backbone class 'X'",
        ),
    ],
)
def test_damaged_reference_checkpoints_are_refused(
    parity_transformer: Any, parity_scheduler: Any, reference: Path, spoil: Spoil, message: str
) -> None:
    spoil(reference)
    with pytest.raises(ValueError, match=message):
        LatentReward.from_pretrained(reference, transformer=parity_transformer, scheduler=parity_scheduler)


def test_a_path_that_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="neither a directory here nor a repository"):
        resolve_checkpoint("./no/such/reward", local_files_only=True)
    with pytest.raises(CheckpointError, match="neither a directory here nor a repository"):
        resolve_checkpoint("nobody/no-such-reward", local_files_only=True)


def test_conversion_keeps_every_tensor(reference: Path, tmp_path: Path) -> None:
    config = convert_checkpoint(reference, tmp_path / "native")
    assert (config.family, config.num_layers, config.visual_taps) == ("sd3", 3, (1, 2, 3))
    before, after = read_checkpoint(reference), read_checkpoint(tmp_path / "native")
    assert after.config == before.config
    for part in ("adapter", "head"):
        first, second = getattr(before, part), getattr(after, part)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
    assert (after.lora_config.r, after.lora_config.lora_alpha) == (4, 8)


def test_a_failed_save_leaves_the_old_checkpoint(
    sd3_pipeline: Any, native: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in native.iterdir()}
    reward = make_reward(sd3_pipeline, trained=False, seed=3)

    def fail(*_: Any) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("dina_reward.checkpoints.native.model_card", fail)
    with pytest.raises(KeyboardInterrupt):
        reward.save_pretrained(native)
    assert {path.name: path.read_bytes() for path in native.iterdir()} == before


def test_saving_beside_other_files_keeps_them(sd3_pipeline: Any, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    make_reward(sd3_pipeline).save_pretrained(tmp_path)
    make_reward(sd3_pipeline, seed=3).save_pretrained(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {*NATIVE_FILES, "notes.txt"}
    read_checkpoint(tmp_path)


def test_model_card(native: Path) -> None:
    card = (native / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: dina_reward\n")
    assert "rank 64, alpha 128" in card
    assert "LatentReward.from_pretrained" in card


def test_push_to_hub_uploads_a_whole_checkpoint(sd3_pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    uploads: dict[str, Any] = {}

    class Api:
        def __init__(self, token: Any = None) -> None:
            uploads["token"] = token

        def create_repo(self, repo_id: str, **kwargs: Any) -> Any:
            uploads["repo"] = (repo_id, kwargs)
            return type("Url", (), {"repo_id": f"me/{repo_id}"})

        def upload_folder(self, folder_path: str, **kwargs: Any) -> Any:
            uploads["files"] = {path.name for path in Path(folder_path).iterdir()}
            uploads["kwargs"] = kwargs
            return type("Commit", (), {"commit_url": "https://hub/commit/1"})

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    url = make_reward(sd3_pipeline).push_to_hub("reward", private=True, token="t")
    assert url == "https://hub/commit/1"
    assert uploads["files"] == set(NATIVE_FILES)
    assert uploads["kwargs"]["repo_id"] == "me/reward"


def test_checkpoints_of_one_reward_are_the_same_bytes(sd3_pipeline: Any, tmp_path: Path) -> None:
    reward = make_reward(sd3_pipeline)
    for name in ("a", "b"):
        write_checkpoint(tmp_path / name, reward.checkpoint())
    for name in NATIVE_FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert read_checkpoint(tmp_path / "a").config == reward.config
    assert reward.config.num_layers == CONFIG.num_layers
