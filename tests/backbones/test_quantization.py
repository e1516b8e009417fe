from __future__ import annotations

import pytest
import torch
from torch import nn

from dina_reward.alignment.policy import Policy
from dina_reward.backbones.quantization import is_quantized, quantize_blocks, weight_bytes
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
from tests.tiny_models import tiny_sd3_transformer, tiny_sd_pipeline


bitsandbytes = pytest.importorskip("bitsandbytes")
try:
    bitsandbytes.functional.quantize_4bit(torch.ones(64), quant_type="nf4")
except Exception as error:  # the library of this platform lacks the CPU kernel
    pytest.skip(f"bitsandbytes cannot quantise to 4 bits on this CPU: {error}", allow_module_level=True)


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    return ((value - expected).norm() / expected.norm()).item()


def test_blocks_are_quantised_and_the_rest_stays_dense():
    transformer = tiny_sd3_transformer()
    names = quantize_blocks(transformer)
    assert transformer.is_loaded_in_4bit
    assert is_quantized(transformer)
    assert names
    assert all(name.startswith("transformer_blocks.") for name in names)
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear):
            assert isinstance(module, bitsandbytes.nn.Linear4bit) == name.startswith("transformer_blocks."), name
    assert transformer.get_submodule(names[0]).weight.dtype == torch.uint8
    for dense in (transformer.proj_out, transformer.norm_out.linear, transformer.context_embedder):
        assert dense.weight.dtype == torch.float32
    assert transformer.dtype == torch.float32


@pytest.mark.parametrize("kind", ["unet", "single", "none"])
def test_block_lists_of_other_models(kind):
    model = nn.Module()
    model.time_embedding = nn.Linear(8, 8)
    if kind == "unet":
        model.conv_in = nn.Conv2d(4, 8, 1)
        model.down_blocks = nn.ModuleList([nn.Sequential(nn.Conv2d(8, 8, 1), nn.Linear(64, 64))])
        model.mid_block = None
        model.up_blocks = nn.ModuleList([nn.Linear(64, 64)])
    if kind == "single":
        model.single_transformer_blocks = nn.ModuleList([nn.Linear(64, 64, bias=False)])
    if kind == "none":
        with pytest.raises(ValueError, match="Module has no linear layers in transformer_blocks"):
            quantize_blocks(model)
        return
    expected = {"unet": ["down_blocks.0.1", "up_blocks.0"], "single": ["single_transformer_blocks.0"]}[kind]
    assert quantize_blocks(model) == expected
    assert type(model.time_embedding) is nn.Linear


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_layer_is_its_dense_one_rounded_to_16_quantiles(double_quant):
    torch.manual_seed(0)
    model, dense = nn.Module(), nn.Linear(256, 128)
    model.layers = nn.ModuleList([nn.Linear(256, 128)])
    model.layers[0].load_state_dict(dense.state_dict())
    quantize_blocks(model, double_quant=double_quant)
    layer, x = model.layers[0], torch.randn(16, 256)
    weight = layer(torch.eye(256)).T - dense.bias[:, None]
    # The error of 16 quantiles of uniform weights: below 1/10 of their size, far above that of 8 bits.
    assert 0.02 < relative_error(weight, dense.weight) < 0.12
    torch.testing.assert_close(layer(x), x @ weight.T + dense.bias, atol=1e-4, rtol=1e-4)
    scales = weight.reshape(-1, 64)
    assert all(len(row.unique()) <= 40 for row in (scales / scales.abs().amax(1, keepdim=True)).round(decimals=3)[:8])


def test_forward_error_is_small():
    dense, quantised = make_policy(), make_policy(load_in_4bit=True)
    assert relative_error(velocity_of(quantised), velocity_of(dense)) < 0.05
    with quantised.reference():
        assert relative_error(velocity_of(quantised), velocity_of(dense)) < 0.05


@pytest.mark.parametrize(("double_quant", "bits"), [(False, 4.5), (True, 4.127)])
def test_weights_occupy_a_seventh(double_quant, bits):
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(512, 1024, bias=False) for _ in range(2)])
    elements, before = 2 * 512 * 1024, weight_bytes(model)
    assert before == 4 * elements
    quantize_blocks(model, double_quant=double_quant)
    after = weight_bytes(model)
    assert 8 * after / elements == pytest.approx(bits, abs=0.05)
    assert 7 < before / after < 8


