from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from dina_reward.backbones.wrappers import unwrap


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


def test_the_model_comes_out_of_every_wrapper() -> None:
    model = two_layers()
    assert unwrap(model) is model
    assert unwrap(compiled(model)) is model
    assert unwrap(nn.DataParallel(model)) is model
    assert unwrap(nn.DataParallel(compiled(model))) is model
    lora = LoraConfig(target_modules=["0"])
    assert unwrap(compiled(get_peft_model(two_layers(), lora))).get_submodule("1").weight.shape == (2, 2)
    adapted = get_peft_model(model, lora)
    assert unwrap(adapted) is model
    assert unwrap(compiled(adapted), adapters=False) is adapted


def test_compiled_parts_are_refused_by_name_unless_compiled_in_place() -> None:
    model = two_layers()
    model[1].compile(backend="eager")
    assert unwrap(model) is model
    model[1] = compiled(model[1])
    with pytest.raises(ValueError, match=r"1 parts of the Sequential.*'1' is the first.*block.compile\(\)"):
        unwrap(model)
