"""What recipes share: prompts, judges, models, where a run resumes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dina_reward.recipes import RecipeArguments
from dina_reward.recipes import alignment as recipes
from dina_reward.shapes import Oracle
from dina_reward.shapes.alignment import oracle_scores


def arguments(**changes: Any) -> RecipeArguments:
    return RecipeArguments(
        **{"model_name_or_path": "shapes", "reward_model_path": "shapes", "dataset_name": "shapes", **changes}
    )


def test_import_loads_neither_torch_nor_diffusers() -> None:
    code = (
        "import sys, dina_reward.recipes, dina_reward.recipes.arguments\n"
        "print({'torch', 'diffusers', 'transformers'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "set()", result.stderr


def test_every_argument_has_help() -> None:
    assert all(field.metadata["help"] for field in RecipeArguments.__dataclass_fields__.values())


def test_prompts_from_a_folder(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("a cat\n\n a dog \n", encoding="utf-8")
    (tmp_path / "test.txt").write_text("a bird\na fish\na fox\n", encoding="utf-8")
    given = arguments(dataset_name=str(tmp_path), max_eval_prompts=2)
    assert recipes.load_prompts(given, seed=0) == ["a cat", "a dog"]
    assert recipes.load_eval_prompts(given) == ["a bird", "a fish"]
    assert recipes.load_eval_prompts(arguments(dataset_test_split=None)) is None
    assert recipes.load_eval_reward_funcs(given) == []


def test_prompts_and_judge_of_the_embedded_world() -> None:
    first, second = (recipes.load_prompts(arguments(), seed=seed) for seed in (0, 1))
    assert len(first) == 480
    assert first != second
    assert sorted(first) == sorted(second)
    held_out = recipes.load_eval_prompts(arguments(max_eval_prompts=5, dataset_test_split="held_out"))
    assert held_out is not None
    assert len(held_out) == 5
    assert not set(held_out) & set(first)
    assert recipes.load_eval_reward_funcs(arguments()) == [oracle_scores]


def test_rewards_by_dotted_name() -> None:
    reward: Any = object()
    given = arguments(reward_funcs=["math.sqrt"], eval_reward_funcs=["dina_reward.shapes.oracle.Oracle"])
    assert [f is reward or f.__name__ for f in recipes.load_reward_funcs(given, reward)] == [True, "sqrt"]
    assert recipes.load_eval_reward_funcs(given) == [Oracle, oracle_scores]
    for name, message in (
        ("math.sqroot", "cannot import"),
        ("nowhere.f", "cannot import"),
        ("f", "dotted"),
        ("math.pi", "dotted"),
    ):
        with pytest.raises(ValueError, match=message):
            recipes.import_function(name)


@pytest.mark.parametrize(
    ("given", "expected"),
    [("true", True), (True, True), ("False", None), (None, None), ("out/checkpoint-2", "out/checkpoint-2")],
)
def test_resume_point(given: str | bool | None, expected: str | bool | None) -> None:
    assert recipes.resume_point(given) == expected


def test_bad_dtype() -> None:
    with pytest.raises(ValueError, match="unknown torch_dtype 'float33'; choose one of float32, bfloat16, float16"):
        arguments(torch_dtype="float33")


def test_an_unsupported_family_is_refused_before_its_weights_are_fetched(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(
        json.dumps({"_class_name": "KandinskyPipeline", "_diffusers_version": "0.36.0"})
    )
    with pytest.raises(ValueError, match="KandinskyPipeline belongs to no supported model family"):
        recipes.load_models(arguments(model_name_or_path=str(tmp_path)), "cpu")


def test_models_from_directories_are_those_of_the_embedded_world(tmp_path: Path) -> None:
    from dina_reward.shapes import weights_dir

    pipeline, reward = recipes.load_models(arguments(), "cpu")
    assert reward.shares_backbone
    given = arguments(
        model_name_or_path=str(weights_dir("flow")),
        reward_model_path=str(weights_dir("flow-reward")),
        share_backbone=False,
    )
    other, copied = recipes.load_models(given, "cpu")
    assert not copied.shares_backbone
    latents = pipeline(
        "a red circle", num_inference_steps=2, output_type="latent", max_sequence_length=6, height=32, width=32
    )
    scores = [model(latents.images, "a red circle", seed=0) for model in (reward, copied)]
    assert abs(float(scores[0] - scores[1])) < 1e-4
    assert type(other) is type(pipeline)