def test_training_the_lora_lowers_a_loss_and_leaves_the_base_alone():
    policy = make_policy(rank=4, load_in_4bit=True)
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in policy.trainable_parameters().items())
    base = [p.detach().clone() for p in policy.denoiser.parameters() if not p.requires_grad]
    losses = train_steps(policy, 5, learning_rate=1e-2)
    assert losses[5] < 0.98 * losses[0]
    frozen = [p.detach() for p in policy.denoiser.parameters() if not p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(base, frozen, strict=True))


def test_sampling_and_training_compute_the_same_function():
    policy = make_policy(load_in_4bit=True)
    randomise(policy)
    predict = policy.bind(policy.encode(["a cat"], DEVICE), None)
    latents, timestep = torch.randn(1, 16, 4, 4), torch.tensor([400.0])
    with torch.no_grad():
        sampled = predict(latents, timestep)
    assert torch.equal(predict(latents, timestep).detach(), sampled)


def test_peft_knows_the_layers_are_4bit_so_that_merging_works():
    from peft.tuners.lora.bnb import Linear4bit

    policy = make_policy(load_in_4bit=True)
    randomise(policy)
    assert any(isinstance(module, Linear4bit) for module in policy.denoiser.modules())
    with policy.reference():
        base_velocity = velocity_of(policy)
    trained_velocity = velocity_of(policy)
    policy.denoiser.fuse_lora()
    # Merged weights are rounded to 4 bits again; how much that costs depends on the kernels of the CPU.
    assert relative_error(velocity_of(policy), trained_velocity) < 0.7 * relative_error(
        base_velocity, trained_velocity
    )


def test_saved_lora_loads_into_the_dense_pipeline(tmp_path):
    quantised, dense, restored = make_policy(load_in_4bit=True), make_policy(), make_policy(load_in_4bit=True)
    randomise(quantised)
    quantised.save_weights(str(tmp_path))
    restored.load_weights(str(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(trained(quantised), trained(restored), strict=True))
    dense.load_weights(str(tmp_path))
    plain = tiny_pipeline()
    plain.load_lora_weights(str(tmp_path))
    torch.testing.assert_close(generate(plain), generate(dense.pipeline))
    assert relative_error(generate(plain), generate(quantised.pipeline)) < 0.1


def test_snapshot_of_a_quantised_policy():
    policy = make_policy(load_in_4bit=True)
    old, expected = policy.snapshot(), velocity_of(policy)
    randomise(policy)
    with policy.use_weights(old):
        assert torch.equal(velocity_of(policy), expected)


def test_a_quantised_pipeline_is_left_alone():
    pipeline = tiny_pipeline()
    quantize_blocks(pipeline.transformer, double_quant=False)
    weight = pipeline.transformer.transformer_blocks[0].attn.to_q.weight
    policy = Policy(pipeline, rank=2, alpha=4, max_sequence_length=8, load_in_4bit=True)
    assert policy.denoiser.transformer_blocks[0].attn.to_q.base_layer.weight is weight
    assert quantize_blocks(pipeline.transformer) == []


def test_impossible_combinations_are_refused():
    with pytest.raises(ValueError, match="cannot be trained in full"):
        make_policy(load_in_4bit=True, train_full_model=True)
    pipeline = tiny_pipeline()
    quantize_blocks(pipeline.transformer)
    with pytest.raises(ValueError, match="cannot be trained in full"):
        Policy(pipeline, rank=2, alpha=4, train_full_model=True)
    with pytest.raises(ValueError, match="before a LoRA is added"):
        quantize_blocks(make_policy().denoiser)


def test_a_unet_keeps_its_convolutions_and_time_embedding():
    policy = make_policy(pipeline=tiny_sd_pipeline(), load_in_4bit=True)
    unet = policy.denoiser
    assert unet.time_embedding.linear_1.weight.dtype == unet.conv_in.weight.dtype == torch.float32
    attention = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    assert attention.to_q.base_layer.weight.dtype == torch.uint8
    losses = train_steps(policy, 3, learning_rate=1e-2, channels=4)
    assert losses[-1] < losses[0]
