"""The examples in docstrings run, on tiny models, and give what they are said to give."""

from __future__ import annotations

import contextlib
import doctest
import importlib
import io
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import Trainer

from dina_reward import alignment, data, distill, evaluation, families, recipes, search, training
from dina_reward.alignment.policy import Policy
from dina_reward.families import TapFeatures, registry
from dina_reward.families.sd3 import SD3Family
from dina_reward.modeling import default_reward_config
from dina_reward.shapes import build_pool, load_pipeline, load_reward, sample_pairs
from tests.data.preference_files import npy, write_json, write_parquet
from tests.distill.helpers import Brightness, NoiseSource
from tests.docs.pages import ROOT, SOURCES, docstring_examples
from tests.docs.world import shorten_training
from tests.evaluation.tiny_clip import save_tiny_clip
from tests.serving.conftest import running
from tests.tiny_models import tiny_sd3_pipeline
from tests.training.tiny_reward import LATENT_SHAPE, separable_pairs, tiny_reward
from tests.training.toy import ToyModel, ToyTrainer, toy_arguments, toy_data


VARYING = {"calibrate_variance", "LevelSampler"}
"""Examples whose figures depend on the models, or of which only the shape is of interest."""

SERVER = "http://reward-host:8000"
"""Address of a scoring server in examples."""

TINY_RUN = {
    "height": 16, "width": 16, "num_inference_steps": 6, "max_sequence_length": 8, "report_to": "none", "use_cpu": True,
    "save_strategy": "no", "disable_tqdm": True,
}  # fmt: skip
REQUIRED = ("--model_name_or_path", "m", "--reward_model_path", "r", "--dataset_name", "d", "--output_dir", "out")
"""What a recipe's command line has to say."""

