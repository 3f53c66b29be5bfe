"""One file that holds the adapter, or seems to. `tests/test_archives.py` has the formats' own corners."""

from __future__ import annotations

import gzip
import tarfile
from collections.abc import Callable
from pathlib import Path

from tests.corpus.case import Hostile
from tests.corpus.files import CONFIG, WEIGHTS
from tests.corpus.target import Target, deltas, sound
from tests.packing import (
    MIB,
    PACKERS,
    Entry,
    claiming,
    header,
    patched,
    pax,
    pax_line,
    raw_tar,
    tar,
    zip_info,
    zipped,
)

Files = tuple[str, bytes]
Pack = Callable[[Files, Files], bytes]  # config, weights → archive


def packed(name: str, codes: str, pack: Pack) -> Hostile:
    """A sound adapter in an archive; without ``codes`` it is what it seems to be."""

    def write(folder: Path, target: Target) -> Path:
        files = sound(target).write(folder)
        config, weights = ((name, (files / name).read_bytes()) for name in (CONFIG, WEIGHTS))
        path = folder / "archive"
        path.write_bytes(pack(config, weights))
        return path

    means = None if codes else lambda target: deltas(sound(target))
    return Hostile(name, "archives", write, frozenset(codes.split()), means)


def with_more(*more: Entry) -> Pack:
    """A tar with further members."""
    return lambda config, weights: tar(config, weights, *more)


def in_any_format() -> list[tuple[str, str, Pack]]:
    """What can be said in a tar, a compressed tar and a zip alike."""
    cases: list[tuple[str, str, Pack]] = []
    for kind, pack in PACKERS.items():
        cases += [
            (f"{kind}-parent", "archive_unsafe", lambda c, w, p=pack: p(c, w, ("../x", b"x"))),
            (f"{kind}-absolute", "archive_unsafe", lambda c, w, p=pack: p(c, w, ("/etc/x", b"x"))),
            (f"{kind}-parent-within", "archive_unsafe", lambda c, w, p=pack: p(c, w, ("a/../../x", b"x"))),
            (f"{kind}-config-twice", "archive_ambiguous", lambda c, w, p=pack: p(c, w, c)),
            (f"{kind}-two-adapters", "archive_ambiguous", lambda c, w, p=pack: p(c, w, *_under("b", c, w))),
            (f"{kind}-cut", "archive_malformed", lambda c, w, p=pack: _half(p(c, w))),
            (f"{kind}-no-weights", "missing_file", lambda c, _, p=pack: p(c)),
            (f"{kind}-pickle", "unsafe_format", lambda c, w, p=pack: p(c, ("adapter_model.bin", w[1]))),
            (f"{kind}-2000-members", "too_large", lambda c, w, p=pack: p(
                c, w, *((f"{number}", b"") for number in range(2000)))),
            (f"{kind}-of-an-archive", "missing_file", lambda c, w, p=pack: p(("a.tar", tar(c, w)))),
            (f"{kind}-others-beside", "", lambda c, w, p=pack: p(*_under("a", c, w), ("a/README.md", b"x"))),
        ]  # fmt: skip
    return cases


def _under(folder: str, *files: Files) -> list[Files]:
    return [(f"{folder}/{name}", data) for name, data in files]


def _half(archive: bytes) -> bytes:
    return archive[: len(archive) // 2]


def bomb(_config: Files, weights: Files) -> bytes:
    """40 MiB of zeros as the config: forty times what one may have."""
    return gzip.compress(tar((CONFIG, bytes(40 * MIB)), weights), compresslevel=1)


LINK = 0o120777
TARS: list[tuple[str, str, Pack]] = [
    ("tar-link-out", "archive_unsafe", with_more(header("x", tarfile.SYMTYPE, link="/etc/passwd"))),
    ("tar-hard-link", "archive_unsafe", with_more(header("x", tarfile.LNKTYPE, link="/etc/passwd"))),
    ("tar-config-link", "archive_unsafe not_regular_file", lambda _, w: tar(
        header(CONFIG, tarfile.SYMTYPE, link="/etc/passwd"), w)),
    ("tar-config-pipe", "not_regular_file", lambda _, w: tar(header(CONFIG, tarfile.FIFOTYPE), w)),
    ("tar-weights-device", "not_regular_file", lambda c, _: tar(c, header(WEIGHTS, tarfile.CHRTYPE))),
    ("tar-pax-parent", "archive_unsafe", lambda c, w: raw_tar(
        *pax(pax_line(b"path", b"../x")), header("x"), *_blocks(c, w))),
    ("tar-pax-second-config", "archive_ambiguous", lambda c, w: raw_tar(
        *pax(pax_line(b"path", CONFIG.encode())), header("x"), *_blocks(c, w))),
    ("tar-claims-an-exabyte", "too_large", lambda c, w: raw_tar(header("x", size=2**60), *_blocks(c, w))),
    ("tar-negative-size", "archive_malformed", lambda c, w: raw_tar(header("x", size=-512), *_blocks(c, w))),
    ("tar.gz-bomb", "too_large", bomb),
    ("tar.gz-twice", "archive_malformed", lambda c, w: gzip.compress(gzip.compress(tar(c, w)))),
    ("tar-second-behind", "archive_malformed", lambda c, w: tar(c, w) + tar(("x", b"y"))),
    ("tar-xz", "archive_malformed", lambda c, w: tar(c, w, mode="w:xz")),
]  # fmt: skip
ZIPS: list[tuple[str, str, Pack]] = [
    ("zip-link", "archive_unsafe", lambda c, w: zipped(c, w, (zip_info("x", LINK), b"/etc/passwd"))),
    ("zip-bomb", "too_large", lambda _, w: zipped((CONFIG, bytes(40 * MIB)), w)),
    ("zip-claims-less", "archive_malformed", lambda c, w: claiming(zipped(c, w), WEIGHTS, 90)),
    ("zip-two-sizes", "archive_ambiguous", lambda c, w: patched(zipped(c, w), WEIGHTS, "central", 24, 90)),
    ("zip-two-names", "archive_ambiguous", lambda c, w: patched(zipped(c, w), CONFIG, "local", 30, b"A")),
    ("zip-encrypted", "archive_malformed", lambda c, w: patched(zipped(c, w), CONFIG, "central", 8, b"\1")),
    ("zip-behind-a-zip", "archive_malformed", lambda c, w: zipped(("x", b"y")) + zipped(c, w)),
    ("no-archive", "archive_malformed", lambda _, w: w[1]),
    ("empty-file", "archive_malformed", lambda *_: b""),
]  # fmt: skip


def _blocks(config: Files, weights: Files) -> list[tarfile.TarInfo | bytes]:
    pairs = ([header(name, size=len(data)), data] for name, data in (config, weights))
    return [part for pair in pairs for part in pair]


CASES = [packed(name, codes, pack) for name, codes, pack in (*in_any_format(), *TARS, *ZIPS)]
