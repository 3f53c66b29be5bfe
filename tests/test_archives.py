"""Adapters that arrive as one archive: what is accepted, what is refused and why, in how much memory."""

from __future__ import annotations

import gzip
import hashlib
import lzma
import os
import struct
import tarfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safelora_vllm.adapters.read import Limits, RawAdapter, read_adapter
from safelora_vllm.errors import AdapterNotFound, AdapterRefused
from safelora_vllm.gate.admit import GateSettings
from safelora_vllm.store import PublishedStore
from tests.packing import (
    C1,
    CONFIG,
    MIB,
    W1,
    WEIGHTS,
    C,
    Packer,
    W,
    bomb,
    claiming,
    files,
    header,
    long_name,
    patched,
    pax,
    pax_line,
    raw_tar,
    streamed,
    tar,
    tar_gz,
    with_checksums,
    zip64,
    zip64_table,
    zip_info,
    zipped,
)  # fmt: skip
from tests.refusing import codes, judge
from tests.tiny import Draft

Archive = bytes | Callable[[], bytes]  # those that take long to build are built when they are needed
LIMITS = Limits(config_bytes=64 * 1024, weights_bytes=MIB)
ALLOWED = LIMITS.config_bytes + LIMITS.weights_bytes + 64 * MIB
# Besides the archive itself: a zip's table of 1 MiB, twice, and its 22,000 shortest entries as Python
# objects of 350 bytes (9.5 MiB in all), or both files at their limits in growing buffers (3 MiB).
MEMORY = 12 * MIB
PACKERS: dict[str, Packer] = {"tar": tar, "tar.gz": tar_gz, "zip": zipped}
TAR, TAR_GZ, ZIP = tar(C1, W1), tar_gz(C1, W1), zipped(C1, W1)
STORED = zipped(C1, W1, method=zipfile.ZIP_STORED)


def read(folder: Path, archive: bytes) -> RawAdapter:
    """Read an archive, held by a file without a telling name."""
    path = folder / "upload"
    path.write_bytes(archive)
    return read_adapter(path, LIMITS)


def measured(folder: Path, archive: bytes) -> tuple[dict[str, str], int]:
    """The codes of the refusal with a sentence each (none for a sound archive), and the most memory taken."""
    found: dict[str, str] = {}
    tracemalloc.start()
    try:
        read(folder, archive)
    except AdapterRefused as error:
        found = {reason.code: reason.message for reason in error.reasons}
        assert all(len(reason.message) < 1000 and reason.message.isprintable() for reason in error.reasons)
        assert len(error.reasons) <= 21
    finally:
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return found, most


# --- what is accepted


