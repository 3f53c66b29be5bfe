"""Walking the members of a .tar, .tar.gz or .zip that is held in memory, with a bound on everything.

No declared size is trusted: what is unpacked is counted, also when it is skipped over, in pieces of
64 KiB. A tar is walked header by header, because tarfile takes long names and pax records of any size
into memory, and its search in them is quadratic. A zip's table is read by zipfile, within a bound.
"""

from __future__ import annotations

import io
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from safelora_vllm.errors import AdapterRefused, refuse
from safelora_vllm.safetensors_header import LONGEST_SIGN, other_format

ACCEPTED = "give a .tar, .tar.gz or .zip of the folder that PEFT saved"
# What is raised on damaged input, by zipfile, tarfile and zlib too.
BROKEN = (
    tarfile.TarError, zipfile.BadZipFile, zlib.error, struct.error,
    EOFError, ValueError, OverflowError, RuntimeError,
)  # fmt: skip
_CHUNK = 64 * 1024
_MAX_EXTENSION = 64 * 1024  # a long name or pax record of a tar
_MAX_EXTENSIONS = 1024 * 1024  # all of them
_ZIP64 = 0xFFFFFFFF  # a size that stands in an extra field
_MAX_DESCRIPTOR = 24  # what may stand behind a member's data: its sizes again
_MAX_TABLE = 1024 * 1024  # a zip's central directory
_OTHERS = {b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"7z\xbc\xaf": "7z"}


@dataclass(frozen=True)
class Member:
    """kind: file, folder, link or device. size: as declared. content: read it before the next member."""

    name: str
    kind: str
    size: int
    content: Iterator[bytes]


def members(data: bytes, allowed: int) -> Iterator[Member]:
    """The members of an archive, of whichever format its first bytes say.

    ``allowed`` bounds the bytes of a tar that are unpacked, also of what is skipped over.

    Raises:
        AdapterRefused: archive_malformed (another format), archive_ambiguous or too_large.
        BROKEN: any of these, on what is damaged, encrypted or of an unusual kind.
    """
    if data[:4] in (b"PK\3\4", b"PK\5\6"):
        return _zip_members(data)
    if data[:2] == b"\x1f\x8b":
        return _tar_members(BoundedStream(_inflate(data), allowed))
    if data[257:262] == b"ustar":
        return _tar_members(BoundedStream(_slices(data), allowed))
    found = next((f"it is {name}" for magic, name in _OTHERS.items() if data.startswith(magic)), None)
    found = found or other_format(data[:LONGEST_SIGN]) or "it is of no known type"
    raise refuse("archive_malformed", f"the file is not a valid archive: {found}; {ACCEPTED}")


def _slices(data: bytes) -> Iterator[bytes]:
    return (data[start : start + _CHUNK] for start in range(0, len(data), _CHUNK))


def _inflate(data: bytes) -> Iterator[bytes]:
    """Pieces of what gzip compressed in one stream. zlib checks CRC and length at its end."""
    inflater, position = zlib.decompressobj(wbits=31), 0
    while not inflater.eof:
        source = inflater.unconsumed_tail
        if not source:
            source = data[position : position + _CHUNK]
            position += len(source)
        piece = inflater.decompress(source, _CHUNK)
        if not source and not piece:
            raise EOFError("the gzip stream is cut short")
        yield piece
    if inflater.unused_data or position < len(data):
        raise ValueError("there is something behind the gzip stream")