TINY_TRAINING = {"report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
CASES = [
    pytest.param(path, name, examples, id=f"{path.relative_to(ROOT)}:{name}")
    for path in SOURCES
    for name, examples in docstring_examples(path)
]


def with_defaults(cls: type, **defaults: Any) -> Callable[..., Any]:
    """A configuration class whose runs are small where the example does not say otherwise."""
    return lambda *args, **options: cls(*args, **{**defaults, **options})


def tiny_features(code: str) -> TapFeatures:
    """Features of as many taps as the example's head reads."""
    visual, text = (
        [torch.randn(2, 16, 64) for _ in range(int(count))] for count in re.findall(r"num_\w+_taps=(\d)", code)
    )
    return TapFeatures(visual, text, temb=torch.randn(2, 64), grid=(4, 4))


def small_pipeline() -> Any:
    """A tiny pipeline whose own call makes images of 32 x 32 pixels from short prompts."""
    pipeline = tiny_sd3_pipeline(sample_size=4)
    pipeline.tokenizer_max_length = 8
    return pipeline


class Names(dict[str, Any]):
    """What an example takes for granted, made when it is asked for: its module's names, ours, and small models."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        for package in (data, evaluation, recipes, families, alignment, training, distill):
            self.update({name: getattr(package, name) for name in package.__all__})
        self.update(vars(module))
        self.update(torch=torch, DataLoader=DataLoader, Trainer=Trainer, prompts=["a cat", "a dog"])
        self.update(device=torch.device("cpu"), timestep=torch.tensor([500.0, 300.0]), credit=np.ones(2))
        for package, base, settings in (
            (alignment, alignment.AlignmentConfig, TINY_RUN),
            (search, alignment.AlignmentConfig, TINY_RUN),
            (training, training.LatentRewardTrainingConfig, TINY_TRAINING),
        ):
            if module.__name__.startswith(package.__name__):
                small = {
                    key: value for key, value in self.items() if isinstance(value, type) and issubclass(value, base)
                }
                self.update({key: with_defaults(value, **settings) for key, value in small.items()})

    def __missing__(self, name: str) -> Any:
        self[name] = MAKERS[name](self)
        return self[name]


MAKERS: dict[str, Callable[[Names], Any]] = {
    "pipe": lambda names: small_pipeline(),
    "pipeline": lambda names: load_pipeline(),
    "reward": lambda names: tiny_reward(pipeline=names["pipe"]),
    "model": lambda names: names["reward"].model,
    "config": lambda names: default_reward_config(names["pipe"]),
    "policy": lambda names: Policy(names["pipe"], rank=2, alpha=4, max_sequence_length=8),
    "predict": lambda names: names["policy"].bind(
        names["policy"].encode(["a cat", "a dog"], torch.device("cpu")), None
    ),
    "latents": lambda names: torch.randn(2, *LATENT_SHAPE),
    "noise": lambda names: torch.randn(2, *LATENT_SHAPE),
    "better_latents": lambda names: torch.randn(2, *LATENT_SHAPE),
    "worse_latents": lambda names: torch.randn(2, *LATENT_SHAPE),
    "images": lambda names: torch.rand(1, 3, 32, 32),
    "pairs": lambda names: separable_pairs(16),
    "rows": lambda names: SimpleNamespace(bucket_of=np.zeros(64, dtype=np.int16)),
}


def write_files(directory: Path) -> None:
    """The datasets and models that examples read from the working directory."""
    for name in ("pairs.json", "HPDv3/train.json"):
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        for number in range(2):
            Image.new("RGB", (256, 256), (100 * number, 50, 0)).save(path.parent / f"{number}.png")
        row = {"path1": "0.png", "path2": "1.png", "confidence": 0.99}
        write_json(path, [{"prompt": f"prompt {number}", **row} for number in range(4)])
    for name in ("preferences", "fresh-pairs"):
        separable_pairs(16).save(directory / name)
    latents = {"latent1": npy(np.ones(LATENT_SHAPE, np.float16)), "latent2": npy(np.zeros(LATENT_SHAPE, np.float16))}
    shapes = {f"{side}_shape": list(LATENT_SHAPE) for side in latents}
    (directory / "latents").mkdir()
    write_parquet(
        directory / "latents" / "0.parquet", [{"prompt": "p", "detailed_results": None, **latents, **shapes}]
    )
    (directory / "latents" / "index.csv").write_text(
        "global_id,parquet_path,row_group,row_index,width,height,bucket_id\n0,0.parquet,0,0,64,64,0\n"
    )


def substituted(code: str, directory: Path) -> str:
    """An example with small models in place of the published ones that it names."""
    for name in ("path/or/hub-id", "yuvalkirstain/PickScore_v1"):
        code = code.replace(name, str(directory / name))
    return code.replace('"cuda"', '"cpu"')


def run_examples(examples: list[doctest.Example], names: Names, directory: Path) -> list[tuple[str, str]]:
    """Runs examples one after another; what is printed and what the docstring says, where it says anything."""
    compared = []
    for example in examples:
        with contextlib.redirect_stdout(io.StringIO()) as output:
            exec(compile(substituted(example.source, directory), "docstring", "single"), names)
        if example.want:
            compared.append((output.getvalue(), example.want))
    return compared


def of_one_example(name: str, code: str) -> dict[str, Any]:
    """What a single example takes for granted."""
    if name == "EMACallback":
        model, rows = ToyModel(), toy_data()
        return {
            "model": model,
            "rows": rows,
            "MyTrainer": ToyTrainer,
            "args": toy_arguments("out", save_strategy="no"),
        }
    if name == "calibrate_variance":
        pipeline = load_pipeline()
        pairs = sample_pairs(build_pool(pipeline, "held_out", count=24, seed=0), "held_out", count=48, seed=0)
        return {"reward": load_reward(pipeline=pipeline), "load_preferences": lambda path: pairs}
    if name == "JudgeLabeller":
        return {"my_judge": Brightness(), "PipelineSource": lambda *args, **options: NoiseSource()}
    if name == "RewardRefresh":
        groups = {"num_generations": 2, "per_device_train_batch_size": 2, "steps_per_generation": 1}
        args = alignment.DiffusionNFTConfig("out", **TINY_RUN, **groups)
        return {"judge": Brightness(), "audit_prompts": ["a bird"], "args": args}
    if name == "register_family":
        return {"SD3Family": SD3Family}
    return {"features": tiny_features(code)} if "features" in code else {}


@pytest.mark.parametrize(("path", "name", "examples"), CASES)
def test_example_runs(
    path: Path, name: str, examples: list[doctest.Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
    text = "".join(example.source for example in examples)
    if any(f'"{folder}' in text for folder in ("pairs.json", "HPDv3", "preferences", "fresh-pairs", "latents/")):
        write_files(tmp_path)
    names = Names(module)
    names.update(of_one_example(name, text))
    if "path/or/hub-id" in text:
        names["reward"].save_pretrained(tmp_path / "path" / "or" / "hub-id")
    if "PickScore_v1" in text:
        save_tiny_clip(tmp_path / "yuvalkirstain" / "PickScore_v1")
    if 'CachedPreferences("cache")' in text and "build_cache" not in text:
        cache = importlib.import_module("dina_reward.data.cache")
        write_files(tmp_path)
        cache.build_cache(data.read_preferences(tmp_path / "pairs.json"), names["pipeline"], tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_FAMILIES", dict(registry._FAMILIES))
    monkeypatch.setattr(sys, "argv", ["recipe.py", *REQUIRED])
    shorten_training(monkeypatch)
    served = running(names["reward"].eval()) if SERVER in text else contextlib.nullcontext()
    with served as server:
        if server is not None:
            examples = [doctest.Example(each.source.replace(SERVER, server.url), each.want) for each in examples]
        for printed, documented in run_examples(examples, names, tmp_path):
            assert name in VARYING or printed == documented


def test_examples_are_found() -> None:
    assert len(CASES) > 30
    with pytest.raises(NameError, match="undefined_name"):
        run_examples(doctest.DocTestParser().get_examples(">>> undefined_name\n"), Names(doctest), Path())
