"""Shared mode: the reward rides on the generator's tensors and the generator never notices."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.training_utils import EMAModel
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from dina_reward import LatentReward, SharedBackboneError
from tests.test_reward import PROMPTS, make_reward
from tests.tiny_models import tiny_sd3_pipeline


@pytest.fixture
def pipeline() -> Any:
    return tiny_sd3_pipeline()


@pytest.fixture(scope="module")
def checkpoint(sd3_pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sharing") / "reward"
    make_reward(sd3_pipeline).save_pretrained(directory)
    return directory


@pytest.fixture
def latents() -> Tensor:
    return torch.randn(3, 16, 8, 8, generator=torch.Generator().manual_seed(1))


def add_policy_lora(transformer: Any) -> None:
    transformer.requires_grad_(False)
    torch.manual_seed(0)
    transformer.add_adapter(
        LoraConfig(r=4, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v", "to_out.0"]), "policy"
    )


def generate(pipeline: Any, latents: Tensor) -> Tensor:
    conditioning = pipeline.encode_prompt(
        "a cat", None, None, max_sequence_length=8, do_classifier_free_guidance=False
    )
    return pipeline.transformer(
        latents,
        timestep=torch.full((len(latents),), 500.0),
        encoder_hidden_states=conditioning[0].expand(len(latents), -1, -1),
        pooled_projections=conditioning[2].expand(len(latents), -1),
        return_dict=False,
    )[0]


def snapshot(transformer: nn.Module) -> dict[str, Any]:
    return {
        "modules": [(name, type(module), module.training) for name, module in transformer.named_modules()],
        "flags": {name: parameter.requires_grad for name, parameter in transformer.named_parameters()},
        "state": {name: tensor.clone() for name, tensor in transformer.state_dict().items()},
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in transformer.modules()],
        "peft": getattr(transformer, "peft_config", None),
    }


def assert_untouched(transformer: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(transformer)
    state_before, state_after = before.pop("state"), after.pop("state")
    assert after == before
    assert state_after.keys() == state_before.keys()
    assert all(torch.equal(state_after[name], state_before[name]) for name in state_before)
    before["state"] = state_before


@pytest.mark.parametrize("with_policy_lora", [False, True])
def test_generator_is_bit_identical_before_during_and_after(
    pipeline: Any, checkpoint: Path, latents: Tensor, with_policy_lora: bool
) -> None:
    if with_policy_lora:
        add_policy_lora(pipeline.transformer)
    with torch.no_grad():
        before, output = snapshot(pipeline.transformer), generate(pipeline, latents)
    reward = LatentReward.from_pretrained(checkpoint, pipeline=pipeline, share_backbone=True)
    assert_untouched(pipeline.transformer, before)
    seen: list[Tensor] = []
    handle = reward.model.head.register_forward_hook(lambda *_: seen.append(generate(pipeline, latents)))
    reward(latents, PROMPTS, seed=0)
    handle.remove()
    assert torch.equal(seen[0], output)
    reward.score(latents.requires_grad_(), PROMPTS, seed=0).scores.sum().backward()
    assert_untouched(pipeline.transformer, before)
    with torch.no_grad():
        assert torch.equal(generate(pipeline, latents), output)
    assert all(parameter.grad is None for parameter in pipeline.transformer.parameters())


@pytest.mark.parametrize("when", ["before", "after"])
def test_scores_do_not_see_the_policy_lora(pipeline: Any, checkpoint: Path, latents: Tensor, when: str) -> None:
    expected = LatentReward.from_pretrained(checkpoint, pipeline=pipeline)(latents, PROMPTS, seed=0)
    if when == "before":
        add_policy_lora(pipeline.transformer)
    reward = LatentReward.from_pretrained(checkpoint, pipeline=pipeline, share_backbone=True)
    if when == "after":
        add_policy_lora(pipeline.transformer)
    torch.testing.assert_close(reward(latents, PROMPTS, seed=0), expected, atol=1e-5, rtol=0)
    standalone = LatentReward.from_pretrained(checkpoint, pipeline=pipeline)
    torch.testing.assert_close(standalone(latents, PROMPTS, seed=0), expected, atol=1e-5, rtol=0)


def test_extra_memory_is_lora_and_head(pipeline: Any, checkpoint: Path) -> None:
    generator = {tensor.data_ptr() for tensor in pipeline.transformer.state_dict().values()}
    reward = LatentReward.from_pretrained(checkpoint, pipeline=pipeline, share_backbone=True)
    extra = {name for name, tensor in reward.model.state_dict().items() if tensor.data_ptr() not in generator}
    assert extra == set(reward.model.trainable_state())
    assert len(extra) < len(reward.model.state_dict())
    standalone = LatentReward.from_pretrained(checkpoint, pipeline=pipeline)
    assert not generator & {tensor.data_ptr() for tensor in standalone.model.state_dict().values()}


def test_scoring_while_the_policy_trains_in_another_thread(pipeline: Any, checkpoint: Path, latents: Tensor) -> None:
    add_policy_lora(pipeline.transformer)
    reward = LatentReward.from_pretrained(checkpoint, pipeline=pipeline, share_backbone=True)
    expected = reward(latents, PROMPTS, seed=0)
    parameters = [p for p in pipeline.transformer.parameters() if p.requires_grad]

    def train(steps: int, done: list[list[Tensor]]) -> None:
        optimizer = torch.optim.AdamW(parameters, lr=1e-3)
        pipeline.transformer.train()
        for _ in range(steps):
            optimizer.zero_grad()
            generate(pipeline, latents).square().mean().backward()
            optimizer.step()
        pipeline.transformer.eval()
        done.append([parameter.detach().clone() for parameter in parameters])

    start = [parameter.detach().clone() for parameter in parameters]
    quiet: list[list[Tensor]] = []
    train(15, quiet)
    with torch.no_grad():
        for parameter, value in zip(parameters, start, strict=True):
            parameter.copy_(value)
    busy: list[list[Tensor]] = []
    thread = threading.Thread(target=train, args=(15, busy))
    thread.start()
    count = 0
    while thread.is_alive() or count == 0:
        assert torch.equal(reward(latents, PROMPTS, seed=0), expected)
        count += 1
    thread.join()
    assert count > 1
    assert all(torch.equal(a, b) for a, b in zip(quiet[0], busy[0], strict=True))


def test_it_follows_the_generator_to_another_dtype(pipeline: Any, checkpoint: Path, latents: Tensor) -> None:
    reward = LatentReward.from_pretrained(checkpoint, pipeline=pipeline, share_backbone=True)
    expected = reward(latents, PROMPTS, seed=0)
    pipeline.transformer.to(torch.bfloat16)
    half = reward(latents, PROMPTS, seed=0)
    assert reward.model.dtype == torch.bfloat16
    assert not torch.equal(half, expected)
    torch.testing.assert_close(half, expected, atol=0.05, rtol=0.05)
    pipeline.transformer.to(torch.float32)
    torch.testing.assert_close(reward(latents, PROMPTS, seed=0), expected, atol=0.05, rtol=0.05)
    pipeline.transformer.to(torch.float16)
    pipeline.transformer.transformer_blocks[0].attn.to_q.weight.data[0, 0] += 0.5
    with pytest.raises(SharedBackboneError, match=r"transformer_blocks.0.attn.to_q.weight' no longer is"):
        reward(latents, PROMPTS, seed=0)


def test_full_fine_tuning_is_refused(pipeline: Any, checkpoint: Path, latents: Tensor) -> None:
    reward = LatentReward.from_pretrained(checkpoint, pipeline=pipeline, share_backbone=True)
    pipeline.transformer.train()
    with pytest.raises(SharedBackboneError, match="being trained.*share_backbone=False"):
        reward(latents, PROMPTS)
    with pytest.raises(SharedBackboneError, match="being trained"):
        LatentReward.from_pretrained(checkpoint, pipeline=pipeline, share_backbone=True)
    pipeline.transformer.eval()
    reward(latents, PROMPTS)
    with torch.no_grad():
        pipeline.transformer.transformer_blocks[0].attn.to_q.weight.add_(0.01)
    with pytest.raises(SharedBackboneError, match=r"transformer_blocks.0.attn.to_q.weight' no longer is"):
        reward(latents, PROMPTS)


def fuse_and_unload(pipeline: Any) -> None:
    add_policy_lora(pipeline.transformer)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()


def copy_an_average(pipeline: Any) -> None:
    average = EMAModel(pipeline.transformer.parameters())
    average.shadow_params = [tensor + 0.05 for tensor in average.shadow_params]
    average.copy_to(pipeline.transformer.parameters())


def merge_and_unload(pipeline: Any) -> None:
    lora = LoraConfig(r=4, init_lora_weights=False, target_modules=["to_q"])
    pipeline.transformer = get_peft_model(pipeline.transformer, lora).merge_and_unload()


def assign_one_bias(pipeline: Any) -> None:
    bias = pipeline.transformer.transformer_blocks[0].attn.to_v.bias
    bias.data = bias.data + 0.05


@pytest.mark.parametrize("change", [fuse_and_unload, copy_an_average, merge_and_unload, assign_one_bias])
def test_weights_rewritten_without_a_trace_are_found_by_their_content(
    pipeline: Any, checkpoint: Path, latents: Tensor, change: Callable[[Any], None]
) -> None:
    reward = LatentReward.from_pretrained(checkpoint, pipeline=pipeline, share_backbone=True)
    reward(latents, PROMPTS, seed=0)
    pipeline.transformer.to(memory_format=torch.channels_last)
    reward(latents, PROMPTS, seed=0)
    change(pipeline)
    with pytest.raises(SharedBackboneError, match="no longer is the one that the reward was attached to"):
        reward(latents, PROMPTS, seed=0)


def test_a_shared_reward_is_not_copied_by_accident(pipeline: Any, checkpoint: Path, latents: Tensor) -> None:
    shared = LatentReward.from_pretrained(checkpoint, pipeline=pipeline, share_backbone=True)
    for duplicate in (copy.deepcopy, pickle.dumps):
        with pytest.raises(SharedBackboneError, match="cannot be copied or pickled"):
            duplicate(shared)


@pytest.mark.parametrize("share_backbone", [True, False])
def test_fused_projections_are_refused(pipeline: Any, checkpoint: Path, latents: Tensor, share_backbone: bool) -> None:
    pipeline.transformer.fuse_qkv_projections()
    with pytest.raises(ValueError, match="unfuse_qkv_projections"):
        LatentReward.from_pretrained(checkpoint, pipeline=pipeline, share_backbone=share_backbone)


def test_fused_lora_is_refused(pipeline: Any, checkpoint: Path, latents: Tensor) -> None:
    add_policy_lora(pipeline.transformer)
    reward = LatentReward.from_pretrained(checkpoint, pipeline=pipeline, share_backbone=True)
    expected = reward(latents, PROMPTS, seed=0)
    pipeline.transformer.fuse_lora()
    with pytest.raises(SharedBackboneError, match="unfuse_lora"):
        reward(latents, PROMPTS)
    for share in (True, False):
        with pytest.raises(SharedBackboneError, match="unfuse_lora"):
            LatentReward.from_pretrained(checkpoint, pipeline=pipeline, share_backbone=share)
    pipeline.transformer.unfuse_lora()
    torch.testing.assert_close(reward(latents, PROMPTS, seed=0), expected, atol=1e-5, rtol=0)


def test_a_lora_that_is_added_and_fused_later_is_refused(pipeline: Any, checkpoint: Path, latents: Tensor) -> None:
    reward = LatentReward.from_pretrained(checkpoint, pipeline=pipeline, share_backbone=True)
    add_policy_lora(pipeline.transformer)
    pipeline.transformer.fuse_lora()
    with pytest.raises(SharedBackboneError, match="unfuse_lora"):
        reward(latents, PROMPTS)


class Sharded(nn.Parameter):
    ds_id = 3


def replace_parameter(pipeline: Any, parameter: nn.Parameter) -> None:
    pipeline.transformer.transformer_blocks[0].attn.to_q._parameters["weight"] = parameter


def test_sharded_quantised_and_offloaded_parameters_are_refused(pipeline: Any, checkpoint: Path) -> None:
    weight = pipeline.transformer.transformer_blocks[0].attn.to_q.weight
    cases = {
        "sharded by FSDP or ZeRO-3": Sharded(weight.detach().clone()),
        "quantised": nn.Parameter(weight.detach().to(torch.uint8), requires_grad=False),
        "offloaded": nn.Parameter(weight.detach().to("meta")),
        "stored as torch.float8_e4m3fn": nn.Parameter(weight.detach().to(torch.float8_e4m3fn), requires_grad=False),
    }
    for message, parameter in cases.items():
        replace_parameter(pipeline, parameter)
        with pytest.raises(SharedBackboneError, match=message):
            LatentReward.from_pretrained(checkpoint, pipeline=pipeline, share_backbone=True)


def test_dtensor_parameters_are_refused(pipeline: Any, checkpoint: Path, tmp_path: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        weight = pipeline.transformer.transformer_blocks[0].attn.to_q.weight
        replace_parameter(pipeline, nn.Parameter(distribute_tensor(weight.detach(), mesh)))
        with pytest.raises(SharedBackboneError, match="sharded by FSDP"):
            LatentReward.from_pretrained(checkpoint, pipeline=pipeline, share_backbone=True)
    finally:
        dist.destroy_process_group()


def test_shared_mode_refuses_what_would_touch_the_generator(pipeline: Any, checkpoint: Path) -> None:
    reward = LatentReward.from_pretrained(checkpoint, pipeline=pipeline, share_backbone=True)
    assert reward.shares_backbone
    with pytest.raises(ValueError, match="would alter the generator"):
        reward.merge_lora()
    with pytest.raises(ValueError, match="move the generator instead"):
        reward.to("cpu")
    with pytest.raises(ValueError, match="generator's dtype"):
        LatentReward.from_pretrained(checkpoint, pipeline=pipeline, share_backbone=True, torch_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="generator's device"):
        LatentReward.from_pretrained(checkpoint, pipeline=pipeline, share_backbone=True, device="meta")
    with pytest.raises(ValueError, match="needs the generator"):
        LatentReward.from_pretrained(checkpoint, share_backbone=True)


def test_hooks_and_wrappers_of_the_generator_stay_behind(pipeline: Any, checkpoint: Path, latents: Tensor) -> None:
    calls: list[int] = []
    pipeline.transformer.transformer_blocks[0].register_forward_hook(lambda *_: calls.append(1))
    compiled = torch.compile(pipeline.transformer, backend="eager")
    reward = LatentReward.from_pretrained(
        checkpoint, transformer=compiled, scheduler=pipeline.scheduler, pipeline=pipeline, share_backbone=True
    )
    reward(latents, PROMPTS, seed=0)
    assert calls == []
    generate(pipeline, latents)
    assert calls == [1]


def test_pipeline_of_another_family_is_refused(checkpoint: Path) -> None:
    class StableDiffusionPipeline:
        unet = nn.Linear(1, 1)

    with pytest.raises(ValueError, match=r"family 'sd3'.*StableDiffusionPipeline has no 'transformer'"):
        LatentReward.from_pretrained(checkpoint, pipeline=StableDiffusionPipeline())
    with pytest.raises(ValueError, match="Linear belongs to no supported model family"):
        LatentReward.from_pretrained(checkpoint, transformer=nn.Linear(1, 1))
