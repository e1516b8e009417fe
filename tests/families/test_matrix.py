"""One matrix over all model families: a new family adds a row and gets every test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from dina_reward import LatentReward
from dina_reward.alignment.policy import Policy
from dina_reward.alignment.policy_weights import save_lora
from dina_reward.alignment.sampling.rollout import sample
from dina_reward.families import families, family_of, get_family
from dina_reward.likelihood import PreferenceLoss, ThurstoneModel
from dina_reward.search import search
from tests.families.row import PROMPTS, Row, Setup
from tests.families.rows import ROWS


CPU = torch.device("cpu")


def test_every_family_has_a_row() -> None:
    assert {row.name for row in ROWS} == {family.name for family in families()}


@pytest.fixture(scope="module", params=ROWS, ids=lambda row: row.name)
def setup(request: pytest.FixtureRequest) -> Setup:
    return Setup.of(request.param)


def test_found_from_pipeline_and_denoiser(setup: Setup) -> None:
    assert family_of(setup.pipeline) is setup.family
    assert family_of(setup.denoiser) is setup.family


def test_unknown_family_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown model family 'sd9'; this version supports: "):
        get_family("sd9")
    with pytest.raises(ValueError, match=r"Linear belongs to no supported.*StableDiffusion3Pipeline"):
        family_of(torch.nn.Linear(1, 1))


# --- backbone ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_backbone_equals_the_full_model_at_the_taps(setup: Setup) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    handles = [
        block.register_forward_hook(lambda _, __, output: seen.append(setup.row.block_output(output, setup)))
        for block in setup.row.blocks(setup.backbone())
    ]
    setup.predict()
    for handle in handles:
        handle.remove()
    features = setup.backbone()(setup.latents, setup.timestep, setup.conditioning)
    readable = torch.ones(features.text[0].shape[:2], dtype=torch.bool)
    if features.text_mask is not None:
        readable = features.text_mask
        assert torch.equal(readable.sum(dim=1), setup.conditioning.token_mask.sum(dim=1))
    for tap, visual, text in zip(setup.row.taps, features.visual, features.text, strict=True):
        torch.testing.assert_close(text[readable], seen[tap - 1][0][readable], rtol=0, atol=1e-6)
        torch.testing.assert_close(visual, seen[tap - 1][1], rtol=0, atol=1e-6)
    sizes = setup.family.feature_sizes(setup.denoiser.config).at(setup.row.taps)
    widths = (sizes.hidden,) * len(setup.row.taps) if isinstance(sizes.hidden, int) else sizes.hidden
    assert tuple(visual.shape[-1] for visual in features.visual) == widths
    assert {text.shape[-1] for text in features.text} == {sizes.text or sizes.hidden}
    assert features.temb.shape == (2, sizes.temb)


@torch.no_grad()
def test_image_tokens_lie_on_their_grid_row_by_row(setup: Setup) -> None:
    inputs = (setup.timestep, setup.conditioning)
    first_block = setup.family.build_backbone(setup.denoiser, num_layers=1, visual_taps=(1,), text_taps=())
    before = first_block(setup.latents, *inputs)
    if setup.family.has_frames:
        assert before.grid is None
        return
    assert before.grid is not None
    rows, columns = before.grid
    assert before.visual[0].shape[1] == rows * columns
    side = setup.latents.shape[-1] // columns
    assert (rows * side, columns * side) == setup.latents.shape[-2:]
    changed = setup.latents.clone()
    changed[..., :side, -side:] += 3.0  # upper right corner
    after = first_block(changed, *inputs)
    assert (after.visual[0] - before.visual[0]).norm(dim=-1).argmax(dim=1).tolist() == [columns - 1] * 2


@torch.no_grad()
def test_prompt_index_selects_rows(setup: Setup) -> None:
    backbone = setup.backbone()
    index = torch.tensor([1, 1])
    picked = backbone(setup.latents, setup.timestep, setup.conditioning, index)
    direct = backbone(setup.latents, setup.timestep, setup.conditioning[index])
    torch.testing.assert_close(picked.visual[-1], direct.visual[-1])
    torch.testing.assert_close(picked.text[-1], direct.text[-1])
    assert picked.text_mask is None or torch.equal(picked.text_mask, direct.text_mask)


def test_gradients_reach_the_latents_with_and_without_checkpointing(setup: Setup) -> None:
    gradients = []
    for recompute in (False, True):
        backbone = setup.backbone()
        backbone.gradient_checkpointing = recompute
        latents = setup.latents.clone().requires_grad_()
        backbone(latents, setup.timestep, setup.conditioning).visual[-1].square().sum().backward()
        gradients.append(latents.grad)
    assert gradients[0] is not None
    assert float(gradients[0].abs().sum()) > 0
    assert torch.equal(gradients[0], gradients[1])


@torch.no_grad()
def test_backbone_compiles_whole(setup: Setup) -> None:
    backbone = setup.backbone()
    expected = backbone(setup.latents, setup.timestep, setup.conditioning)
    compiled = torch.compile(backbone, backend="eager", fullgraph=True)
    features = compiled(setup.latents, setup.timestep, setup.conditioning)
    torch.testing.assert_close(features.visual[-1], expected.visual[-1])


@torch.no_grad()
def test_partial_load_equals_the_full_model(setup: Setup, tmp_path: Path) -> None:
    attribute = setup.family.denoiser_attribute
    setup.denoiser.save_pretrained(tmp_path / attribute)
    partial = setup.family.load_denoiser(str(tmp_path), num_layers=setup.row.num_layers, subfolder=attribute)
    features = setup.backbone(partial)(setup.latents, setup.timestep, setup.conditioning)
    expected = setup.backbone()(setup.latents, setup.timestep, setup.conditioning)
    assert torch.equal(features.visual[-1], expected.visual[-1])
    assert torch.equal(features.text[-1], expected.text[-1])
    assert sum(p.numel() for p in partial.parameters()) < sum(p.numel() for p in setup.denoiser.parameters())


def test_more_blocks_than_the_model_has_are_refused(setup: Setup) -> None:
    blocks = setup.family.num_blocks(setup.denoiser.config)
    with pytest.raises(ValueError, match=f"reads {blocks + 1} blocks but this .* has {blocks}"):
        setup.family.build_backbone(setup.denoiser, num_layers=blocks + 1, visual_taps=(1,), text_taps=(1,))


# --- latents and pixels --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_decoding_equals_the_pipelines_own(setup: Setup) -> None:
    height, width = setup.row.size
    arguments = {"height": height, "width": width, "num_inference_steps": 2, **setup.row.arguments}
    images, latents = (
        setup.row.result(
            setup.pipeline(prompt="a cat", generator=torch.Generator().manual_seed(0), output_type=kind, **arguments)
        )
        for kind in ("pt", "latent")
    )
    latents = setup.row.returned(setup, latents)
    spatial = setup.family.unpack_latents(latents, setup.denoiser.config, height=height, width=width)
    assert spatial.shape[1:] == setup.latent_shape()
    torch.testing.assert_close(setup.family.decode_latents(setup.pipeline, spatial), images, rtol=0, atol=1e-5)


def test_packing_is_undone_by_unpacking(setup: Setup) -> None:
    height, width = setup.row.size
    latents = torch.randn(2, *setup.latent_shape())
    config = setup.denoiser.config
    packed = setup.family.pack_latents(latents)
    assert torch.equal(setup.family.unpack_latents(packed, config, height=height, width=width), latents)
    assert torch.equal(setup.family.unpack_latents(latents, config), latents)
    if packed.ndim == 3:
        with pytest.raises(ValueError, match="pass `height=` and `width=`"):
            setup.family.unpack_latents(packed, config)
        with pytest.raises(ValueError, match="do not belong to an image of 64 x 64 pixels"):
            setup.family.unpack_latents(packed, config, height=64, width=64)


@torch.no_grad()
def test_images_and_latents_round_trip_in_shape(setup: Setup) -> None:
    shape = setup.latent_shape()
    (height, width), side = setup.row.size, setup.row.pixels_per_side
    pixels = setup.family.decode_latents(setup.pipeline, torch.randn(2, *shape))
    assert pixels.shape[-3:] == (3, height, width)
    assert 0 <= float(pixels.min()) <= float(pixels.max()) <= 1
    images = [_picture(frame) for frame in (pixels[:, 0] if pixels.ndim == 5 else pixels)]
    latents = setup.family.encode_images(setup.pipeline, images)
    assert latents.shape[-2:] == shape[-2:]
    assert latents.dtype == torch.float32
    setup.family.check_latents(latents, setup.denoiser.config)
    odd = setup.family.encode_images(setup.pipeline, [images[0].resize((width + side - 1, height + side // 2))])
    assert odd.shape[1:] == latents.shape[1:]
    with pytest.raises(ValueError, match="must have one size"):
        setup.family.encode_images(setup.pipeline, [images[0], images[0].resize((32, 32))])
    with pytest.raises(ValueError, match=f"at least {side} x {side}"):
        setup.family.encode_images(setup.pipeline, [images[0].resize((side // 2, side // 2))])


def _picture(pixels: Tensor) -> Any:
    from PIL import Image

    return Image.fromarray((pixels.permute(1, 2, 0) * 255).round().byte().numpy())


@pytest.mark.parametrize("other", ROWS, ids=lambda row: row.name)
def test_latents_of_another_layout_are_refused(setup: Setup, other: Row) -> None:
    if other.latents[1] == setup.row.latents[1] and len(other.latents) == len(setup.row.latents):
        setup.family.check_latents(torch.zeros(other.latents), setup.denoiser.config)  # nothing tells the two apart
        return
    with pytest.raises(ValueError, match=setup.row.name):
        setup.family.check_latents(torch.zeros(other.latents), setup.denoiser.config)


# --- the reward ----------------------------------------------------------------------------------------------------


def trained_reward(setup: Setup, **options: Any) -> LatentReward:
    """A reward whose LoRA is not a no-op."""
    reward = LatentReward.from_config(setup.reward_config(), pipeline=setup.pipeline, **options)
    with torch.no_grad():
        for name, parameter in reward.model.trainable_state().items():
            if "lora_B" in name:
                parameter.fill_(0.05)
    return reward


def add_policy_lora(setup: Setup, pipeline: Any) -> Any:
    """A LoRA on the generator that is not a no-op, as during alignment."""
    denoiser = getattr(pipeline, setup.family.denoiser_attribute)
    denoiser.requires_grad_(False)
    targets = list(setup.family.policy_lora_targets)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        denoiser.add_adapter(LoraConfig(r=4, lora_alpha=12, init_lora_weights=False, target_modules=targets), "policy")
    return denoiser


def test_scores_are_deterministic_and_do_not_depend_on_the_batch(setup: Setup) -> None:
    reward = trained_reward(setup).eval()
    latents = torch.cat([setup.latents, setup.latents.flip(-1)])
    prompts, seeds = [*PROMPTS, PROMPTS[0], "x"], [3, 4, 5, 6]
    scores = reward(latents, prompts, seed=seeds)
    assert torch.equal(scores, reward(latents, prompts, seed=seeds))
    assert len(set(scores.tolist())) == 4
    torch.testing.assert_close(reward(latents, prompts, seed=seeds, batch_size=3), scores, rtol=0, atol=1e-5)
    alone = torch.cat([reward(latents[i : i + 1], prompts[i], seed=seeds[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(alone, scores, rtol=0, atol=1e-5)
    height, width = setup.row.latents[-2] * 8, setup.row.latents[-1] * 8
    packed = setup.family.pack_latents(latents)
    if packed.ndim != latents.ndim:
        height, width = (
            side * setup.row.pixels_per_side // setup.family.latent_multiple(setup.denoiser.config)
            for side in setup.row.latents[-2:]
        )
        torch.testing.assert_close(
            reward(packed, prompts, seed=seeds, height=height, width=width), scores, rtol=0, atol=1e-6
        )


def test_merging_changes_speed_and_not_scores(setup: Setup) -> None:
    reward = trained_reward(setup)
    state = {name: tensor.clone() for name, tensor in reward.model.state_dict().items()}
    reward.model.eval()
    apart = reward(setup.latents, PROMPTS, seed=0)
    reward.merge_lora()
    assert reward.merged
    torch.testing.assert_close(reward(setup.latents, PROMPTS, seed=0), apart, rtol=0, atol=1e-5)
    reward.unmerge_lora()
    for name, tensor in reward.model.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=1e-6)


def test_bfloat16_backbone_with_float32_scores(setup: Setup) -> None:
    exact = trained_reward(setup).eval()
    rounded = trained_reward(setup, torch_dtype=torch.bfloat16)
    assert {p.dtype for p in rounded.model.trainable_state().values()} == {torch.float32}
    assert rounded.model.dtype == torch.bfloat16
    scores, expected = (reward(setup.latents, PROMPTS, seed=0) for reward in (rounded.eval(), exact))
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected, rtol=0, atol=0.1)


def test_four_bit_backbone_scores_and_trains(setup: Setup) -> None:
    exact = trained_reward(setup).eval()(setup.latents, PROMPTS, seed=0)
    reward = trained_reward(setup, load_in_4bit=True)
    scores = reward.score(setup.latents, PROMPTS, seed=0).scores
    assert 0 < float((scores.detach() - exact).abs().max()) < 0.5
    scores.sum().backward()
    lora = [p.grad for name, p in reward.model.trainable_state().items() if "lora_A" in name]
    assert sum(gradient is not None and float(gradient.abs().sum()) > 0 for gradient in lora) > 0


def test_a_training_step_lowers_the_loss(setup: Setup) -> None:
    reward = LatentReward.from_config(setup.reward_config(), pipeline=setup.pipeline)
    reward.model.enable_gradient_checkpointing()
    parameters = list(reward.model.trainable_state().values())
    optimizer, loss_function = (
        torch.optim.AdamW(parameters, lr=1e-3),
        PreferenceLoss("thurstone_nll", ThurstoneModel()),
    )
    losses = []
    for _ in range(2):
        better, worse = (
            reward.score_noisy(side, PROMPTS, noise_level=0.4) for side in (setup.latents, -setup.latents)
        )
        loss = loss_function.per_pair(better, worse, torch.full((2,), 0.4), torch.ones(2)).mean()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[1] < losses[0]
    assert all(parameter.grad is not None for parameter in reward.model.head.parameters())
    lora = [p for name, p in reward.model.trainable_state().items() if "lora_B" in name]
    assert sum(float(p.grad.abs().sum()) > 0 for p in lora if p.grad is not None) == len(lora)


def test_shared_reward_agrees_with_its_own_copy_and_spares_the_generator(setup: Setup, tmp_path: Path) -> None:
    pipeline = setup.row.pipeline()
    denoiser = add_policy_lora(setup, pipeline)
    with torch.no_grad():
        before = setup.predict(denoiser)
    state = {name: tensor.clone() for name, tensor in denoiser.state_dict().items()}
    flags = {name: parameter.requires_grad for name, parameter in denoiser.named_parameters()}
    modules = [(name, type(module), module.training) for name, module in denoiser.named_modules()]

    shared = LatentReward.from_config(setup.reward_config(), pipeline=pipeline, share_backbone=True)
    with torch.no_grad():
        for name, parameter in shared.model.trainable_state().items():
            if "lora_B" in name:
                parameter.fill_(0.05)
    latents = setup.latents.clone().requires_grad_()
    scores = shared.score(latents, PROMPTS, seed=0).scores
    scores.sum().backward()
    assert float(latents.grad.abs().sum()) > 0  # type: ignore[union-attr]

    with torch.no_grad():
        after = setup.predict(denoiser)
    assert torch.equal(before, after)
    assert all(torch.equal(tensor, state[name]) for name, tensor in denoiser.state_dict().items())
    assert {name: parameter.requires_grad for name, parameter in denoiser.named_parameters()} == flags
    assert [(name, type(module), module.training) for name, module in denoiser.named_modules()] == modules
    assert all(parameter.grad is None for parameter in denoiser.parameters())
    owned = {tensor.data_ptr() for tensor in denoiser.state_dict().values()}
    extra = {name for name, tensor in shared.model.state_dict().items() if tensor.data_ptr() not in owned}
    assert extra == set(shared.model.trainable_state())

    shared.save_pretrained(tmp_path / "reward")
    standalone = LatentReward.from_pretrained(tmp_path / "reward", pipeline=setup.pipeline)
    torch.testing.assert_close(standalone(setup.latents, PROMPTS, seed=0), scores.detach(), rtol=0, atol=1e-5)
    untrained = LatentReward.from_config(setup.reward_config(), pipeline=setup.pipeline)
    assert not torch.allclose(untrained(setup.latents, PROMPTS, seed=0), scores.detach(), atol=1e-4)


# --- the policy ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_policy_lora_is_read_back_by_the_pipeline(setup: Setup, tmp_path: Path) -> None:
    denoiser = add_policy_lora(setup, setup.row.pipeline())
    attribute = setup.family.denoiser_attribute
    save_lora(setup.pipeline, denoiser, str(tmp_path), attribute, "policy")
    fresh = setup.row.pipeline()
    fresh.load_lora_weights(str(tmp_path))
    tuned = setup.predict(denoiser)
    assert float((tuned - setup.predict()).abs().max()) > 1e-3
    loaded = setup.predict(getattr(fresh, attribute))
    torch.testing.assert_close(loaded, tuned, rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
def test_ode_rollout_equals_the_pipelines_own_output(setup: Setup, guided: bool) -> None:
    scale, arguments = setup.row.guidance_scale, setup.row.arguments
    if guided:
        assert setup.row.guided is not None
        scale, arguments = setup.row.guided
    pipeline, (height, width) = setup.row.pipeline(), setup.row.size
    noise = torch.randn(1, *setup.latent_shape(), generator=torch.Generator().manual_seed(3))
    output = pipeline(
        prompt=PROMPTS[1],
        height=height,
        width=width,
        latents=setup.row.given(setup, noise),
        num_inference_steps=4,
        output_type="latent",
        **arguments,
    )
    policy = Policy(pipeline, rank=2, alpha=4, guidance_scale=scale, max_sequence_length=16)
    bound = policy.bind(policy.encode([PROMPTS[1]], CPU), policy.encode_negative(CPU))
    latents = sample(bound, noise, policy.sampler(4, noise.shape[1:])).latents
    assert float((latents - noise).abs().max()) > 0.1
    expected = setup.row.returned(setup, setup.row.result(output))
    atol = 1e-5 * float(latents.abs().max())
    torch.testing.assert_close(setup.family.pack_latents(latents), expected, rtol=0, atol=atol)


def test_search_finds_better_samples_within_its_budget(setup: Setup) -> None:
    height, width = setup.row.size
    options: dict[str, Any] = {"num_inference_steps": 4, "height": height, "width": width, "max_sequence_length": 16}
    options |= {"num_frames": setup.row.num_frames, "guidance_scale": setup.row.guidance_scale}

    def near_zero(latents: Tensor) -> Tensor:
        return -latents.float().square().flatten(1).mean(1)

    plain = search(setup.pipeline, near_zero, PROMPTS, method="best_of_n", budget=1, **options)
    for method, settings in (("best_of_n", {}), ("stepwise", {"branches": 2, "window": (0.0, 0.25)})):
        result = search(setup.pipeline, near_zero, PROMPTS, method=method, budget=2, **settings, **options)
        assert result.latents.shape == (2, *setup.latent_shape())
        assert 0 < result.denoiser_calls <= 2 * 2 * 4
        assert bool(result.scores.isfinite().all())
        if method == "best_of_n":
            assert bool((result.scores >= plain.scores - 1e-4).all())


def test_guidance_mixes_two_predictions(setup: Setup) -> None:
    assert setup.row.guided is not None
    scale, negative = setup.row.guided[0], setup.conditioning[[1, 0]]
    with torch.no_grad():
        conditional, unconditional = setup.predict(), setup.predict(conditioning=negative)
        guided = setup.predict(negative_conditioning=negative, guidance_scale=scale)
    assert float((guided - conditional).abs().max()) > 1e-4
    if not setup.row.classifier_free:
        assert torch.equal(guided, setup.predict(guidance_scale=scale))
        return
    expected = setup.family.guide(unconditional, conditional, scale)
    torch.testing.assert_close(guided, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(setup.predict(negative_conditioning=negative, guidance_scale=1.0), conditional)
    with pytest.raises(ValueError, match="needs negative_conditioning"):
        setup.predict(guidance_scale=scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_replayed_log_probs_are_those_of_the_rollout_bit_for_bit(setup: Setup, dtype: torch.dtype) -> None:
    pipeline = setup.row.pipeline().to(dtype)
    policy = Policy(pipeline, rank=2, alpha=4, guidance_scale=setup.row.guidance_scale, max_sequence_length=16)
    shape = setup.latents.shape[1:]
    sampler = policy.sampler(4, shape, eta=0.7)
    bound = policy.bind(policy.encode(PROMPTS, CPU), policy.encode_negative(CPU))
    generator = torch.Generator().manual_seed(0)
    noise, steps = (torch.randn(2, *lead, *shape, generator=generator) for lead in ((), (2,)))
    rollout = sample(bound, noise.to(policy.storage_dtype), sampler, stochastic=(0, 2), step_noise=steps)
    for index in rollout.trained:
        state, after = rollout.states[index], rollout.states[index + 1]
        prediction = bound(state, sampler.timesteps[index].expand(2))
        assert prediction.requires_grad
        step = sampler.replay_step(index, state, prediction, next_latents=after)
        assert torch.equal(torch.exp(step.log_prob - rollout.log_probs[index]), torch.ones(2))
        step.log_prob.sum().backward()
    gradients = [p.grad for name, p in policy.trainable_parameters().items() if "lora_B" in name]
    assert all(gradient is not None and bool(gradient.isfinite().all()) for gradient in gradients)
    assert sum(float(gradient.abs().sum()) for gradient in gradients if gradient is not None) > 0


def test_four_bit_weights_under_the_lora(setup: Setup) -> None:
    policy = Policy(setup.row.pipeline(), rank=2, alpha=4, load_in_4bit=True)
    with torch.no_grad():
        exact = setup.predict()
    prediction = setup.predict(policy.denoiser)
    assert float((prediction - exact).norm() / exact.norm()) < 0.5
    assert float((prediction - exact).abs().max()) > 0
    prediction.square().sum().backward()
    assert any(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in policy.trainable_parameters().values())
