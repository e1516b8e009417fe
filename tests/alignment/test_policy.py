from __future__ import annotations

import json

import pytest
import torch
from accelerate import cpu_offload
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from dina_reward.alignment.policy import LORA_WEIGHTS_NAME, Policy
from tests.alignment.tiny_policy import (
    DEVICE,
    generate,
    make_policy,
    randomise,
    tiny_pipeline,
    train_steps,
    trained,
    velocity_of,
)
from tests.tiny_models import tiny_sd_pipeline


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_adapter_trains_and_in_float32(dtype):
    policy = make_policy(dtype=dtype)
    trainable = {name: p for name, p in policy.denoiser.named_parameters() if p.requires_grad}
    assert trainable
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in trainable.items())
    assert policy.storage_dtype == dtype
    assert not policy.denoiser.training


def test_reference_is_the_model_without_lora_and_leaves_no_trace():
    base = velocity_of(make_policy())
    policy = make_policy()
    assert torch.equal(velocity_of(policy), base)  # a fresh adapter changes nothing
    randomise(policy)
    trained = velocity_of(policy)
    assert not torch.allclose(trained, base)
    flags = [p.requires_grad for p in policy.denoiser.parameters()]
    with policy.reference():
        assert torch.equal(velocity_of(policy), base)
    assert [p.requires_grad for p in policy.denoiser.parameters()] == flags
    assert torch.equal(velocity_of(policy), trained)


def test_guidance_mixes_the_empty_prompt():
    plain, guided = make_policy(), make_policy(guidance_scale=3.0)
    conditional, unconditional = velocity_of(plain), velocity_of(plain, ("", ""))
    expected = unconditional + 3 * (conditional - unconditional)
    torch.testing.assert_close(velocity_of(guided), expected, atol=1e-5, rtol=1e-5)
    assert plain.encode_negative(DEVICE) is None


