from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from dina_reward.alignment.policy import LORA_WEIGHTS_NAME, Policy
from tests.alignment.helpers import LATENT_SHAPE, tiny_pipeline


DEVICE = torch.device("cpu")


def make_policy(rank: int = 2, dtype: torch.dtype = torch.float32, **kwargs) -> Policy:
    torch.manual_seed(0)
    return Policy(tiny_pipeline().to(dtype), rank=rank, alpha=2 * rank, max_sequence_length=8, **kwargs)


def randomise(policy: Policy) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.denoiser.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def velocity_of(policy: Policy, prompts=("a cat", "a dog")) -> torch.Tensor:
    latents = torch.randn((2, *LATENT_SHAPE), generator=torch.Generator().manual_seed(0)).to(policy.storage_dtype)
    bound = policy.bind(policy.encode(prompts, DEVICE), policy.encode_negative(DEVICE))
    with torch.no_grad():
        return bound(latents, torch.full((2,), 500.0))


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

    def run(pipeline):
        return pipeline(
            ["a cat"],
            height=32,
            width=32,
            num_inference_steps=3,
            guidance_scale=1.0,
            max_sequence_length=8,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).images

    fresh = tiny_pipeline()
    before = run(fresh)
    fresh.load_lora_weights(str(tmp_path))
    torch.testing.assert_close(run(fresh), run(policy.pipeline))
    assert not torch.allclose(run(fresh), before)


def test_saved_lora_restores_bit_for_bit(tmp_path):
    policy, other = make_policy(), make_policy()
    randomise(policy)
    policy.save_lora(str(tmp_path))
    other.load_lora(str(tmp_path))
    assert torch.equal(velocity_of(policy), velocity_of(other))
    assert all(p.dtype == torch.float32 for p in other.denoiser.parameters() if p.requires_grad)


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
