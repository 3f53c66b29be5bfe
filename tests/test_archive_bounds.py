"""Bounds of what is read of an archive, to the byte, and what may stand behind its end."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
import zlib
from pathlib import Path

import pytest

from safelora_vllm.adapters.members import members
from safelora_vllm.adapters.read import Limits, read_adapter
from safelora_vllm.errors import AdapterRefused
from tests.packing import (
    C1,
    CONFIG,
    W1,
    WEIGHTS,
    C,
    Part,
    W,
    files,
    header,
    pax,
    pax_line,
    raw_tar,
    tar,
)

CHUNK = 64 * 1024
TAR = tar(C1, W1)


def walked(archive: bytes, allowed: int) -> dict[str, bytes]:
    """What `members` gives."""
    return {member.name: b"".join(member.content) for member in members(archive, allowed)}


def gzipped(data: bytes, length: int) -> bytes:
    """gzip of exactly this length: its header has a file name that fills it."""
    deflater = zlib.compressobj(wbits=-15)
    packed = deflater.compress(data) + deflater.flush()
    packed += struct.pack("<LL", zlib.crc32(data), len(data))
    return (b"\x1f\x8b\x08\x08" + bytes(6)).ljust(length - len(packed) - 1, b"x") + b"\0" + packed


@pytest.mark.parametrize("archive", [TAR, gzip.compress(TAR)], ids=["tar", "tar.gz"])
def test_as_many_bytes_as_allowed_are_unpacked_and_not_one_more(archive: bytes) -> None:
    assert walked(archive, len(TAR)) == {CONFIG: C, WEIGHTS: W}
    with pytest.raises(AdapterRefused, match=f"over the {len(TAR) - 1:,} bytes allowed") as refused:
        walked(archive, len(TAR) - 1)
    assert refused.value.codes == ["too_large"]


@pytest.mark.parametrize("length", [CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK])
def test_nothing_stands_behind_a_gzip_stream_wherever_that_ends(length: int) -> None:
    """Input is taken in blocks of 64 KiB: a stream may end with one."""
    archive = gzipped(TAR, length)
    assert len(archive) == length and gzip.decompress(archive) == TAR
    assert walked(archive, len(TAR)) == {CONFIG: C, WEIGHTS: W}
    for behind in (b"x", b"\0", archive, bytes(CHUNK)):
        with pytest.raises(ValueError, match="something behind the gzip stream"):
            walked(archive + behind, len(TAR))


@pytest.mark.parametrize(
    ("sizes", "fits"),
    [
        ([CHUNK], True), ([CHUNK + 1], False), ([CHUNK] * 16, True), ([CHUNK] * 16 + [20], False),
        ([CHUNK] * 15 + [CHUNK - 20, 20], True), ([CHUNK] * 15 + [CHUNK - 20, 21], False),
    ],
)  # fmt: skip
def test_pax_records_have_64_kib_each_and_1_mib_together(
    sizes: list[int], fits: bool, tmp_path: Path
) -> None:
    parts: list[Part] = []
    for size in sizes:
        line = pax_line(b"comment", b"x" * (size - 15), digits=5)
        assert len(line) == size
        parts += [*pax(line), header("x")]
    archive = raw_tar(*parts, *files())
    with tarfile.open(fileobj=io.BytesIO(archive)) as sound:  # so that only their size is against them
        assert sound.getnames() == ["x"] * len(sizes) + [CONFIG, WEIGHTS]
    (tmp_path / "upload").write_bytes(archive)
    if fits:
        assert read_adapter(tmp_path / "upload", Limits()).files == {CONFIG: C, WEIGHTS: W}
    else:
        with pytest.raises(AdapterRefused, match=r"pax records? .* too large"):
            read_adapter(tmp_path / "upload", Limits())
