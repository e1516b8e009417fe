"""Layers that a LoRA leaves out, under PEFT with and without ``exclude_modules``."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from dina_reward.modeling import lora
from dina_reward.modeling.lora import add_lora, new_lora_config


def blocks() -> nn.Module:
    return nn.ModuleDict(
        {name: nn.ModuleDict({"to_q": nn.Linear(4, 4), "to_k": nn.Linear(4, 4)}) for name in ("b0", "b1")}
    )


@pytest.mark.parametrize("by_peft", [False, True])
@pytest.mark.parametrize("excluded", [r"b1\.to_k", ["b1.to_k"]])
def test_excluded_layers_have_no_lora(monkeypatch: pytest.MonkeyPatch, by_peft: bool, excluded: Any) -> None:
    monkeypatch.setattr(lora, "EXCLUDES", by_peft and lora.EXCLUDES)
    config = new_lora_config(r=2, target_modules=["to_q", "to_k"], exclude_modules=excluded)
    wrapped = add_lora(blocks(), config)
    adapted = sorted(name for name, module in wrapped.base_model.model.named_modules() if hasattr(module, "lora_A"))
    assert adapted == ["b0.to_k", "b0.to_q", "b1.to_q"]
    assert wrapped.peft_config["default"].exclude_modules in (excluded, set(excluded))
    assert wrapped.peft_config["default"].to_dict()["r"] == 2
