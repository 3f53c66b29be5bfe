"""Archives made by hand: as tar and zip programs write them, and as no program would."""

from __future__ import annotations

import gzip
import io
import json
import struct
import tarfile
import zipfile
from collections.abc import Callable

from safetensors.torch import save

from tests.tiny import Q0, lora, lora_config

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MIB = 1024 * 1024
C, W = json.dumps(lora_config()).encode(), save(lora([Q0]))
C1, W1 = (CONFIG, C), (WEIGHTS, W)
Entry = tuple[str, bytes] | tarfile.TarInfo  # a file, or what has no content
Part = tarfile.TarInfo | bytes
Packer = Callable[..., bytes]


def tar(*entries: Entry, format: int = tarfile.PAX_FORMAT, mode: str = "w") -> bytes:
    """A tar of the entries."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, format=format) as archive:  # type: ignore[call-overload]
        for entry in entries:
            if isinstance(entry, tarfile.TarInfo):
                archive.addfile(entry)
            else:
                archive.addfile(header(entry[0], size=len(entry[1])), io.BytesIO(entry[1]))
    return buffer.getvalue()


def tar_gz(*entries: Entry) -> bytes:
    """The same, compressed."""
    return gzip.compress(tar(*entries))


def zipped(*entries: tuple[str | zipfile.ZipInfo, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A zip of the entries, also with repeated names."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in entries:
            archive.NameToInfo.clear()  # it would warn of a repeated name
            archive.writestr(name, data)
    return buffer.getvalue()


PACKERS = {"tar": tar, "tar.gz": tar_gz, "zip": zipped}


def header(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, link: str = "") -> tarfile.TarInfo:
    """A tar member's header."""
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, link
    return info


def raw_tar(*parts: Part) -> bytes:
    """Headers as they are, and data padded to blocks; then the end."""
    blocks = [
        part + bytes(-len(part) % 512) if isinstance(part, bytes) else part.tobuf(tarfile.GNU_FORMAT)
        for part in parts
    ]
    return b"".join(blocks) + bytes(1024)


def pax(*lines: bytes, kind: bytes = tarfile.XHDTYPE) -> list[Part]:
    """A pax header with these lines, ``length key=value``, as they are."""
    data = b"".join(lines)
    return [header("pax", kind, size=len(data)), data]


def pax_line(key: bytes, value: bytes, digits: int = 3) -> bytes:
    """A line with its length (which counts itself) in that many digits."""
    line = b"%0*d %s=%s\n" % (digits, digits + 3 + len(key) + len(value), key, value)
    assert len(line) == digits + 3 + len(key) + len(value), "its length has more digits"
    return line


def files(config: bytes = C, weights: bytes = W) -> list[Part]:
    """Both files for `raw_tar`."""
    return [header(CONFIG, size=len(config)), config, header(WEIGHTS, size=len(weights)), weights]


def long_name(name: bytes, claim: int | None = None, kind: bytes = tarfile.GNUTYPE_LONGNAME) -> list[Part]:
    """GNU tar's header for the name of the member that follows, with its true size or another."""
    return [header("long", kind, size=len(name) if claim is None else claim), name]


def patched(archive: bytes, name: str, where: str, offset: int, value: bytes | int) -> bytes:
    """A zip with other bytes (or a number of 32 bits) in the first local or central header of a name."""
    if isinstance(value, int):
        value = struct.pack("<I", value)
    magic, length = {"local": (b"PK\3\4", 30), "central": (b"PK\1\2", 46)}[where]
    start = -1
    while True:
        start = archive.index(magic, start + 1)
        if archive[start + length :].startswith(name.encode()):
            return archive[: start + offset] + value + archive[start + offset + len(value) :]


def zip_info(name: str, mode: int = 0o100644, method: int = zipfile.ZIP_DEFLATED) -> zipfile.ZipInfo:
    """A zip member's entry with a Unix mode."""
    info = zipfile.ZipInfo(name)
    info.external_attr, info.compress_type, info.create_system = mode << 16, method, 3
    return info


def bomb(mebibytes: int, before: bytes = b"") -> bytes:
    """A compressed header, then that many MiB of zeros."""
    return gzip.compress(before + bytes(mebibytes * MIB), compresslevel=1)


def streamed(*entries: tuple[str, bytes]) -> bytes:
    """A zip written to a pipe: sizes and CRCs stand behind the data."""

    class Pipe(io.BytesIO):
        def seekable(self) -> bool:
            return False

        def tell(self) -> int:
            raise OSError("a pipe")

        def seek(self, *_: int) -> int:
            raise OSError("a pipe")

    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return pipe.getvalue()


def zip64(*entries: tuple[str, bytes]) -> bytes:
    """A zip whose members have sizes of 64 bits in their local headers."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in entries:
            with archive.open(name, "w", force_zip64=True) as file:
                file.write(data)
    return buffer.getvalue()


def zip64_table(name: str, size: int) -> bytes:
    """A zip whose table gives that member's size in a zip64 extra field."""
    info = zip_info(name, method=zipfile.ZIP_STORED)
    info.extra = struct.pack("<HHQ", 1, 8, size)
    other = W1 if name == CONFIG else C1
    archive = zipped(other, (info, C if name == CONFIG else W), method=zipfile.ZIP_STORED)
    return claiming(archive, name, 2**32 - 1)


def claiming(archive: bytes, name: str, size: int) -> bytes:
    """A zip in which both of a member's headers give that unpacked size."""
    return patched(patched(archive, name, "central", 24, size), name, "local", 22, size)


def with_checksums(archive: bytes) -> bytes:
    """A tar whose blocks with the magic have the right checksum."""
    blocks = [bytearray(archive[start : start + 512]) for start in range(0, len(archive), 512)]
    for block in blocks:
        if block[257:262] == b"ustar":
            block[148:156] = b" " * 8
            block[148:156] = b"%06o\0 " % sum(block)
    return b"".join(blocks)