def test_saved_lora_loads_into_a_plain_pipeline(tmp_path):
    policy = make_policy()
    randomise(policy)
    policy.save_lora(str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == [LORA_WEIGHTS_NAME]

    fresh = tiny_pipeline()
    before = generate(fresh)
    fresh.load_lora_weights(str(tmp_path))
    torch.testing.assert_close(generate(fresh), generate(policy.pipeline))
    assert not torch.allclose(generate(fresh), before)


@pytest.mark.parametrize("alpha", [2, 3, 8])
def test_saved_lora_has_its_strength_for_readers_of_tensors_alone(tmp_path, alpha):
    policy, other = (Policy(tiny_pipeline(), rank=2, alpha=alpha, max_sequence_length=8) for _ in range(2))
    randomise(policy)
    policy.save_lora(str(tmp_path))
    for source in (str(tmp_path), load_file(tmp_path / LORA_WEIGHTS_NAME)):
        fresh = tiny_pipeline()
        fresh.load_lora_weights(source)
        torch.testing.assert_close(generate(fresh), generate(policy.pipeline), atol=1e-4, rtol=1e-4)
    other.load_lora(str(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(trained(other), trained(policy), strict=True))


def test_lora_files_that_keep_their_strength_in_the_metadata_are_read(tmp_path):
    policy, other = make_policy(), make_policy()
    randomise(policy)
    type(policy.pipeline).save_lora_weights(
        str(tmp_path),
        transformer_lora_layers=get_peft_model_state_dict(policy.denoiser, adapter_name="policy"),
        transformer_lora_adapter_metadata={"r": 2, "lora_alpha": 4},
    )
    other.load_lora(str(tmp_path))
    assert torch.equal(velocity_of(other), velocity_of(policy))


def test_damaged_lora_files_are_named(tmp_path):
    policy = make_policy()
    policy.save_lora(str(tmp_path))
    path = tmp_path / LORA_WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=f"{LORA_WEIGHTS_NAME} is damaged"):
        policy.load_lora(str(tmp_path))


def test_layers_without_effect_are_refused():
    fused = tiny_pipeline()
    fused.transformer.fuse_qkv_projections()
    for full in (False, True):
        with pytest.raises(ValueError, match="unfuse_qkv_projections"):
            Policy(fused, rank=2, alpha=2, train_full_model=full)
    for targets, message in {
        ("to_q", "to_qq"): r"\['to_qq'\] match no layer of this SD3Transformer2DModel; its linear layers are .*to_v",
        "to_q": "must be a list of names of layers.*got 'to_q'",
        (): "must be a list of names of layers",
    }.items():
        with pytest.raises(ValueError, match=message):
            Policy(tiny_pipeline(), rank=2, alpha=2, target_modules=targets)


def test_saved_lora_restores_bit_for_bit(tmp_path):
    policy, other = make_policy(), make_policy()
    randomise(policy)
    policy.save_lora(str(tmp_path))
    other.load_lora(str(tmp_path))
    assert torch.equal(velocity_of(policy), velocity_of(other))
    assert all(p.dtype == torch.float32 for p in other.denoiser.parameters() if p.requires_grad)


@pytest.mark.parametrize("full", [False, True])
def test_a_compiled_pipeline_trains_and_saves_the_model_inside(tmp_path, full):
    pipeline = tiny_pipeline()
    pipeline.transformer = torch.compile(pipeline.transformer, backend="eager")
    policy, plain = make_policy(pipeline=pipeline, train_full_model=full), make_policy(train_full_model=full)
    policy.max_sequence_length = 8
    assert policy.trainable_parameters().keys() == plain.trainable_parameters().keys()
    randomise(policy)
    policy.save_weights(str(tmp_path))
    plain.load_weights(str(tmp_path))
    assert torch.equal(velocity_of(plain), velocity_of(policy))
    plain.save_weights(str(tmp_path / "plain"))
    randomise(plain)
    policy.load_weights(str(tmp_path / "plain"))
    assert not torch.equal(velocity_of(plain), velocity_of(policy))
    if full:
        config = json.loads((tmp_path / "transformer/config.json").read_text())
        assert config["_class_name"] == "SD3Transformer2DModel"


def test_wrong_lora_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no pytorch_lora_weights.safetensors"):
        make_policy().load_lora(str(tmp_path))
    policy = make_policy()
    policy.save_lora(str(tmp_path))
    with pytest.raises(ValueError, match="another shape"):
        make_policy(rank=3).load_lora(str(tmp_path))
    tensors = load_file(tmp_path / LORA_WEIGHTS_NAME)
    name, _ = tensors.popitem()
    save_file(tensors, tmp_path / LORA_WEIGHTS_NAME)
    with pytest.raises(ValueError, match=f"1 tensors are missing.*{name.removeprefix('transformer.')}"):
        policy.load_lora(str(tmp_path))


def test_a_pipeline_that_has_an_adapter_is_refused():
    policy = make_policy()
    with pytest.raises(ValueError, match=r"already has the adapter\(s\) policy"):
        Policy(policy.pipeline, rank=2, alpha=2)


def test_guidance_scale_can_be_overridden():
    policy = make_policy(guidance_scale=3.0)
    latents, timestep = torch.randn(2, 16, 4, 4), torch.full((2,), 500.0)
    conditioning, negative = policy.encode(["a cat", "a dog"], DEVICE), policy.encode_negative(DEVICE)
    assert policy.encode_negative(DEVICE, guidance_scale=1.0) is None
    with torch.no_grad():
        guided = policy.bind(conditioning, negative)(latents, timestep)
        plain = policy.bind(conditioning, negative, guidance_scale=1.0)(latents, timestep)
        unconditional = policy.bind(policy.encode(["", ""], DEVICE), None, guidance_scale=1.0)(latents, timestep)
    torch.testing.assert_close(guided, unconditional + 3 * (plain - unconditional), atol=1e-5, rtol=1e-5)
    one = make_policy()
    torch.testing.assert_close(
        one.bind(conditioning, one.encode_negative(DEVICE, guidance_scale=3.0), guidance_scale=3.0)(latents, timestep),
        guided,
    )


def test_full_model_trains_every_weight_in_float32():
    policy = make_policy(train_full_model=True)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in policy.denoiser.parameters())
    assert not policy.denoiser.training
    assert not hasattr(policy.denoiser, "peft_config")
    losses = train_steps(policy, 5, learning_rate=1e-3)
    assert losses[-1] < 0.98 * losses[0]


def test_full_model_computes_in_bfloat16_under_autocast_over_float32_weights():
    policy = make_policy(train_full_model=True)
    exact = velocity_of(policy)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = velocity_of(policy)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_full_model_needs_float32(dtype):
    with pytest.raises(ValueError, match=f"needs a float32 denoiser, this one has {dtype}.*bf16=True"):
        make_policy(dtype=dtype, train_full_model=True)


