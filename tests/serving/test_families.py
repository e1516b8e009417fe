"""Every family is loaded, served and asked, with its text encoders and without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dina_reward import LatentReward, RemoteReward
from dina_reward.serving import load_served_reward
from tests.families.row import PROMPTS, Row, Setup
from tests.families.rows import ROWS
from tests.serving.conftest import running


def saved(setup: Setup, directory: Path) -> tuple[str, str]:
    """Paths of a reward and of its pipeline."""
    setup.pipeline.save_pretrained(directory / "pipeline")
    reward = LatentReward.from_config(setup.reward_config(), pipeline=setup.pipeline).eval()
    reward.save_pretrained(directory / "reward")
    return str(directory / "reward"), str(directory / "pipeline")


def embeddings(reward: LatentReward) -> dict[str, Any]:
    """Of the prompts, by the pipeline that was loaded: templates that a pipeline was given afterwards are not saved."""
    limit = reward.config.max_sequence_length
    conditioning = reward.family.encode_prompts(reward.prompt_encoder.pipeline, PROMPTS, max_sequence_length=limit)
    names = ("prompt_embeds", "pooled_prompt_embeds", "prompt_embeds_mask")
    return {name: value for name in names if (value := getattr(conditioning, name)) is not None}


@pytest.mark.parametrize(
    "row", [pytest.param(row, id=row.name, marks=() if row.name == "flux" else pytest.mark.slow) for row in ROWS]
)
def test_a_family_is_served(row: Row, tmp_path: Path) -> None:
    setup = Setup.of(row)
    paths = saved(setup, tmp_path)
    here = load_served_reward(*paths)
    assert getattr(here.prompt_encoder.pipeline, setup.family.denoiser_attribute) is None
    assert here.prompt_encoder.pipeline.vae is None
    expected = here(setup.latents, PROMPTS, seed=0)
    packed = row.given(setup, setup.latents)
    with running(here) as server:
        remote = RemoteReward(server.url)
        assert torch.equal(remote(setup.latents, PROMPTS, seed=0), expected)
        given = embeddings(here)
        torch.testing.assert_close(remote(setup.latents, seed=0, **given), expected, rtol=0, atol=1e-5)
        if packed.ndim == 3:
            torch.testing.assert_close(remote(packed, PROMPTS, seed=0, **_pixels(setup)), expected, rtol=0, atol=1e-5)
        generator = torch.Generator().manual_seed(1)
        drawn = remote(packed, PROMPTS, generator=generator, **(_pixels(setup) if packed.ndim == 3 else {}))
        again = here(setup.latents, PROMPTS, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(drawn, again, rtol=0, atol=1e-5)
    lean = load_served_reward(*paths, text_encoders=False)
    assert lean.prompt_encoder.pipeline is None
    with running(lean) as server:
        remote = RemoteReward(server.url)
        torch.testing.assert_close(remote(setup.latents, seed=0, **given), expected, rtol=0, atol=1e-5)
        with pytest.raises(ValueError, match=r"no_text_encoders.*--no-text-encoders"):
            remote(setup.latents, PROMPTS, seed=0)


def _pixels(setup: Setup) -> dict[str, int]:
    """Size of the images, which packed latents do not say."""
    factor = int(setup.pipeline.vae_scale_factor)
    return {"height": factor * setup.latents.shape[-2], "width": factor * setup.latents.shape[-1]}


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no device 'npu:3'"):
        load_served_reward(*_shipped(), device="npu:3")
    with pytest.raises(ValueError, match="cannot load the pipeline"):
        load_served_reward(_shipped()[0], str(tmp_path))


def _shipped() -> tuple[str, str]:
    from dina_reward.shapes import weights_dir

    return str(weights_dir("flow-reward")), str(weights_dir("flow"))