class BoundedStream:
    """Reads a tar forward only, and no more of it than allowed."""

    def __init__(self, pieces: Iterator[bytes], allowed: int) -> None:
        self._pieces = pieces
        self._piece = b""
        self._left = self._allowed = allowed

    def read(self, size: int) -> bytes:
        """Exactly ``size`` bytes."""
        return b"".join(self.stream(size))

    def stream(self, size: int) -> Iterator[bytes]:
        """The next ``size`` bytes in pieces."""
        if size > self._left + len(self._piece):
            raise self._too_large()
        while size:
            if not self._piece and not self._refill():
                raise EOFError("it is cut short")
            part, self._piece = self._piece[:size], self._piece[size:]
            size -= len(part)
            yield part

    def finish(self) -> None:
        """Read to the end, so that a checksum there is checked: zeros, or it is something else's."""
        while self._piece or self._refill():
            if self._piece.strip(b"\0"):
                raise ValueError("there is something behind the tar's end")
            self._piece = b""

    def _refill(self) -> bool:
        for piece in self._pieces:
            self._left -= len(piece)
            if self._left < 0:
                raise self._too_large()
            self._piece = piece
            if piece:
                return True
        return False

    def _too_large(self) -> AdapterRefused:
        return refuse("too_large", f"the unpacked archive is over the {self._allowed:,} bytes allowed")


_TAR_KINDS = {
    **dict.fromkeys((tarfile.SYMTYPE, tarfile.LNKTYPE), "link"),
    **dict.fromkeys((tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE), "file"),
    tarfile.DIRTYPE: "folder",
}  # all others are devices or what only one tar program understands
_NO_DATA = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, b"3", b"4", b"6")  # whatever their size says
_EXTENSIONS = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)


def _tar_members(tape: BoundedStream) -> Iterator[Member]:
    extensions: dict[bytes, bytes] = {}  # type → content, of the member that follows
    extended = 0
    while (block := tape.read(tarfile.BLOCKSIZE)).strip(b"\0"):
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        if block[257:262] != b"ustar":
            raise ValueError("a header is not a tar's")
        if header.type in _EXTENSIONS:
            if header.type in extensions or not 0 <= header.size <= _MAX_EXTENSION:
                raise ValueError("a long name or pax record is there twice or too large")
            extended += header.size
            if extended > _MAX_EXTENSIONS:
                raise ValueError("its long names and pax records are too large together")
            extensions[header.type] = tape.read(header.size)
            tape.read(-header.size % tarfile.BLOCKSIZE)
            continue
        name, size = _extended(header, extensions)
        extensions.clear()
        if header.type == tarfile.GNUTYPE_SPARSE or size < 0:
            raise ValueError(f"{name!r:.100} is sparse or of negative size")
        stored = 0 if header.type in _NO_DATA else size
        content = tape.stream(stored)
        yield Member(name, _TAR_KINDS.get(header.type, "device"), size, content)
        for _ in content:  # what was not read
            pass
        tape.read(-stored % tarfile.BLOCKSIZE)
    if extensions:
        raise ValueError("a long name or pax record has no member")
    tape.finish()


def _extended(header: tarfile.TarInfo, extensions: Mapping[bytes, bytes]) -> tuple[str, int]:
    """A member's name and size, from its header or from what stands before it."""
    long_name = extensions.get(tarfile.GNUTYPE_LONGNAME, b"").partition(b"\0")[0]
    name, size = long_name.decode(errors="surrogateescape") or header.name, header.size
    for kind in (tarfile.XGLTYPE, tarfile.XHDTYPE):
        records = _pax_records(extensions.get(kind, b""))
        if kind == tarfile.XGLTYPE and not records.keys().isdisjoint({b"path", b"size"}):
            raise ValueError("a pax record names all members alike")
        if any(key.startswith(b"GNU.sparse.") for key in records):
            raise ValueError(f"{name!r:.100} is sparse")
        name = records.get(b"path", b"").decode(errors="surrogateescape") or name
        if (text := records.get(b"size")) is not None:
            size = _number(text)
    return name, size


def _pax_records(data: bytes) -> dict[bytes, bytes]:
    """Lines of ``length key=value``, where length counts the whole line."""
    records: dict[bytes, bytes] = {}
    position = 0
    while position < len(data):
        digits = data[position : position + 20].partition(b" ")[0]
        line = data[position : position + _number(digits)]
        key, equals, value = line[len(digits) + 1 : -1].partition(b"=")
        if len(line) != _number(digits) or line[-1:] != b"\n" or not equals or key in records:
            raise ValueError("a pax record is malformed or there twice")
        records[key] = value
        position += len(line)
    return records


