import subprocess
import sys

import pytest
import torch
from diffusers import DiffusionPipeline

import dina_reward.shapes
from dina_reward.alignment.policy import Policy
from dina_reward.shapes.evaluation import evaluate_pipeline, main
from dina_reward.shapes.prompts import sample_prompts
from dina_reward.shapes.shipped import load_pipeline, weights_dir


def test_import_is_light_and_names_resolve():
    code = (
        "import sys, dina_reward.shapes as shapes; assert 'torch' not in sys.modules; "
        "shapes.Scene; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert all(getattr(dina_reward.shapes, name) is not None for name in dina_reward.shapes.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        dina_reward.shapes.nothing  # noqa: B018


def test_everything_shipped_is_small():
    files = [path for path in weights_dir("flow").parent.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 16e6
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pkl")]


@pytest.mark.parametrize(("world", "count"), [("flow", 5), ("ddpm", 3)])
def test_weights_load_in_full_precision(world, count):
    modules = [module for module in load_pipeline(world).components.values() if isinstance(module, torch.nn.Module)]
    assert len(modules) == count
    assert {parameter.dtype for module in modules for parameter in module.parameters()} == {torch.float32}


def test_unknown_weights_are_refused_with_the_choices():
    with pytest.raises(ValueError, match="shipped: ddpm, ddpm-aligned, ddpm-reward, flow, flow-aligned, flow-reward"):
        weights_dir("sd9")
    with pytest.raises(ValueError, match="No world called 'pixel'; there are: flow, ddpm"):
        load_pipeline("pixel")


@pytest.mark.parametrize("world", ["flow", "ddpm"])
def test_generator_draws_well_but_listens_badly(world):
    evaluation = evaluate_pipeline(load_pipeline(world), "held_out", count=96, seed=0)
    assert 0.35 <= evaluation.scores.fit.mean() <= 0.55
    assert evaluation.scores.cleanness.mean() >= 0.6
    assert "96 samples: fit 0." in str(evaluation)


@pytest.mark.parametrize("world", ["flow", pytest.param("ddpm", marks=pytest.mark.slow)])
def test_few_steps_of_second_order_draw_cleaner_than_as_many_of_first(world):
    first, second = (
        evaluate_pipeline(load_pipeline(world), "train", 144, num_inference_steps=8, solver_order=order).scores
        for order in (1, 2)
    )
    assert second.cleanness.mean() - first.cleanness.mean() > 0.01
    assert second.fit.mean() - first.fit.mean() > -0.03


def test_second_order_takes_no_noise():
    with pytest.raises(ValueError, match="second order are deterministic, got eta"):
        evaluate_pipeline(load_pipeline(), count=2, eta=0.5, solver_order=2)


def test_a_lora_is_what_the_command_evaluates(tmp_path, monkeypatch, capsys):
    policy = Policy(load_pipeline(), rank=2, alpha=4)
    with torch.no_grad():
        for number, parameter in enumerate(policy.trainable_parameters().values()):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    policy.save_weights(str(tmp_path))
    expected = str(evaluate_pipeline(policy.pipeline, "held_out", count=4, num_inference_steps=2))
    monkeypatch.setattr("sys.argv", ["evaluation", "--count", "4", "--steps", "2", "--lora", str(tmp_path)])
    main()
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == f"held_out: {expected}"
    assert expected != str(evaluate_pipeline(load_pipeline(), "held_out", count=4, num_inference_steps=2))


# Size, colour, shape and background by chance are 1/2, 1/6, 1/4 and 1/3; the UNet does not hear shapes at all.
@pytest.mark.parametrize(
    ("world", "least"), [("flow", [1 / 2, 1 / 6, 1 / 4, 1 / 3]), ("ddpm", [1 / 2, 1 / 6, 0.2, 1 / 3])]
)
def test_attributes_are_heard_above_chance(world, least):
    right = evaluate_pipeline(load_pipeline(world), "train", count=144, seed=1).scores.attributes.float().mean(dim=0)
    assert (right > torch.tensor(least)).all()


@pytest.mark.parametrize("world", ["flow", "ddpm"])
def test_pipeline_runs_as_a_plain_diffusers_pipeline(world):
    pipeline = DiffusionPipeline.from_pretrained(weights_dir(world))
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(sample_prompts(2, seed=0), num_inference_steps=2).images
    assert [image.size for image in images] == [(32, 32)] * 2
    unknown = pipeline("a zebra on Mars", num_inference_steps=2, guidance_scale=1.0, output_type="pt").images
    assert torch.isfinite(unknown).all()
