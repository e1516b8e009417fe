"""Kinds of tensors, and values that are looked at on the CPU alone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from dina_reward.checks.tensors import check_dense, check_numbers, check_tensor, check_values_on_cpu


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros(2), "x must be a torch.Tensor, got ndarray"),
        ([1.0], "got list"),
        (torch.zeros(2).bool(), "x must be real numbers, got torch.bool"),
        (torch.zeros(2, dtype=torch.complex64), "got torch.complex64"),
        (torch.zeros(2).to_sparse(), r"must be dense and of at least 16 bits, got torch.sparse_coo"),
        (torch.zeros(2).to(torch.float8_e4m3fn), "of torch.float8_e4m3fn"),
        (torch.zeros(2, device="meta"), "x holds no values: it is on the device 'meta'"),
    ],
)
def test_what_is_no_tensor_of_numbers_is_refused(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_numbers("x", value)


def test_numbers_pass_and_integers_where_they_may() -> None:
    check_numbers("x", torch.zeros(2, dtype=torch.bfloat16), floating=True)
    check_numbers("x", torch.arange(2))
    with pytest.raises(ValueError, match=r"x must be floating-point numbers, got torch.int64"):
        check_numbers("x", torch.arange(2), floating=True)
    check_dense("x", torch.zeros(2))
    with pytest.raises(ValueError, match="got dict; pass latents"):
        check_tensor("x", {}, "pass latents")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -0.1, 1.1])
def test_the_first_wrong_value_is_named_with_its_place(value: float) -> None:
    values = torch.tensor([[0.0, 1.0], [value, value]])
    with pytest.raises(ValueError, match=rf"p must be finite and lie in \[0, 1\], got {value:g} at \[1, 0\]"):
        check_values_on_cpu("p", values, 0.0, 1.0)
    if math.isfinite(value):
        check_values_on_cpu("p", values)


def test_values_elsewhere_are_not_looked_at() -> None:
    """`meta` tensors have none: a look at them would raise."""
    check_values_on_cpu("p", torch.full((2,), math.nan, device="meta"), 0.0, 1.0)
