"""The launch configurations, read by accelerate itself."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from accelerate import DistributedType
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser


DIRECTORY = Path(__file__).parents[2] / "recipes" / "configs" / "accelerate"
TYPES = {
    "ddp": DistributedType.MULTI_GPU,
    "fsdp2": DistributedType.FSDP,
    "deepspeed_zero2": DistributedType.DEEPSPEED,
}


def test_all_configurations_are_here():
    assert {path.stem for path in DIRECTORY.iterdir()} == set(TYPES)


@pytest.mark.parametrize("name", TYPES)
def test_accelerate_knows_every_key(name):
    config = load_config_from_file(str(DIRECTORY / f"{name}.yaml"))
    assert config.distributed_type == TYPES[name]
    assert config.num_processes > 1
    # `load_config_from_file` does not look into the sections; `accelerate launch` turns their keys into its arguments.
    arguments = {action.dest for action in launch_command_parser()._actions}
    sections = {**config.fsdp_config, **config.deepspeed_config}
    assert set(sections) <= arguments, set(sections) - arguments


@pytest.mark.parametrize("name", TYPES)
def test_header_shows_a_launch_line_with_existing_files(name):
    text = (DIRECTORY / f"{name}.yaml").read_text()
    assert text.startswith("# ")
    assert f"accelerate launch --config_file recipes/configs/accelerate/{name}.yaml" in text
    for path in re.findall(r"recipes/[\w/.]+\.(?:py|yaml)", text):
        assert (DIRECTORY.parents[2] / path).is_file(), path


def test_unknown_keys_fail(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text((DIRECTORY / "ddp.yaml").read_text() + "num_procs: 2\n")
    with pytest.raises(ValueError, match="num_procs"):
        load_config_from_file(str(path))


def test_fsdp_plugin_accepts_the_values_and_wraps_blocks(monkeypatch):
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils.dataclasses import get_module_class_from_name

    from tests.tiny_models import tiny_sd3_transformer

    config = load_config_from_file(str(DIRECTORY / "fsdp2.yaml")).fsdp_config
    environment_names = {"FSDP_TRANSFORMER_LAYER_CLS_TO_WRAP": "FSDP_TRANSFORMER_CLS_TO_WRAP"}
    for key, value in config.items():
        monkeypatch.setenv(
            environment_names.get(key.upper(), key.upper()),
            str(value).lower() if value in (True, False) else str(value),
        )
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.cpu_ram_efficient_loading is False
    transformer = tiny_sd3_transformer()
    (wrapped,) = [get_module_class_from_name(transformer, name) for name in plugin.transformer_cls_names_to_wrap]
    assert wrapped is type(transformer.transformer_blocks[0])
    plugin.set_auto_wrap_policy(transformer)


def test_named_block_classes_are_those_of_diffusers():
    """The table in the FSDP configuration against what the classes themselves say."""
    import diffusers

    text = (DIRECTORY / "fsdp2.yaml").read_text()
    for model in (
        "SD3Transformer2DModel",
        "FluxTransformer2DModel",
        "ZImageTransformer2DModel",
        "QwenImageTransformer2DModel",
    ):
        assert ",".join(getattr(diffusers, model)._no_split_modules) in text, model
    assert {"BasicTransformerBlock", "ResnetBlock2D"} <= set(diffusers.UNet2DConditionModel._no_split_modules)