@pytest.mark.parametrize("prefix", ["", "my-adapter/", "./", "./my-adapter/", "Größe 1/"])
@pytest.mark.parametrize("packer", PACKERS)
def test_the_same_content_has_the_same_digest_in_a_folder_and_in_an_archive(
    packer: str, prefix: str, tmp_path: Path
) -> None:
    folder = Draft().write(tmp_path / "adapter")
    both = {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    plain = read_adapter(folder, LIMITS)
    packed = read(tmp_path, PACKERS[packer](*((prefix + name, data) for name, data in both.items())))
    assert packed == plain and packed.files == plain.files == both
    sides = (hashlib.sha256(data).digest() for data in both.values())
    assert packed.digest == hashlib.sha256(b"".join(sides)).hexdigest()


def in_folder(folder: str) -> list[tuple[str, bytes]]:
    """Both files in a folder."""
    return [(f"{folder}/{CONFIG}", C), (f"{folder}/{WEIGHTS}", W)]


def among_others(packer: Packer) -> bytes:
    """What else lies in the folders that people pack."""
    names = ["a/README.md", "a/tokenizer.json", "a/optimizer.pt", "a/adapter_model.bin", "a/runs/events.1"]
    names += ["a/checkpoint-9/optimizer.pt", f"a/._{CONFIG}", f"__MACOSX/a/._{CONFIG}"]
    return packer(*((name, bytes(9000)) for name in names), *in_folder("a"))


def with_extra(extra: bytes) -> bytes:
    """A zip whose weights have an extra field, with another member behind them."""
    info = zip_info(WEIGHTS)
    info.extra = extra
    return zipped(C1, (info, W), ("x", b""))


NUMBERS = [(f"{number}", b"") for number in range(1999)]
FOLDER = header("a", tarfile.DIRTYPE)
ACCEPTED: dict[str, bytes] = {
    **{f"{name}-among-others": among_others(pack) for name, pack in PACKERS.items()},
    **{f"{name}-998-others": pack(*NUMBERS[:998], C1, W1) for name, pack in PACKERS.items()},
    "tar-ustar": tar(C1, W1, format=tarfile.USTAR_FORMAT),
    "tar-ustar-prefix": tar(*in_folder("a" * 90), format=tarfile.USTAR_FORMAT),
    "tar-gnu": tar(C1, W1, format=tarfile.GNU_FORMAT),
    "tar-gnu-long-name": tar(*in_folder("a" * 90), format=tarfile.GNU_FORMAT),
    "tar-pax-long-name": tar(*in_folder("ä" * 90), ("a" * 300, C)),
    "tar-pax-size": raw_tar(*pax(pax_line(b"size", b"%d" % len(C))), header(CONFIG, size=9), *files()[1:]),
    "tar-pax-global-comment": raw_tar(*pax(pax_line(b"comment", b"ab"), kind=b"g"), *files()),
    "tar-folders": tar(FOLDER, *in_folder("a")),
    "tar-folder-with-a-size": raw_tar(header("a", tarfile.DIRTYPE, size=1024), *files()),
    "tar-pipe-beside": tar(C1, header("pipe", tarfile.FIFOTYPE), W1),
    "zip-stored": STORED,
    "zip-streamed": streamed(C1, W1),
    "zip-64": zip64(C1, W1),
    "zip-extra-field": with_extra(struct.pack("<HH60x", 0x9999, 60)),
    "zip-folders": zipped(("a/", b""), *in_folder("a")),
    "zip-backslashes": zipped(("a\\" + CONFIG, C), ("a\\" + WEIGHTS, W)),
    "zip-other-compression-beside": zipped((zip_info("README", method=zipfile.ZIP_LZMA), b"x"), C1, W1),
    "zip-nameless-beside": patched(
        patched(zipped(C1, W1, ("?", b"")), "?", "local", 26, b"\0\0\1\0"), "?", "central", 28, b"\0\0\1\0"
    ),
    "zip-without-modes": zipped((zip_info(CONFIG, 0), C), (zip_info(WEIGHTS, 0), W)),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_all_usual_ways_to_pack_are_accepted(name: str, tmp_path: Path) -> None:
    assert read(tmp_path, ACCEPTED[name]).files == {CONFIG: C, WEIGHTS: W}


def test_an_archive_passes_the_gate_as_its_folder_does(
    tmp_path: Path, gate: GateSettings, store: PublishedStore
) -> None:
    folder = Draft().write(tmp_path / "adapter")
    path = tmp_path / "adapter.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        archive.add(folder, arcname="adapter")
    packed, plain = judge(path, gate, store), judge(folder, gate, store)
    assert packed.report.accepted and not packed.cached and plain.cached
    assert packed.key == plain.key and packed.report == plain.report
    path.write_bytes(TAR[:1000])
    assert codes(judge(path, gate, PublishedStore(tmp_path / "empty"))) == {"archive_malformed"}


# --- what is refused: codes → name → archive

LARGE_C, LARGE_W = (CONFIG, b" " * (LIMITS.config_bytes + 1)), (WEIGHTS, bytes(LIMITS.weights_bytes + 1))
OUTSIDE = ["/etc/x", "C:/x", "\\x", "../x", "a/../../x", "a/..", "..\\x", f"../{CONFIG}x"]


def in_any_format(pack: Packer) -> dict[str, dict[str, Archive]]:
    """What is refused alike as a tar and as a zip."""
    return {
        "missing_file": {
            "no-weights": pack(C1),
            "no-config": pack(W1),
            "only-others": pack(("README.md", b"x")),
            "too-deep": pack(*in_folder("a/b")),
            "other-case": pack((CONFIG.title(), C), W1),
            "other-name": pack((CONFIG + " ", C), W1),
        },
        "unsafe_format": {
            "only-bin": pack(C1, ("adapter_model.bin", b"x")),
            "only-pt": pack(("a/" + CONFIG, C), ("a/adapter_model.pt", b"x")),
            "only-pth": pack(C1, ("adapter_model.pth", b"x")),
        },
        "missing_file unsafe_format": {"pickle-alone": pack(("adapter_model.bin", b"x"))},
        "too_large": {
            "config": pack(LARGE_C, W1),
            "weights": pack(C1, LARGE_W),
            "both": pack(LARGE_C, LARGE_W),
            "1001-members": pack(*NUMBERS[:999], C1, W1),
            "2000-members": pack(C1, W1, *NUMBERS[:1998]),
        },
        "archive_ambiguous": {
            "two-adapters": pack(*in_folder("a"), *in_folder("b")),
            "checkpoint": pack(C1, W1, ("checkpoint-9/" + CONFIG, C)),
            "deep-one": pack(C1, W1, ("a/b/c/" + WEIGHTS, W)),
            "config-twice": pack(C1, W1, C1),
            "weights-twice": pack(W1, C1, (WEIGHTS, W + b"x")),
            "twice-by-dot": pack(W1, C1, ("./" + WEIGHTS, W)),
            "twice-by-slashes": pack(*in_folder("a"), (f"a//{CONFIG}", C)),
            "apart": pack(("a/" + CONFIG, C), ("b/" + WEIGHTS, W)),
            "one-at-the-top": pack(C1, ("b/" + WEIGHTS, W)),
            "other-case-beside": pack(C1, W1, (CONFIG.upper(), C)),
            "long-s": pack(C1, W1, (WEIGHTS.replace("s", "ſ"), W)),
        },
        "archive_unsafe": {
            **{path: pack(C1, W1, (path, b"x")) for path in OUTSIDE},
            "flood": pack(C1, W1, *((f"../{number}", b"") for number, _ in NUMBERS[:500])),
        },
        "archive_unsafe archive_ambiguous": {
            "wanted-outside": pack(("../" + CONFIG, C), W1),
            "outside-and-twice": pack(("../x", b""), C1, C1, W1),
        },
        "config_malformed": {"config": pack((CONFIG, b"r: 8"), W1)},
        "weights_malformed": {"weights-cut": pack(C1, (WEIGHTS, W[:40]))},
    }


def named(name: bytes, *before: bytes) -> bytes:
    """A sound tar, before it an empty member with a pax record of that name."""
    return raw_tar(*pax(*before, pax_line(b"path", name)), header("x"), *files())


def with_checksum(block: bytes) -> bytes:
    """A tar header whose sum fits again."""
    return block[:148] + b"%06o\0 " % (sum(block[:148]) + 8 * 32 + sum(block[156:])) + block[156:]


# The header of the second file, as `with_checksums` writes it.
LATER = with_checksums(TAR)[512 + len(C) + -len(C) % 512 :][:512]
LINKS = {"symbolic": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE}
KINDS = {"fifo": b"6", "block": tarfile.BLKTYPE, "character": tarfile.CHRTYPE, "folder": tarfile.DIRTYPE}
SPARSE = tarfile.GNUTYPE_SPARSE
TARS: dict[str, dict[str, Archive]] = {
    "archive_unsafe": {
        **{f"link-{name}": tar(C1, W1, header("x", kind, link="y")) for name, kind in LINKS.items()},
        "link-in-gz": tar_gz(C1, W1, header("x", tarfile.SYMTYPE, link="/etc/passwd")),
        "pax-parent": named(b"../x"),
        "pax-absolute": named(b"/x"),
        "pax-zero-byte": named(b"x\0y"),
        "long-name-parent": raw_tar(*long_name(b"../x\0"), header("x"), *files()),
    },
    "archive_unsafe not_regular_file": {
        f"config-{name}": tar(header(CONFIG, kind, link="y"), W1) for name, kind in LINKS.items()
    },
    "not_regular_file": {
        **{f"weights-{name}": tar(C1, header(WEIGHTS, kind)) for name, kind in KINDS.items()},
        "weights-of-unknown-type": tar(C1, header(WEIGHTS, b"Z")),
    },
    "missing_file": {
        "empty-gz": tar_gz(),
        "pax-renames-config": raw_tar(*pax(pax_line(b"path", b"other")), *files()),
    },
    "archive_ambiguous": {
        "pax-second-config": named(CONFIG.encode()),
        "long-second-config": raw_tar(*long_name(CONFIG.encode()), header("x"), *files()),
    },
    "too_large": {
        "size-skipped": raw_tar(header("x", size=2**60), *files()),
        "size-wanted": raw_tar(header(WEIGHTS, size=2**60), *files()),
        "size-pax": raw_tar(*pax(pax_line(b"size", b"9" * 18)), *files()),
        "gz-bomb": lambda: bomb(80),
        "gz-bomb-behind-the-end": lambda: gzip.compress(TAR + bytes(80 * MIB), 1),
        "gz-bomb-skipped": lambda: bomb(80, header("x", size=80 * MIB).tobuf()),
        "gz-bomb-skipped-in-parts": lambda: gzip.compress(
            raw_tar(*[header("x", size=20 * MIB), bytes(20 * MIB)] * 4, *files()), 1
        ),
        "gz-bomb-in-a-folder": lambda: bomb(80, header("a", tarfile.DIRTYPE).tobuf()),
        "gz-bomb-weights": lambda: bomb(61, tar(C1)[:1024] + header(WEIGHTS, size=60 * MIB).tobuf()),
    },
    "archive_malformed": {
        "empty": tar(),
        "cut-in-header": TAR[:300],
        "cut-in-data": TAR[:1600],
        "cut-in-second-header": TAR[:1124],
        "no-end": raw_tar(*files())[:-1024],
        "tail": TAR + b"x",
        "second-tar-behind": TAR + tar(("x", b"y")),
        "checksum": TAR[:20] + b"x" + TAR[21:],
        "size-no-number": with_checksums(TAR[:124] + b"notanumber!\0" + TAR[136:]),
        "size-negative": raw_tar(header("x", size=-512), *files()),
        "size-wanted-negative": raw_tar(header(CONFIG, size=-1), *files()[1:]),
        "size-beyond-the-end": raw_tar(*files()[:2], header(WEIGHTS, size=900_000), W),
        "later-header-without-magic": with_checksums(TAR).replace(
            LATER, with_checksum(LATER[:257] + bytes(8) + LATER[265:])
        ),
        "pax-behind-the-last": raw_tar(*files(), *pax(pax_line(b"comment", b"x"))),
        "sparse-pax-global": raw_tar(*pax(pax_line(b"GNU.sparse.major", b"1"), kind=b"g"), *files()),
        "v7-without-magic": TAR[:257] + bytes(8) + TAR[265:],
        "sparse": raw_tar(*files(), header("x", SPARSE, size=512), bytes(512)),
        "sparse-weights": raw_tar(*files()[:2], header(WEIGHTS, SPARSE, size=9), bytes(9)),
        "sparse-pax": raw_tar(*pax(pax_line(b"GNU.sparse.major", b"1")), *files()),
        "sparse-pax-name": raw_tar(*pax(pax_line(b"GNU.sparse.name", b"x")), *files()),
        "pax-1-TiB": raw_tar(header("p", tarfile.XHDTYPE, size=2**40), *files()),
        "pax-global-1-TiB": raw_tar(header("p", tarfile.XGLTYPE, size=2**40), *files()),
        "pax-negative": raw_tar(header("p", tarfile.XHDTYPE, size=-512), *files()),
        "pax-65-KiB": raw_tar(*pax(b"1" * 65 * 1024), *files()),
        "pax-digits": raw_tar(*pax(b"1" * 60 * 1024), *files()),  # quadratic in tarfile
        "pax-long-claim": raw_tar(*pax(b"999999999999 path=x\n"), *files()),
        "pax-length-0": raw_tar(*pax(b"0 path=x\n"), *files()),
        "pax-length-negative": raw_tar(*pax(b"-9 path=x\n"), *files()),
        "pax-no-line-end": raw_tar(*pax(b"8 path=x"), *files()),
        "pax-no-equals": raw_tar(*pax(b"9 path-x\n"), *files()),
        "pax-path-twice": named(b"x", pax_line(b"path", b"y")),
        "pax-too-much": raw_tar(*[*pax(pax_line(b"a", b"x" * 60_000, 5)), header("x")] * 20, *files()),
        "pax-twice": raw_tar(*pax(pax_line(b"a", b"x")) * 2, *files()),
        "pax-chain": raw_tar(*pax(pax_line(b"a", b"x")) * 3000, *files()),  # recursion in tarfile
        "pax-size-negative": raw_tar(*pax(pax_line(b"size", b"-1")), *files()),
        "pax-size-endless": raw_tar(*pax(pax_line(b"size", b"9" * 900)), *files()),
        "pax-global-path": raw_tar(*pax(pax_line(b"path", b"x"), kind=b"g"), *files()),
        "pax-global-size": raw_tar(*pax(pax_line(b"size", b"1"), kind=b"g"), *files()),
        "long-name-8-GiB": raw_tar(*long_name(b"", 2**33), *files()),
        "long-link-8-GiB": raw_tar(*long_name(b"", 2**33, tarfile.GNUTYPE_LONGLINK), *files()),
        "long-name-negative": raw_tar(*long_name(b"", -5), *files()),
        "long-name-60-KB": raw_tar(*long_name(b"x" * 60_000), *files()),
        "gz-cut": TAR_GZ[:-20],
        "gz-cut-before-its-length": TAR_GZ[:-2],
        "gz-cut-after-its-header": TAR_GZ[:10],
        "gz-crc": TAR_GZ[:-8] + bytes(4) + TAR_GZ[-4:],
        "gz-length": TAR_GZ[:-4] + b"\0\0\0\1",
        "gz-flipped": TAR_GZ[:400] + bytes([TAR_GZ[400] ^ 255]) + TAR_GZ[401:],
        "gz-tail": TAR_GZ + b"x",
        "gz-two-streams": TAR_GZ * 2,
        "gz-endless-file-name": b"\x1f\x8b\x08\x08" + bytes(6) + b"x" * MIB,
        "gz-of-text": gzip.compress(b"hello" * 1000),
        "gz-of-nothing": gzip.compress(b""),
        "gz-of-zip": gzip.compress(ZIP),
        "gz-of-gz": gzip.compress(TAR_GZ),
        "gz-bomb-pax": lambda: bomb(30, header("p", tarfile.XHDTYPE, size=30 * MIB).tobuf()),
    },
}


def hidden(archive: bytes, before: str | None = None) -> bytes:
    """A zip with a member that its table does not name, before the table or another member."""
    other = zipped((WEIGHTS, b"other"))
    member = other[: other.index(b"PK\1\2")]
    table = place = archive.index(b"PK\1\2")
    if before is not None:
        place = archive.index(before.encode()) - 30
        archive = patched(archive, before, "central", 42, place + len(member))
    grown = archive[:place] + member + archive[place:]
    return grown[:-6] + struct.pack("<L", table + len(member)) + grown[-2:]


def table_of(archive: bytes) -> bytes:
    """The entries of a zip's table."""
    return archive[archive.index(b"PK\1\2") : -22]


def also_listed(archive: bytes, entry: bytes) -> bytes:
    """A zip with one more entry in its table."""
    count, _, size = struct.unpack("<HHL", archive[-14:-6])
    end = archive[-22:-14] + struct.pack("<HHL", count + 1, count + 1, size + len(entry)) + archive[-6:]
    return archive[:-22] + entry + end


def within() -> bytes:
    """A zip whose table names a member that lies in the content of another."""
    inner = zipped(C1, method=zipfile.ZIP_STORED)
    member = inner[: inner.index(b"PK\1\2")]
    outer = zipped(("x", member), W1, method=zipfile.ZIP_STORED)
    return also_listed(outer, table_of(patched(inner, CONFIG, "central", 42, outer.index(member))))


SECOND_NAME = with_extra(struct.pack("<HHBL", 0x7075, 5, 1, 0))
LINK = 0o120777
MANY = "x" * len(WEIGHTS)
BOMB_W = (WEIGHTS, bytes(50 * MIB))
CRC_OF_90 = zlib.crc32(W[:90])
ZIPS: dict[str, dict[str, Archive]] = {
    "archive_unsafe": {
        "link": zipped(C1, W1, (zip_info("x", LINK), b"/etc/passwd")),
        "link-with-slash": zipped(C1, W1, (zip_info("x/", LINK), b"/etc")),
    },
    "archive_unsafe not_regular_file": {"config-link": zipped((zip_info(CONFIG, LINK), b"x"), W1)},
    "not_regular_file": {
        "config-fifo": zipped((zip_info(CONFIG, 0o010644), b""), W1),
        "config-device": zipped((zip_info(CONFIG, 0o020644), b""), W1),
        "config-folder-by-mode": zipped((zip_info(CONFIG, 0o040755), b""), W1),
        "weights-folder": zipped(C1, (WEIGHTS + "/", b"")),
    },
    "missing_file": {"empty": zipped()},
    "archive_ambiguous": {
        "other-name-in-table": patched(zipped(C1, W1, ("README", b"x")), "README", "central", 46, b"r"),
        "other-size-in-header": patched(ZIP, WEIGHTS, "local", 22, 90),
        "other-size-in-table": patched(ZIP, WEIGHTS, "central", 24, 90),
        "second-name": SECOND_NAME,
        "second-name-behind-another-field": with_extra(
            struct.pack("<HHHHHBL", 0x9999, 2, 0, 0x7075, 5, 1, 0)
        ),
        "other-packed-size-in-header": patched(ZIP, WEIGHTS, "local", 18, 90),
        "data-into-the-table": patched(
            patched(ZIP, WEIGHTS, "central", 20, len(ZIP)), WEIGHTS, "local", 18, len(ZIP)
        ),
        "second-name-in-header": patched(SECOND_NAME, WEIGHTS, "central", 46 + len(WEIGHTS), b"\x76"),
        "second-name-in-table": patched(SECOND_NAME, WEIGHTS, "local", 30 + len(WEIGHTS), b"\x76"),
        "hidden-member": hidden(ZIP),
        "hidden-member-between": hidden(ZIP, before=WEIGHTS),
        "other-name-in-header": patched(ZIP, CONFIG, "local", 30, b"A"),
        "shorter-name-in-header": patched(ZIP, CONFIG, "local", 26, b"\5\0"),
        "hidden-adapter": patched(zipped(C1, W1, (MANY, W)), MANY, "local", 30, WEIGHTS.encode()),
        "zero-byte": zipped(W1, C1, ("x?y", b"")).replace(b"x?y", b"x\0y"),
        "zero-byte-hides": zipped(W1, (CONFIG + "?y", C)).replace(b"?y", b"\0y"),
        "one-header-twice-in-table": patched(
            patched(zipped(C1, W1, (CONFIG + "x", C)), CONFIG + "x", "central", 42, 0),
            CONFIG + "x", "central", 28, struct.pack("<HH", len(CONFIG), 1),
        ),
        "one-header-twice-beside": also_listed(zipped(("x", b"y"), C1, W1), table_of(zipped(("x", b"y")))),
        "member-within-another": within(),
    },
    "too_large": {
        "bomb-config": lambda: zipped((CONFIG, b" " * 50 * MIB), W1),
        "bomb-weights": lambda: zipped(C1, BOMB_W),
        "zip64-2**63": zip64_table(WEIGHTS, 2**63),
        "zip64-2**64-1": zip64_table(CONFIG, 2**64 - 1),
        "table-2-MiB": zipped(*((f"{number:0>4000}", b"") for number in range(500)), C1, W1),
        "table-of-22000": lambda: zipped(*[("x", b"")] * 22_000),
    },
    "archive_malformed": {
        "cut": ZIP[:-30],
        "cut-at-end": ZIP[:-1],
        "no-end": ZIP[:-22],
        "local-header-only": ZIP[:60],
        "four-bytes": ZIP[:4],
        "crc": patched(ZIP, WEIGHTS, "central", 16, 0),
        "flipped": STORED.replace(W[-40:], bytes(40)),
        "flipped-deflate": patched(ZIP, WEIGHTS, "local", 35 + len(WEIGHTS), b"\xff\xff\xff"),
        "encrypted": patched(ZIP, CONFIG, "central", 8, b"\1"),
        "encrypted-beside": patched(zipped(C1, W1, ("x", b"")), "x", "central", 8, b"\1"),
        "strongly-encrypted": patched(ZIP, CONFIG, "central", 8, b"\x41"),
        "patch-data": patched(ZIP, CONFIG, "central", 8, b"\x20"),
        "bzip2": zipped(C1, W1, method=zipfile.ZIP_BZIP2),
        "lzma": zipped(C1, W1, method=zipfile.ZIP_LZMA),
        "unknown-compression": patched(ZIP, WEIGHTS, "central", 10, b"\x5d\0"),
        "version-9.9": patched(ZIP, WEIGHTS, "central", 6, b"\x63\0"),
        "name-not-utf8": zipped(W1, C1, ("ä", b"")).replace("ä".encode(), b"\xff\xfe"),
        "name-of-5000": zipped(("x" * 5000, b""), C1, W1),
        "offset-outside": patched(ZIP, WEIGHTS, "central", 42, 2**31),
        "offset-into-data": patched(ZIP, WEIGHTS, "central", 42, 9),
        "other-zip-before": zipped(("x", b"y")) + ZIP,
        "tail": ZIP + bytes(70_000),
        "table-size-4-GiB": ZIP[:-10] + b"\xff" * 4 + ZIP[-6:],
        "bomb-that-claims-90": lambda: claiming(zipped(C1, BOMB_W), WEIGHTS, 90),
        "claims-less": claiming(ZIP, WEIGHTS, 90),
        "claims-more": claiming(ZIP, WEIGHTS, len(W) + 1),
        "claims-nothing": claiming(ZIP, WEIGHTS, 0),
        "zip64-more": zip64_table(WEIGHTS, len(W) + 5),
        "zip64-less": zip64_table(WEIGHTS, 5),
        "zip64-cut-field": patched(
            zip64_table(WEIGHTS, len(W)), WEIGHTS, "central", 48 + len(WEIGHTS), b"\4"
        ),
    },
    "weights_malformed": {  # what is judged is what was read, which is not the whole
        "claims-less-with-its-crc": patched(
            claiming(ZIP, WEIGHTS, 90), WEIGHTS, "central", 16, CRC_OF_90
        ),
    },
}  # fmt: skip

OTHERS: dict[str, dict[str, Archive]] = {
    "archive_malformed": {
        "nothing": b"",
        "one-byte": b"P",
        "text": b"hello\n" * 1000,
        "safetensors": W,
        "zeros": bytes(100_000),
        "bzip2": tar(C1, W1, mode="w:bz2"),
        "xz": tar(C1, W1, mode="w:xz"),
        "lzma": lzma.compress(TAR, format=lzma.FORMAT_ALONE),
        "zstd": b"\x28\xb5\x2f\xfd" + bytes(100),
        "7z": b"7z\xbc\xaf\x27\x1c" + bytes(100),
    },
    "too_large": {"over-the-bound": lambda: bytes(ALLOWED + 1)},
}
TABLES = {**{name: in_any_format(pack) for name, pack in PACKERS.items()}, "": OTHERS}
# What else than the fault that they are named after could have these refused under the same code.
WHY = {
    "tar-size-no-number": "invalid header",
    "tar-pax-too-much": "its long names and pax records are too large together",
    "tar-later-header-without-magic": "a header is not a tar's",
    "tar-pax-behind-the-last": "has no member",
    "tar-sparse-pax-global": "is sparse",
    "zip-second-name-behind-another-field": "has a second name",
    "zip-other-packed-size-in-header": "has another size in its own header",
    "zip-data-into-the-table": "something before the zip's table",
    "tar-pax-twice": "there twice or too large",
    "tar-pax-chain": "there twice or too large",
    "tar-pax-65-KiB": "there twice or too large",
    "tar-long-name-60-KB": "a member's name has 60,000 characters",
    "tar-gz-tail": "something behind the gzip stream",
    "tar-gz-two-streams": "something behind the gzip stream",
    "tar-second-tar-behind": "something behind the tar's end",
    "zip-second-name-in-header": "has a second name",
    "zip-second-name-in-table": "has a second name",
    "zip-hidden-member": "something before the zip's table",
    "zip-hidden-member-between": f"something before '{WEIGHTS}'",
    "zip-one-header-twice-in-table": f"something before '{CONFIG}'",
    "zip-one-header-twice-beside": "something before 'x'",
    "zip-member-within-another": f"something before '{CONFIG}'",
    "zip-encrypted": "is encrypted",
    "zip-offset-into-data": "is not where the table says",
}
HOSTILE = [
    pytest.param(expected, archive, WHY.get(f"{table}-{name}", ""), id=f"{table}-{name}")
    for table, by_code in [*TABLES.items(), ("tar", TARS), ("zip", ZIPS)]
    for expected, archives in by_code.items()
    for name, archive in archives.items()
]


@pytest.mark.parametrize(("expected", "archive", "why"), HOSTILE)
def test_refused_with_its_codes_and_in_little_memory(
    expected: str, archive: Archive, why: str, tmp_path: Path
) -> None:
    data = archive if isinstance(archive, bytes) else archive()
    found, most = measured(tmp_path, data)
    assert set(found) == set(expected.split())
    assert why in " ".join(found.values())
    assert most < len(data) + MEMORY


def test_even_the_largest_that_is_accepted_takes_little_memory(tmp_path: Path) -> None:
    name = b'"a": {"dtype": "F32", "shape": [%d], "data_offsets": [0, %d]}'
    size = LIMITS.weights_bytes - 200
    head = (b"{" + name % (size // 4, size) + b"}").ljust(192)
    largest = (WEIGHTS, (struct.pack("<Q", 192) + head).ljust(LIMITS.weights_bytes, b"\0"))
    for pack in PACKERS.values():
        data = pack((CONFIG, C.ljust(LIMITS.config_bytes)), largest, ("tokenizer.json", bytes(60 * MIB)))
        found, most = measured(tmp_path, data)
        assert not found and most < len(data) + MEMORY


def test_a_refused_format_is_told_what_is_accepted(tmp_path: Path) -> None:
    page = b"<!DOCTYPE html><title>404</title>"
    for archive, found in (
        (tar(C1, W1, mode="w:bz2"), "it is bzip2"),
        (tar(C1, W1, mode="w:xz"), "it is xz"),
        (page, "it is a web page, perhaps of a failed download. Download the file itself"),
        (b"anything", "it is of no known type"),
    ):
        with pytest.raises(AdapterRefused) as refused:
            read(tmp_path, archive)
        (reason,) = refused.value.reasons
        expected = (
            f"the file is not a valid archive: {found}; give a .tar, .tar.gz or .zip of the folder that"
        )
        assert reason.message.startswith(expected)


def test_many_unsafe_members_are_named_once(tmp_path: Path) -> None:
    evil = [(f"../{number}", b"x") for number in range(30)]
    with pytest.raises(AdapterRefused) as refused:
        read(tmp_path, tar(C1, W1, *evil))
    (reason,) = refused.value.reasons
    assert reason.code == "archive_unsafe"
    assert reason.message.startswith(
        "'../0', '../1', '../2' and 27 more: '..' or a zero byte in its path; pack"
    )


# --- how the file is opened


def test_a_path_where_there_is_no_archive(tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "a.zip").write_bytes(ZIP)
    Draft().write(tmp_path / "adapter")
    for path in ("none.zip", "dangling", f"a.zip/{CONFIG}", f"adapter/{WEIGHTS}", "a\0.zip"):
        with pytest.raises(AdapterNotFound, match=r"a folder that PEFT saved, or a \.tar or \.zip of one"):
            read_adapter(tmp_path / path, LIMITS)


@pytest.mark.parametrize("kind", ["link", "pipe", "device"])
def test_the_archive_itself_is_a_regular_file(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "upload"
    if kind == "link":
        (tmp_path / "a.zip").write_bytes(ZIP)
        path.symlink_to(tmp_path / "a.zip")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path = Path("/dev/zero")
    with pytest.raises(AdapterRefused) as caught:
        read_adapter(path, LIMITS)
    assert caught.value.codes == ["not_regular_file"]


# --- what nobody thought of

SEEDS = {
    "tar": TAR,
    "tar-pax": ACCEPTED["tar-pax-long-name"],
    "tar-gnu": ACCEPTED["tar-gnu-long-name"],
    "tar.gz": TAR_GZ,
    "zip": among_others(zipped),
    "zip-stored": STORED,
    "zip-streamed": streamed(C1, W1),
    "zip-64": zip64_table(WEIGHTS, len(W)),
}
# Mostly in the first headers and in the last, where a zip has its table.
PLACE = st.integers(0, 1600) | st.integers(-600, -1) | st.integers(0, 100_000)
MUTATION = st.tuples(PLACE, st.integers(0, 255) | st.sampled_from([0, 1, 0x7F, 0x80, 0xFF, *b"0789gxLKS\n="]))


@settings(max_examples=100)
@given(
    mutations=st.lists(MUTATION, min_size=1, max_size=8),
    cut=st.just(0) | st.integers(0, 4000),
    inside=st.booleans(),
)
@pytest.mark.parametrize("seed", SEEDS)
def test_whatever_is_changed_in_an_archive_it_is_read_or_refused(
    seed: str,
    mutations: list[tuple[int, int]],
    cut: int,
    inside: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    data = bytearray(SEEDS[seed])
    for place, value in mutations:
        data[place % len(data)] = value
    del data[len(data) - cut :]
    if inside and seed.startswith("tar"):  # sums that fit again, so that what follows is reached
        data = bytearray(gzip.compress(with_checksums(bytes(data)), 1))
    found, most = measured(tmp_path_factory.getbasetemp(), bytes(data))  # raises what is not a refusal
    assert most < len(data) + MEMORY, found