def test_full_model_reference_is_the_initial_model():
    policy = make_policy(train_full_model=True, keep_reference=True)
    base = velocity_of(policy)
    randomise(policy)
    before, after = trained(policy), velocity_of(policy)
    with policy.reference():
        assert torch.equal(velocity_of(policy), base)
    assert all(torch.equal(a, b) for a, b in zip(before, trained(policy), strict=True))
    assert torch.equal(velocity_of(policy), after)
    assert all(p.requires_grad for p in policy.denoiser.parameters())
    with policy.reference():
        assert torch.equal(velocity_of(policy), base)


def test_full_model_without_copy_has_no_reference():
    policy = make_policy(train_full_model=True)
    with (
        pytest.raises(ValueError, match="set beta to 0, train a LoRA, or pass keep_reference=True"),
        policy.reference(),
    ):
        pass


def test_full_model_saves_what_diffusers_reads(tmp_path):
    from diffusers import SD3Transformer2DModel

    policy, other = make_policy(train_full_model=True), make_policy(train_full_model=True)
    randomise(policy)
    (tmp_path / "trainer_state.json").write_text("{}")
    policy.save_weights(str(tmp_path))
    policy.save_weights(str(tmp_path))  # replaces
    assert sorted(path.name for path in tmp_path.iterdir()) == ["trainer_state.json", "transformer"]
    files = {path.name for path in (tmp_path / "transformer").iterdir()}
    assert files == {".dina_reward", "config.json", "diffusion_pytorch_model.safetensors"}
    assert json.loads((tmp_path / "transformer/config.json").read_text())["_class_name"] == "SD3Transformer2DModel"

    fresh = tiny_pipeline()
    before = generate(fresh)
    fresh.transformer = SD3Transformer2DModel.from_pretrained(tmp_path, subfolder="transformer")
    state = policy.denoiser.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in fresh.transformer.state_dict().items())
    torch.testing.assert_close(generate(fresh), generate(policy.pipeline), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(generate(fresh), before)

    other.load_weights(str(tmp_path))
    assert torch.equal(velocity_of(other), velocity_of(policy))


def test_wrong_full_weights_are_refused(tmp_path):
    policy = make_policy(train_full_model=True)
    with pytest.raises(ValueError, match="is it a checkpoint of a LoRA"):
        policy.load_weights(str(tmp_path))
    policy.save_weights(str(tmp_path))
    path = tmp_path / "transformer/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["proj_out.bias"] = torch.zeros(3)
    save_file(tensors, path)
    with pytest.raises(ValueError, match="1 tensors are missing, unexpected or of another shape.*'proj_out.bias'"):
        policy.load_weights(str(tmp_path))
    tensors.pop("proj_out.bias")
    save_file(tensors, path)
    with pytest.raises(ValueError, match="first is 'proj_out.bias'"):
        policy.load_weights(str(tmp_path))


def test_large_full_weights_load_from_several_files(tmp_path, monkeypatch):
    import huggingface_hub

    save, policy = huggingface_hub.save_torch_state_dict, make_policy(train_full_model=True)
    randomise(policy)
    monkeypatch.setattr(
        huggingface_hub,
        "save_torch_state_dict",
        lambda *args, **kwargs: save(*args, **{**kwargs, "max_shard_size": 1e5}),
    )
    policy.save_weights(str(tmp_path))
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1
    other = make_policy(train_full_model=True)
    other.load_weights(str(tmp_path))
    assert torch.equal(velocity_of(other), velocity_of(policy))


def test_an_interrupted_save_leaves_the_old_weights(tmp_path, monkeypatch):
    import huggingface_hub

    policy = make_policy(train_full_model=True)
    policy.save_weights(str(tmp_path))
    old = load_file(tmp_path / "transformer/diffusion_pytorch_model.safetensors")
    randomise(policy)

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(huggingface_hub, "save_torch_state_dict", fail)
    with pytest.raises(OSError, match="disk full"):
        policy.save_weights(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["transformer"]
    kept = load_file(tmp_path / "transformer/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(kept[name], old[name]) for name in old)


def test_lora_files_are_not_for_full_models(tmp_path):
    policy = make_policy(train_full_model=True)
    with pytest.raises(ValueError, match="use save_weights"):
        policy.save_lora(str(tmp_path))
    with pytest.raises(ValueError, match="use load_weights"):
        policy.load_lora(str(tmp_path))


def test_weights_of_a_lora_are_the_lora(tmp_path):
    policy, other = make_policy(), make_policy()
    randomise(policy)
    policy.save_weights(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [LORA_WEIGHTS_NAME]
    other.load_weights(str(tmp_path))
    assert torch.equal(velocity_of(policy), velocity_of(other))


def test_only_the_main_process_writes(tmp_path):
    for policy in (make_policy(), make_policy(train_full_model=True)):
        policy.save_weights(str(tmp_path), write=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("full", [False, True])
def test_snapshot_goes_in_and_the_trained_weights_come_back_bit_for_bit(full):
    policy = make_policy(train_full_model=full)
    old, old_velocity = policy.snapshot(), velocity_of(policy)
    kept = [tensor.clone() for tensor in old]
    randomise(policy)
    new, new_velocity = trained(policy), velocity_of(policy)
    addresses = [p.data_ptr() for p in policy.trainable_parameters().values()]

    def fail_inside():
        with policy.use_weights(old):
            assert torch.equal(velocity_of(policy), old_velocity)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    assert all(torch.equal(a, b) for a, b in zip(new, trained(policy), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(old, kept, strict=True))
    assert [p.data_ptr() for p in policy.trainable_parameters().values()] == addresses
    assert torch.equal(velocity_of(policy), new_velocity)


def test_gradients_of_a_graph_from_before_are_unchanged():
    def gradients(visit: bool) -> list[torch.Tensor]:
        policy = make_policy(train_full_model=True)
        old = policy.snapshot()
        randomise(policy)
        predict = policy.bind(policy.encode(["a cat"], DEVICE), None)
        loss = predict(torch.ones(1, 16, 4, 4), torch.tensor([300.0])).square().mean()
        if visit:
            with torch.no_grad(), policy.use_weights(old):
                velocity_of(policy)
        loss.backward()
        return [p.grad for p in policy.trainable_parameters().values() if p.grad is not None]

    assert all(torch.equal(a, b) for a, b in zip(gradients(True), gradients(False), strict=True))


def test_snapshots_of_another_policy_are_refused():
    with (
        pytest.raises(ValueError, match="are no snapshot of the"),
        make_policy(rank=3).use_weights(make_policy(rank=2).snapshot()),
    ):
        pass


def test_a_ddpm_pipeline_is_a_policy(tmp_path):
    def make(**kwargs):
        return make_policy(pipeline=tiny_sd_pipeline(), **kwargs)

    def sample(pipeline):
        arguments = {
            "height": 32,
            "width": 32,
            "num_inference_steps": 3,
            "guidance_scale": 1.0,
            "output_type": "latent",
        }
        return pipeline(["a cat"], generator=torch.Generator().manual_seed(0), **arguments).images

    for full in (False, True):
        policy, other = make(train_full_model=full), make(train_full_model=full)
        losses = train_steps(policy, 3, learning_rate=1e-3, channels=4)
        assert losses[-1] < losses[0]
        randomise(policy)
        policy.save_weights(str(tmp_path / str(full)))
        other.load_weights(str(tmp_path / str(full)))
        assert all(torch.equal(a, b) for a, b in zip(trained(policy), trained(other), strict=True))
        assert torch.equal(sample(policy.pipeline), sample(other.pipeline))
    assert (tmp_path / "True" / "unet" / "config.json").is_file()
    fresh, lora = tiny_sd_pipeline(), make()
    before = sample(fresh)
    lora.load_weights(str(tmp_path / "False"))
    fresh.load_lora_weights(str(tmp_path / "False"))
    torch.testing.assert_close(sample(fresh), sample(lora.pipeline), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(sample(fresh), before)


def test_an_offloaded_denoiser_is_refused_by_name():
    """As `enable_sequential_cpu_offload` leaves it: weights without values, which a LoRA would train beside."""
    pipeline = tiny_pipeline()
    cpu_offload(pipeline.transformer, execution_device=DEVICE)
    with pytest.raises(ValueError, match="weight 'pos_embed.proj.weight' is offloaded .*load the pipeline without"):
        make_policy(pipeline=pipeline)
