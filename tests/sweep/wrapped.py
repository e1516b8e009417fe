"""What becomes of a pipeline whose denoiser is inside a wrapper: the right result, or an error that says why not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from dina_reward.alignment.policy import Policy
from dina_reward.search import search
from tests.alignment.tiny_policy import tiny_pipeline
from tests.sweep.target import raised
from tests.training.tiny_reward import tiny_reward


Use = Callable[[Any], Tensor]


@dataclass(frozen=True)
class WrappedOutcome:
    """What one use of a pipeline in one wrapper came to: ``right``, ``clear``, ``unclear`` or ``wrong``."""

    use: str
    wrapper: str
    verdict: str
    message: str = ""


def _compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


def _compiled_in_place(model: nn.Module) -> Any:
    model.compile(backend="eager")
    return model


def _compiled_part(model: Any) -> Any:
    model.transformer_blocks[0] = torch.compile(model.transformer_blocks[0], backend="eager")
    return model


def _adapted(model: nn.Module) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=2, target_modules=["to_q", "to_v"]))  # type: ignore[arg-type]


def _parallel(model: nn.Module) -> Any:
    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    return nn.parallel.DistributedDataParallel(model)


def _quantised(model: nn.Module) -> Any:
    from dina_reward.backbones.quantization import quantize_blocks

    quantize_blocks(model)
    return model


def _offloaded(model: nn.Module) -> Any:
    """As `enable_sequential_cpu_offload` does it, whose own call asks for an accelerator."""
    from accelerate import cpu_offload

    return cpu_offload(model, execution_device=torch.device("cpu"))


def _offloaded_whole(model: nn.Module) -> Any:
    """As `enable_model_cpu_offload` does it."""
    from accelerate import cpu_offload_with_hook

    return cpu_offload_with_hook(model, execution_device=torch.device("cpu"))[0]


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "compiled": _compiled,
    "compiled in place": _compiled_in_place,
    "a part compiled": _compiled_part,
    "PEFT": _adapted,
    "DistributedDataParallel": _parallel,
    "DataParallel": nn.DataParallel,
    "4 bits": _quantised,
    "sequentially offloaded": _offloaded,
    "offloaded as a whole": _offloaded_whole,
}


def _latents() -> Tensor:
    return torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(0))


def _standalone(pipeline: Any) -> Tensor:
    return tiny_reward(pipeline=pipeline).eval()(_latents(), ["a cat", "a dog"], seed=0)


def _shared(pipeline: Any) -> Tensor:
    return tiny_reward(pipeline=pipeline, share_backbone=True).eval()(_latents(), ["a cat", "a dog"], seed=0)


@torch.no_grad()
def _policy(pipeline: Any) -> Tensor:
    torch.manual_seed(0)
    policy = Policy(pipeline, rank=2, alpha=4, max_sequence_length=8)
    device = torch.device("cpu")
    predict = policy.bind(policy.encode(["a cat", "a dog"], device), policy.encode_negative(device))
    return predict(_latents(), torch.full((2,), 500.0))


def _searched(pipeline: Any) -> Tensor:
    options = {"method": "best_of_n", "budget": 2, "num_inference_steps": 2, "height": 32, "width": 32}
    return search(pipeline, lambda latents: latents.flatten(1).mean(1), "a cat", **options).scores


USES: dict[str, Use] = {
    "reward": _standalone,
    "reward, share_backbone=True": _shared,
    "policy": _policy,
    "search": _searched,
}


@cache
def _right(use: str) -> Tensor:
    return USES[use](tiny_pipeline())


def outcome(use: str, wrapper: str) -> WrappedOutcome:
    """One use of one wrapped pipeline, compared with the same use of a plain one; 4 bits may differ by a tenth."""
    expected, pipeline = _right(use), tiny_pipeline()
    pipeline.transformer = WRAPPERS[wrapper](pipeline.transformer)
    try:
        found = USES[use](pipeline)
    except Exception as error:
        return WrappedOutcome(use, wrapper, *raised(error))
    share = 0.1 if wrapper == "4 bits" else 1e-5
    distance = float((found - expected).norm() / expected.norm())
    return WrappedOutcome(use, wrapper, "right" if distance <= share else "wrong", f"differs by {distance:.1e}")


def outcomes() -> list[WrappedOutcome]:
    """Every use of every wrapper."""
    return [outcome(use, wrapper) for use in USES for wrapper in WRAPPERS]


def wrapped_table(found: list[WrappedOutcome]) -> str:
    """One line per use and wrapper."""
    lines = ["| pipeline as | its denoiser | outcome | |", "|---|---|---|---|"]
    lines += [f"| {each.use} | {each.wrapper} | {each.verdict} | {each.message} |" for each in found]
    return "\n".join(lines) + "\n"
