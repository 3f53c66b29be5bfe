"""A safetensors header at its edges: the last value that is read, the first that is not, the sentences."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest

from safelora_vllm.errors import AdapterRefused
from safelora_vllm.safetensors_header import Header, TensorHeader, plain_json, read_header
from tests.tiny import safetensors_bytes

_LIMIT = 1000
_AGAIN = "save or send it again"


def line(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    """A tensor's line; a sound one unless told otherwise."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def read(data: bytes, limit: int = _LIMIT) -> Header:
    """What the header of a whole file says."""
    return read_header(io.BytesIO(data), len(data), limit)[1]


@pytest.mark.parametrize(
    ("lines", "size"),
    [
        ([line()], 4),
        ([line(shape=[1] * 8)], 4),
        ([line(shape=[])], 4),
        ([line(shape=[0, 2**63 - 1], offsets=[0, 0])], 0),
        ([line("F16", offsets=[0, 2]), line("BF16", [3, 2], [2, 14])], 14),
        ([line("I64", [7], [0, 1])], 1),  # a dtype that is not served is refused later, by its name
        ([], 0),
    ],
)
def test_headers_that_are_read(lines: list[dict[str, Any]], size: int) -> None:
    text = json.dumps(
        {"__metadata__": {"a": "b"}} | {str(n): entry for n, entry in enumerate(lines)}
    ).encode()
    data = safetensors_bytes(text, bytes(size))
    expected = {str(n): TensorHeader(entry["dtype"], tuple(entry["shape"])) for n, entry in enumerate(lines)}
    assert read_header(io.BytesIO(data), len(data), len(text)) == (data[: 8 + len(text)], expected)
    with pytest.raises(AdapterRefused, match=f"its header of {len(text)} bytes is over the {len(text) - 1} "):
        read(data, len(text) - 1)


FAULTS = {
    "it ends before its header": bytes(7),
    "it ends inside its header": safetensors_bytes(b"{}", length=3),
    "its header of 1,001 bytes is over the 1,000 allowed": safetensors_bytes(b"{}", length=1001),
    f"its header of {2**64 - 1:,} bytes is over the 1,000 allowed": safetensors_bytes(
        b"{}", length=2**64 - 1
    ),
    f"its tensors take 4 bytes, there are 3; {_AGAIN}": safetensors_bytes({"a": line()}, bytes(3)),
    f"its tensors take 4 bytes, there are 5; {_AGAIN}": safetensors_bytes({"a": line()}, bytes(5)),
    "a tensor begins at byte 8 of the data, expected was 4": safetensors_bytes(
        {"a": line(), "b": line(offsets=[8, 12])}, bytes(12)
    ),
    "a key stands twice": safetensors_bytes(b'{"a":1,"a":1}'),
    "NaN is not a number": safetensors_bytes(b'{"a":NaN}'),
    "-Infinity is not a number": safetensors_bytes(b'{"a":-Infinity}'),
}


@pytest.mark.parametrize("told", FAULTS)
def test_what_is_wrong_with_a_file_is_told(told: str) -> None:
    with pytest.raises(AdapterRefused) as refused:
        read(FAULTS[told])
    assert refused.value.codes == ["weights_malformed"]
    assert str(refused.value).endswith(f"safetensors file: {told}")


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        (line("f32"), "a dtype is 'f32'"),
        (line(32), "a dtype is 32"),
        (line(shape="x"), "a shape is 'x'"),
        (line(shape=""), "a shape is ''"),
        (line(shape=[1] * 9), f"a shape is {[1] * 9}"),
        (line(shape=[True]), "a shape is [True]"),
        (line("U8", [-1]), "a shape is [-1]"),
        (line(shape=[2**63, 0], offsets=[0, 0]), f"a shape is [{2**63}, 0]"),
        (line(offsets=[0, 4.0]), "data_offsets are [0, 4.0]"),
        (line(offsets=[0, 4, 8]), "data_offsets are [0, 4, 8]"),
        (line("U8", offsets=[4, 0]), "data_offsets are [4, 0]"),
        (line(offsets=[2, 4]), "F32 of the shape [1] does not take 2 bytes"),
        (line("BF16", [2, 3], [0, 11]), "BF16 of the shape [2, 3] does not take 11 bytes"),
    ],
)
def test_what_is_wrong_with_a_tensor_s_line_is_told(entry: dict[str, Any], told: str) -> None:
    with pytest.raises(AdapterRefused) as refused:
        read(safetensors_bytes({"a": entry}, bytes(4)))
    assert str(refused.value).endswith(f"safetensors file: {told}")


def test_the_number_of_tensors_is_told() -> None:
    lines = ",".join(f'"{number}":0' for number in range(16_385))
    with pytest.raises(AdapterRefused, match="it names 16,385 tensors, allowed are 16,384"):
        read(safetensors_bytes(f"{{{lines}}}".encode()), 2**20)


@pytest.mark.parametrize("text", ['{"r":1,"r":2}', '{"a":{"r":1,"r":2}}', "[NaN]", "Infinity", "-Infinity"])
def test_a_text_that_parsers_read_differently_says_nothing(text: str) -> None:
    with pytest.raises(ValueError, match=r"stands twice|is not a number"):
        plain_json(text.encode())
