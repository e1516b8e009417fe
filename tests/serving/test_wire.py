"""Headers of safetensors from strangers."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest
import torch
from safetensors.torch import save

from dina_reward.serving import RequestError
from dina_reward.serving.wire import PREFIX, check_size, header_length, parse_header, tensor_at


def header_of(body: bytes) -> bytes:
    return body[PREFIX : PREFIX + header_length(body, 1 << 16)]


TENSORS = {
    "float": torch.randn(2, 3),
    "half": torch.randn(3).half(),
    "bfloat": torch.randn(5).bfloat16(),
    "double": torch.randn(2, dtype=torch.float64),
    "integers": torch.tensor([-(2**63), 2**63 - 1]),
    "truth": torch.tensor([True, False, True]),
}


def test_tensors_come_back_as_they_were() -> None:
    body = save(TENSORS, {"text": "value"})
    header = parse_header(header_of(body))
    data = bytearray(body[-header.data_bytes :])
    assert header.metadata == {"text": "value"}
    assert header.tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        read = tensor_at(data, header.tensors[name])
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor)


def test_tensors_that_are_not_aligned_are_copied() -> None:
    entries = {
        "a": {"dtype": "BOOL", "shape": [3], "data_offsets": [0, 3]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [3, 11]},
    }
    header = parse_header(json.dumps(entries).encode())
    data = bytearray(b"\x01\x00\x07" + struct.pack("<2f", 1.5, -2.0))
    assert tensor_at(data, header.tensors["a"]).tolist() == [True, False, True]
    assert tensor_at(data, header.tensors["b"]).tolist() == [1.5, -2.0]


def entry(**changes: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


GOOD = entry()["a"]
WRONG: dict[str, tuple[Any, str]] = {
    "no JSON": (b"{", "not valid JSON"),
    "no UTF-8": (b'{"\xff": 1}', "JSON"),
    "nested": (b"[" * 60_000, "nested too deeply"),
    "a list": ([], "a list"),
    "no tensors": ({}, "0 tensors"),
    "many tensors": ({str(i): GOOD for i in range(17)}, "17 tensors"),
    "no entry": ({"a": 1}, "without dtype"),
    "unknown dtype": (entry(dtype="F8_E5M2"), "F8_E5M2"),
    "dtype of a list": (entry(dtype=["F32"]), "dtype"),
    "negative size": (entry(shape=[-2]), "no counts"),
    "size of a float": (entry(shape=[2.0]), "no counts"),
    "size of a truth": (entry(shape=[True]), "no counts"),
    "shape of a text": (entry(shape="2"), "no counts"),
    "many dimensions": (entry(shape=[1] * 9), "9 dimensions"),
    "huge size": (entry(shape=[1 << 62, 1 << 62]), "by its shape"),
    "three offsets": (entry(data_offsets=[0, 4, 8]), "3 offsets"),
    "backward offsets": (entry(data_offsets=[8, 0]), "by its shape"),
    "offsets of other length": (entry(data_offsets=[0, 12]), "8 bytes by its shape, 12 by its offsets"),
    "late start": (entry(data_offsets=[8, 16]), "from byte 8"),
    "overlap": ({"a": GOOD, "b": {**GOOD, "data_offsets": [4, 12]}}, "without gap or overlap"),
    "the same bytes twice": ({"a": GOOD, "b": GOOD}, "without gap or overlap"),
    "gap": ({"a": GOOD, "b": {**GOOD, "data_offsets": [12, 20]}}, "without gap or overlap"),
    "metadata of numbers": ({**entry(), "__metadata__": {"a": 1}}, "__metadata__"),
    "digits": (
        b'{"a": {"dtype": "F32", "data_offsets": [0, 8], "shape": [' + b"9" * 5000 + b"]}}",
        "JSON|by its shape",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_headers(name: str) -> None:
    value, message = WRONG[name]
    with pytest.raises(RequestError, match=message) as caught:
        parse_header(value if isinstance(value, bytes) else json.dumps(value).encode())
    assert caught.value.status == 400
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("length", [0, 1, 65537, 2**63, 2**64 - 1])
def test_lengths_of_headers(length: int) -> None:
    with pytest.raises(RequestError, match=f"a header of {length} bytes"):
        header_length(struct.pack("<Q", length), 1 << 16)


def test_sizes_are_compared_before_anything_is_read() -> None:
    header = parse_header(json.dumps(entry()).encode())
    check_size(100, header, 116, 116)
    check_size(100, header, None, 116)
    with pytest.raises(RequestError, match=r"115 bytes by its Content-Length, 116 by its header"):
        check_size(100, header, 115, 1000)
    with pytest.raises(RequestError, match="at most 115") as caught:
        check_size(100, header, None, 115)
    assert caught.value.status == 413