def _number(text: bytes) -> int:
    if not text.isdigit() or len(text) > 20:
        raise ValueError(f"{text[:20]!r} is not a size")
    return int(text)


class BoundedZip(io.BytesIO):
    """The file that zipfile sees: no single read of it takes more than the table may have."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)  # no copy
        self._end = len(data)

    def read(self, size: int | None = -1) -> bytes:
        if size is None or size < 0:
            size = self._end - self.tell()
        if size > _MAX_TABLE:
            raise refuse("too_large", f"the zip's table is over the {_MAX_TABLE:,} bytes allowed")
        return super().read(size)


def _zip_members(data: bytes) -> Iterator[Member]:
    with zipfile.ZipFile(BoundedZip(data)) as archive:
        infos = archive.infolist()
        if infos and min(info.header_offset for info in infos) != 0:
            raise ValueError("its table does not begin with its first member")
        end = 0
        for info in sorted(infos, key=lambda info: info.header_offset):
            _check_local_header(data, info)
            end = _check_place(data, info, end)
            kind = {stat.S_IFLNK: "link", stat.S_IFDIR: "folder", stat.S_IFREG: "file", 0: "file"}.get(
                stat.S_IFMT(info.external_attr >> 16), "device"
            )
            if info.orig_filename.endswith("/") and kind != "link":
                kind = "folder"
            yield Member(info.orig_filename, kind, info.file_size, _unzip(archive, info))
        if not end <= archive.start_dir <= end + _MAX_DESCRIPTOR:
            raise refuse("archive_ambiguous", "there is something before the zip's table")


def _check_local_header(data: bytes, info: zipfile.ZipInfo) -> None:
    """A program that reads a zip from its beginning must see the names that one with the table sees."""
    magic, length = struct.unpack_from("<4s22xH", data, info.header_offset)
    start = info.header_offset + 30
    name = info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437")
    if magic != b"PK\3\4":
        raise ValueError(f"{info.orig_filename!r:.100} is not where the table says")
    if data[start : start + length] != name or info.filename != info.orig_filename:
        raise refuse("archive_ambiguous", f"{info.orig_filename!r:.200} has another name in its own header")
    if info.flag_bits & 0x1:
        raise ValueError(f"{info.orig_filename!r:.100} is encrypted")


def _check_place(data: bytes, info: zipfile.ZipInfo, end: int) -> int:
    """Members stand one behind the other, with nothing between that a table does not name; its end."""
    if not end <= info.header_offset <= end + _MAX_DESCRIPTOR:
        raise refuse("archive_ambiguous", f"there is something before {info.orig_filename!r:.200}")
    packed, unpacked, name, extra = struct.unpack_from("<18xLLHH", data, info.header_offset)
    start: int = info.header_offset + 30 + name
    elsewhere = info.flag_bits & 0x8 or _ZIP64 in (packed, unpacked)
    if not elsewhere and (packed, unpacked) != (info.compress_size, info.file_size):
        raise refuse("archive_ambiguous", f"{info.orig_filename!r:.200} has another size in its own header")
    if any(_has_unicode_path(field) for field in (data[start : start + extra], info.extra)):
        raise refuse("archive_ambiguous", f"{info.orig_filename!r:.200} has a second name")
    return start + int(extra) + info.compress_size


def _has_unicode_path(extra: bytes) -> bool:
    """Whether the extra fields of a member give it a name that only some programs use."""
    while len(extra) >= 4:
        kind, size = struct.unpack_from("<HH", extra)
        if kind == 0x7075:
            return True
        extra = extra[4 + size :]
    return False


def _unzip(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Iterator[bytes]:
    """A member in pieces; its CRC is checked at the last."""
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{info.orig_filename!r:.100} has the compression {info.compress_type}")
    with archive.open(info) as file:
        while part := file.read(_CHUNK):
            yield part
