"""The base installation: what it declares, what it can do alone, and what it says of the rest."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from dina_reward import LatentReward
from dina_reward.lazy import EXTRAS, MissingExtraError, missing_extra
from dina_reward.shapes import load_pipeline, sample_prompts


ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NAMES = re.compile(r"^[\w-]+")

WITHOUT_EXTRAS = f"""
import importlib, pkgutil, sys

class Absent:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, *place):
        return None if name.split(".")[0] in {sorted(EXTRAS)} else self.finder.find_spec(name, *place)

sys.meta_path[:] = map(Absent, sys.meta_path)
import dina_reward
from dina_reward.lazy import MissingExtraError

for package in ("", ".alignment", ".data", ".integrations", ".serving", ".training", ".cli"):
    module = importlib.import_module("dina_reward" + package)
    for name in module.__all__:
        try:
            getattr(module, name)
        except MissingExtraError as error:
            print("missing:", error)
        else:
            print("there:", package + "." + name)
"""


def names(requirements: list[str]) -> set[str]:
    return {match[0] for requirement in requirements if (match := NAMES.match(requirement))}


def test_extras_are_those_of_the_project() -> None:
    base = names(PROJECT["dependencies"])
    for library, extra in EXTRAS.items():
        assert library.replace("_", "-") in names(PROJECT["optional-dependencies"][extra]), library
        assert library not in base
    assert names(PROJECT["optional-dependencies"]["all"]) == {"dina-reward"}


def test_floors_that_ci_installs_are_the_declared_ones() -> None:
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / ".ci" / "floors.txt").read_text(), re.MULTILINE))
    declared = dict(requirement.split(">=") for requirement in PROJECT["dependencies"])
    assert pins.keys() == declared.keys()
    for name in declared.keys() - {"torch", "huggingface_hub"}:
        assert (pins[name] + ".0").startswith(f"{declared[name]}."), name


def test_trl_is_never_lifted() -> None:
    (trl,) = (requirement for requirement in PROJECT["optional-dependencies"]["train"] if "trl" in requirement)
    assert trl == "trl>=0.23"


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="what the extra brings is taken away here")
def test_without_extras_names_say_what_brings_them() -> None:
    result = subprocess.run([sys.executable, "-c", WITHOUT_EXTRAS], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    there = set(re.findall(r"^there: (\S+)$", result.stdout, re.MULTILINE))
    assert {".LatentReward", ".convert_checkpoint", ".DiffusionGRPOConfig", ".integrations.as_trl_reward"} <= there
    missing = re.findall(r"^missing: (\S+) needs (\w+), which is not installed: (.*)$", result.stdout, re.MULTILINE)
    assert ("dina_reward.cli.main", "typer", 'pip install "dina-reward[train]"') in missing
    assert ("dina_reward.serving.create_app", "starlette", 'pip install "dina-reward[serve]"') in missing
    assert ("dina_reward.serving.serve", "uvicorn", 'pip install "dina-reward[serve]"') in missing
    assert ".serving.RemoteReward" in there  # a trainer that asks a server needs none
    assert {name for name, _, _ in missing} > {"dina_reward.data.read_preferences", "dina_reward.evaluate_preferences"}


def test_without_trl_alone_trainers_are_there() -> None:
    code = (
        "import sys; sys.modules['trl'] = None\n"
        "from dina_reward import LatentReward\n"
        "import dina_reward.integrations as integrations\n"
        "[getattr(integrations, name) for name in integrations.__all__]\n"
        "try:\n"
        "    import rich, pyarrow\n"
        "except ModuleNotFoundError:\n"
        "    pass\n"
        "else:\n"
        "    from dina_reward import DiffusionGRPOTrainer, LatentRewardTrainer\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]


def test_other_missing_modules_are_not_explained() -> None:
    error = ModuleNotFoundError("No module named 'something'", name="something")
    assert missing_extra(error, "x") is error
    explained = missing_extra(ModuleNotFoundError("x", name="trl.trainer"), "ConfigParser")
    assert isinstance(explained, MissingExtraError)
    assert str(explained) == 'ConfigParser needs trl, which is not installed: pip install "dina-reward[train]"'


RECORDED = {
    "shapes": [18.1842, 18.0156, 18.1767, 20.0279, 23.3977, 25.1101, 23.9931, 19.8301],
    "shapes-ddpm": [-11.7507, -4.0441, -4.6980, -11.4525, -9.3462, -8.1918, -9.3677, -11.3865],
}
"""Scores of the shipped weights, equal to the last of these digits under transformers 4.40, 4.56.2 and 5.23."""


@pytest.mark.parametrize(("name", "world"), [("shapes", "flow"), ("shapes-ddpm", "ddpm")])
def test_the_embedded_world_scores_alike_everywhere(name: str, world: str) -> None:
    """Scores are the recorded ones, and sharing agrees with a backbone of its own, under every version."""
    pipe: Any = load_pipeline(world)
    shared = LatentReward.from_pretrained(name, pipeline=pipe, share_backbone=True)
    prompts = sample_prompts(8, "held_out", seed=0)
    shape = (8, pipe.vae.config.latent_channels, 8, 8)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    scores = shared(latents, prompts, seed=0)
    assert torch.allclose(scores, torch.tensor(RECORDED[name]), atol=2e-3)
    own = LatentReward.from_pretrained(name, pipeline=pipe)
    assert torch.allclose(own(latents, prompts, seed=0), scores, atol=1e-3)
    embeds = shared.encode_prompts(prompts)[0].prompt_embeds
    assert (embeds[0] - embeds[1]).abs().max() > 0.1
