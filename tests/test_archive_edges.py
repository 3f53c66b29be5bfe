"""Sentences and bounds of archives, member by member, in memory. Their tables: test_archives.py."""

from __future__ import annotations

import gzip
import itertools
import struct
import tarfile
import zipfile
from collections.abc import Iterator

import pytest

from safelora_vllm.adapters.archive import read_archive
from safelora_vllm.adapters.members import ACCEPTED, BoundedStream, BoundedZip, members
from safelora_vllm.errors import AdapterRefused, Reason
from tests import test_archives
from tests.packing import (
    C1,
    CONFIG,
    MIB,
    PACKERS,
    W1,
    WEIGHTS,
    C,
    Packer,
    W,
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
    zip_info,
    zipped,
)

CHUNK = 64 * 1024
WANTED = {CONFIG: len(C), WEIGHTS: len(W)}
ALLOWED = test_archives.ALLOWED
AMBIGUOUS, MALFORMED, UNSAFE, REGULAR = (
    "archive_ambiguous", "archive_malformed", "archive_unsafe", "not_regular_file",
)  # fmt: skip
LINK = 0o120777
PARENT = "pack the folder from within its parent"
DOTS, ABSOLUTE = f"'..' or a zero byte in its path; {PARENT}", f"an absolute path; {PARENT}"
Told = list[tuple[str, str]]


def damaged(why: str) -> Told:
    """The one reason against a damaged archive."""
    return [(MALFORMED, f"the archive is damaged or not of the plain kind ({why}); {ACCEPTED}")]


def told(data: bytes, allowed: int = ALLOWED) -> Told:
    """Codes and sentences of the refusal."""
    with pytest.raises(AdapterRefused) as caught:
        read_archive(data, WANTED, allowed)
    return [(reason.code, reason.message) for reason in caught.value.reasons]


# --- which archives


def test_what_is_accepted_in_refusals() -> None:
    assert ACCEPTED == "give a .tar, .tar.gz or .zip of the folder that PEFT saved"


@pytest.mark.parametrize("name", [name for name in test_archives.ACCEPTED if "998" not in name])
def test_usual_archives(name: str) -> None:
    found, others = read_archive(test_archives.ACCEPTED[name], WANTED, ALLOWED)
    assert found == {CONFIG: C, WEIGHTS: W} and not others & set(WANTED)


# --- what the sentences say

NUMBERS = [(f"{number}", b"") for number in range(1000)]
FOLDER, PIPE = header(CONFIG, tarfile.DIRTYPE), header(CONFIG, tarfile.FIFOTYPE)
TOLD: dict[str, tuple[bytes, Told]] = {
    "members": (
        tar(*NUMBERS[:999], C1, W1), [("too_large", "the archive has more than 1,000 members; pack fewer")]
    ),
    "name": (tar(("x" * 4097, b""), C1, W1), damaged("a member's name has 4,097 characters")),
    "tar-link": (
        tar(header(CONFIG, tarfile.SYMTYPE, link="x"), W1),
        [(UNSAFE, f"'{CONFIG}': a link; pack the file itself"),
         (REGULAR, f"{CONFIG} is a link in the archive")],
    ),
    "folder": (tar(FOLDER, W1), [(REGULAR, f"{CONFIG} is a folder in the archive")]),
    "pipe": (tar(PIPE, W1), [(REGULAR, f"{CONFIG} is a device in the archive")]),
    "zip-link": (
        zipped(C1, (zip_info(WEIGHTS, LINK), b"x")),
        [(UNSAFE, f"'{WEIGHTS}': a link; pack the file itself"),
         (REGULAR, f"{WEIGHTS} is a link in the archive")],
    ),
    "zip-pipe": (
        zipped((zip_info(CONFIG, 0o010644), b""), W1), [(REGULAR, f"{CONFIG} is a device in the archive")]
    ),
    "zip-folder": (zipped((CONFIG + "/", b""), W1), [(REGULAR, f"{CONFIG} is a folder in the archive")]),
    "parents": (
        zipped(C1, W1, ("../x", b""), ("a/..", b""), ("a\\..\\b", b"")),
        [(UNSAFE, f"'../x', 'a/..', 'a\\\\..\\\\b': {DOTS}")]
    ),
    "absolute": (
        zipped(C1, W1, ("/x", b""), ("\\x", b""), ("C:x", b""), ("z:x", b"")),
        [(UNSAFE, f"'/x', '\\\\x', 'C:x' and 1 more: {ABSOLUTE}")],
    ),
    "zero-byte": (
        raw_tar(*pax(pax_line(b"path", b"x\0y")), header("x"), *files()), [(UNSAFE, f"'x\\x00y': {DOTS}")]
    ),
    "unsafe-and-too-many": (
        tar(("../x", b""), FOLDER, *NUMBERS, C1, W1),
        [(UNSAFE, f"'../x': {DOTS}"), (REGULAR, f"{CONFIG} is a folder in the archive"),
         ("too_large", "the archive has more than 1,000 members; pack fewer")],
    ),
    "unsafe-and-cut": (
        tar(("../x", b""), FOLDER, C1, W1)[:-9000],
        [(UNSAFE, f"'../x': {DOTS}"), (REGULAR, f"{CONFIG} is a folder in the archive"),
         *damaged("it is cut short")],
    ),
    "too-large": (
        tar((CONFIG, C + b" "), (WEIGHTS, W + b" ")),
        [("too_large", f"{CONFIG} is over the {len(C):,} bytes allowed"),
         ("too_large", f"{WEIGHTS} is over the {len(W):,} bytes allowed")],
    ),
    "twice": (
        tar(C1, W1, ("a/" + CONFIG, C), ("./" + CONFIG, C)),
        [(AMBIGUOUS, f"{CONFIG} is there 3 times, as '{CONFIG}' and 'a/{CONFIG}'; pack one adapter, without "
          "checkpoints")],
    ),
    "other-case": (
        tar(C1, W1, (WEIGHTS.upper(), W)),
        [(AMBIGUOUS, f"{WEIGHTS} is there 2 times, as '{WEIGHTS}' and '{WEIGHTS.upper()}'; pack one adapter, "
          "without checkpoints")],
    ),
    "too-deep": (
        tar(("a/b/" + CONFIG, C), ("a/b/" + WEIGHTS, W)),
        [("missing_file", f"'a/b/{name}' lies too deep; pack its own folder") for name in (CONFIG, WEIGHTS)],
    ),
    "two-folders": (
        tar(("b/" + CONFIG, C), ("a/" + WEIGHTS, W)),
        [(AMBIGUOUS, "the files lie in two folders, 'a' and 'b'; pack them in one")],
    ),
    "top-and-folder": (
        tar(("b/" + CONFIG, C), W1),
        [(AMBIGUOUS, "the files lie in two folders, '' and 'b'; pack them in one")],
    ),
    # what is no archive
    **{
        name: (data, [(MALFORMED, f"the file is not a valid archive: {why}; {ACCEPTED}")])
        for name, data, why in (
            ("text", b"text", "it is of no known type"),
            ("nothing", b"", "it is of no known type"),
            ("bzip2", b"BZh9", "it is bzip2"),
            ("xz", b"\xfd7zXZ\0\0", "it is xz"),
            ("zstd", b"\x28\xb5\x2f\xfd\0", "it is zstd"),
            ("7z", b"7z\xbc\xaf\x27\x1c", "it is 7z"),
            ("page", b"<html>", "it is a web page, perhaps of a failed download. Download the file itself"),
        )
    },
    # tar
    "tar-magic": (
        test_archives.TARS[MALFORMED]["later-header-without-magic"], damaged("a header is not a tar's")
    ),
    "pax-too-much": (
        test_archives.TARS[MALFORMED]["pax-too-much"],
        damaged("its long names and pax records are too large together"),
    ),
    "tar-no-end": (raw_tar(*files())[:-1024] + b"X" * 512 + bytes(1024), damaged("invalid header")),
    "pax-21-digits": (
        raw_tar(*pax(b"1" * 21), *files()), damaged("a pax record is malformed or there twice")
    ),
    "gz-cut": (gzip.compress(tar(C1, W1))[:-1], damaged("the gzip stream is cut short")),
    "gz-tail": (gzip.compress(tar(C1, W1)) + b"\0", damaged("there is something behind the gzip stream")),
    "tar-tail": (tar(C1, W1) + b"x", damaged("there is something behind the tar's end")),
    "tar-cut": (raw_tar(*files())[:-1024], damaged("it is cut short")),
    "pax-size": (
        raw_tar(header("p", tarfile.XHDTYPE, size=CHUNK + 1), bytes(CHUNK + 1), *files()),
        damaged("a long name or pax record is there twice or too large"),
    ),
    "pax-negative": (
        raw_tar(header("p", tarfile.XHDTYPE, size=-1), *files()),
        damaged("a long name or pax record is there twice or too large"),
    ),
    "pax-twice": (
        raw_tar(*pax(pax_line(b"a", b"x")) * 2, *files()),
        damaged("a long name or pax record is there twice or too large"),
    ),
    "pax-behind": (
        raw_tar(*files(), *pax(pax_line(b"a", b"x"))), damaged("a long name or pax record has no member")
    ),
    "sparse": (
        raw_tar(*files(), header("x" * 99, tarfile.GNUTYPE_SPARSE)),
        damaged(f"'{'x' * 99} is sparse or of negative size"),
    ),
    "negative": (raw_tar(header("x", size=-512), *files()), damaged("'x' is sparse or of negative size")),
    "pax-sparse": (
        raw_tar(*pax(pax_line(b"GNU.sparse.name", b"x")), header("y"), *files()), damaged("'y' is sparse")
    ),
    **{
        f"pax-global-{key.decode()}": (
            raw_tar(*pax(pax_line(key, b"1"), kind=b"g"), *files()),
            damaged("a pax record names all members alike")
        )
        for key in (b"path", b"size")
    },
    **{
        f"pax-{name}": (raw_tar(*pax(line), *files()), damaged("a pax record is malformed or there twice"))
        for name, line in {
            "long": b"11 path=x\n", "no-line-end": b"8 path=x", "no-equals": b"9 path-x\n",
            "key": b"5 a=\n6 a=x\n",
        }.items()
    },
    "pax-no-number": (raw_tar(*pax(b"x9 path=x\n"), *files()), damaged("b'x9' is not a size")),
    "pax-size-endless": (
        raw_tar(*pax(pax_line(b"size", b"1" * 21)), *files()), damaged(f"b'{'1' * 20}' is not a size")
    ),
    "pax-size-text": (raw_tar(*pax(pax_line(b"size", b"-1")), *files()), damaged("b'-1' is not a size")),
    # zip
    "zip-long-name": (zipped(("x" * 40_000, b"")), damaged("a member's name has 40,000 characters")),
    "zip-encrypted-cp437": (
        patched(zipped(("a?", b"")).replace(b"a?", b"a\x84"), "a", "central", 8, b"\1"),
        damaged("'aä' is encrypted"),
    ),
    "zip-encrypted": (
        patched(zipped(C1, W1), CONFIG, "central", 8, b"\1"), damaged(f"'{CONFIG}' is encrypted")
    ),
    "zip-offset": (
        patched(zipped(C1, W1), WEIGHTS, "central", 42, 9),
        damaged(f"'{WEIGHTS}' is not where the table says"),
    ),
    "zip-name": (
        patched(zipped(C1, W1), CONFIG, "local", 30, b"A"),
        [(AMBIGUOUS, f"'{CONFIG}' has another name in its own header")],
    ),
    "zip-size": (
        patched(zipped(C1, W1), WEIGHTS, "local", 22, 90),
        [(AMBIGUOUS, f"'{WEIGHTS}' has another size in its own header")],
    ),
    "zip-hidden": (
        test_archives.hidden(zipped(C1, W1)), [(AMBIGUOUS, "there is something before the zip's table")]
    ),
    "zip-hidden-between": (
        test_archives.hidden(zipped(C1, W1), WEIGHTS),
        [(AMBIGUOUS, f"there is something before '{WEIGHTS}'")]
    ),
    "zip-before": (
        zipped(("x", b"y")) + zipped(C1, W1), damaged("its table does not begin with its first member")
    ),
    "zip-compression": (
        zipped(C1, (zip_info(WEIGHTS, method=zipfile.ZIP_BZIP2), W)),
        damaged(f"'{WEIGHTS}' has the compression 12")
    ),
    "zip-second-name": (test_archives.SECOND_NAME, [(AMBIGUOUS, f"'{WEIGHTS}' has a second name")]),
    "zip-more": (
        claiming(zipped(C1, (WEIGHTS, W[:90])), WEIGHTS, 91), damaged("a member of 91 bytes has 90")
    ),
    "zip-less": (
        claiming(zipped(C1, W1), WEIGHTS, 90),
        damaged(f"Bad CRC-32 for file '{WEIGHTS}'"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TOLD)
def test_the_sentences(name: str) -> None:
    data, expected = TOLD[name]
    assert told(data) == [(code, Reason(code, message).message) for code, message in expected]


@pytest.mark.parametrize("pack", PACKERS.values(), ids=PACKERS)
def test_the_largest_that_pass(pack: Packer) -> None:
    longest = ("x/" * 2047 + "ab", b"")
    found, others = read_archive(pack(longest, *NUMBERS[:997], C1, W1), WANTED, ALLOWED)
    assert found == {CONFIG: C, WEIGHTS: W} and others == {"ab", *(name for name, _ in NUMBERS[:997])}


@pytest.mark.parametrize(
    "name", ["x", "12:x", "ab:c", "..x/y", "x..", "a/.../b", "./x", "x//y", ".", "a/", "é/x", "_/x"]
)
def test_names_that_stay_inside(name: str) -> None:
    found, others = read_archive(zipped((name, b""), C1, W1), WANTED, ALLOWED)
    assert found == {CONFIG: C, WEIGHTS: W}
    assert others == {{".": "", "a/": "a"}.get(name, name.rpartition("/")[2])}


def test_of_files_in_many_folders_two_are_named() -> None:
    with pytest.raises(AdapterRefused, match="in two folders, 'a' and 'b'; pack") as caught:
        read_archive(tar(("b/x", b""), ("c/y", b""), ("a/z", b"")), dict.fromkeys("xyz", 9), MIB)
    assert caught.value.codes == [AMBIGUOUS]


def test_files_that_are_nowhere_are_missing_from_the_answer() -> None:
    assert read_archive(tar(C1, ("a/b.txt", b"x")), WANTED, ALLOWED) == ({CONFIG: C}, {"b.txt"})
    # A name in other letters is another file to most programs, and none of the two that are wanted.
    assert read_archive(tar((CONFIG.title(), C), W1), WANTED, ALLOWED) == ({WEIGHTS: W}, set())


def test_of_a_file_that_is_there_twice_only_the_first_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    from safelora_vllm.adapters import archive

    taken: list[str] = []

    def content(member: object, _: int) -> bytes:
        taken.append(member.name)  # type: ignore[attr-defined]
        return b""

    monkeypatch.setattr(archive, "_content", content)
    deep = ("a/b/" + WEIGHTS, W)
    told(tar(C1, ("a/" + CONFIG, C), ("./" + CONFIG, C), header(WEIGHTS, tarfile.DIRTYPE), deep))
    told(tar(deep, C1))
    assert taken == [CONFIG, CONFIG]


# --- members


def walked(data: bytes, allowed: int = ALLOWED) -> list[tuple[str, str, int, bytes]]:
    """What `members` gives."""
    return [(m.name, m.kind, m.size, b"".join(m.content)) for m in members(data, allowed)]


def test_kinds_of_tar_members() -> None:
    kinds = {
        b"0": "file", b"\0": "file", b"7": "file", b"1": "link", b"2": "link", b"5": "folder",
        b"3": "device", b"4": "device", b"6": "device", b"Z": "device",
    }  # fmt: skip
    for kind, expected in kinds.items():
        stored = kind not in (b"1", b"2", b"3", b"4", b"5", b"6")
        data = raw_tar(header("x", kind, size=3), *([b"abc"] if stored else []), header("y"))
        assert walked(data) == [("x", expected, 3, b"abc" * stored), ("y", "file", 0, b"")], kind


def test_kinds_of_zip_members() -> None:
    modes = {
        0o100644: "file", 0: "file", 0o644: "file", LINK: "link", 0o040755: "folder", 0o010644: "device",
        0o020644: "device",
    }  # fmt: skip
    for mode, kind in modes.items():
        assert walked(zipped((zip_info("x", mode), b"abc"))) == [("x", kind, 3, b"abc")], mode
    slashes = [(zip_info("x/", mode), b"") for mode in (0o100644, LINK)]
    assert [kind for _, kind, _, _ in walked(zipped(*slashes))] == ["folder", "link"]


def test_names_and_sizes_before_a_tar_member() -> None:
    """Of GNU tar's long name, the pax path and the header's own, and only for the next member."""
    name = long_name("ä-long".encode() + b"\0rest")
    path, size = pax(pax_line(b"path", b"\xff-pax")), pax(pax_line(b"size", b"%020d" % 3))
    link = long_name(b"target", kind=tarfile.GNUTYPE_LONGLINK)
    both = pax(pax_line(b"path", b"p"), pax_line(b"comment", b""), pax_line(b"size", b"1"))
    comment = pax(pax_line(b"comment", b"x"), kind=tarfile.XGLTYPE)
    later = header("later")
    for before, expected in (
        (name, "ä-long"), (path, "\udcff-pax"), (long_name(b"\xff"), "\udcff"),
        (pax(pax_line(b"path", b"a=b")), "a=b"), ([*name, *path], "\udcff-pax"),
        ([*name, *comment], "ä-long"),
        (size, "own"), (link, "own"), ([*comment, *path], "\udcff-pax"), (long_name(b""), "own"),
        (pax(pax_line(b"path", b"")), "own"), (pax(), "own"),
    ):  # fmt: skip
        own = header("own", size=9 if before == size else 3)
        expected_all = [(expected, "file", 3, b"abc"), ("later", "file", 0, b"")]
        assert walked(raw_tar(*before, own, b"abc", later)) == expected_all
    assert walked(raw_tar(header("\udcff"))) == [("\udcff", "file", 0, b"")]
    assert walked(raw_tar(*both, header("own"), b"a", later))[0] == ("p", "file", 1, b"a")


def test_a_long_name_of_64_kib_is_read() -> None:
    assert walked(raw_tar(*long_name(b"x" * CHUNK), header("own")))[0][0] == "x" * CHUNK


@pytest.mark.parametrize("pack", PACKERS.values(), ids=PACKERS)
def test_content_comes_in_pieces_of_64_kib(pack: Packer) -> None:
    sizes = [
        len(piece) for member in members(pack(("x", bytes(5 * CHUNK + 1))), MIB) for piece in member.content
    ]
    assert sum(sizes) == 5 * CHUNK + 1 and max(sizes) <= CHUNK and len(sizes) <= 12


@pytest.mark.parametrize("pack", PACKERS.values(), ids=PACKERS)
@pytest.mark.parametrize("size", [511, 512, 513, CHUNK - 512, CHUNK, CHUNK + 1])
def test_what_is_not_read_is_skipped(pack: Packer, size: int) -> None:
    """Some of it, or nothing, or all, whatever stands where in its blocks."""
    data = pack(("x", bytes(size)), ("y", b"z" * size), ("z", b"end"))
    for taken in (0, 1, 99):
        names = []
        for member in members(data, MIB):
            names.append((member.name, member.kind, member.size))
            list(itertools.islice(member.content, taken))
        assert names == [("x", "file", size), ("y", "file", size), ("z", "file", 3)]


def test_an_empty_zip_has_no_members() -> None:
    assert walked(zipped()) == []


def test_a_stream_gives_what_is_allowed_and_not_more() -> None:
    taken: list[int] = []

    def pieces(*sizes: int) -> Iterator[bytes]:
        for size in sizes:
            taken.append(size)
            yield b"a" * size

    stream = BoundedStream(pieces(3, 0, 4, 1), 8)
    assert [len(part) for part in stream.stream(5)] == [3, 2]
    assert stream.read(0) == b"" and stream.read(3) == b"aaa" and taken == [3, 0, 4, 1]
    with pytest.raises(AdapterRefused) as caught:
        stream.read(1)
    assert [(r.code, r.message) for r in caught.value.reasons] == [
        ("too_large", "the unpacked archive is over the 8 bytes allowed")
    ]
    with pytest.raises(AdapterRefused, match="over the 1,000 bytes allowed"):
        BoundedStream(pieces(700, 700), 1000).read(800)
    del taken[:]
    with pytest.raises(AdapterRefused, match="over the 7 bytes allowed"):
        BoundedStream(pieces(8), 7).read(8)
    assert taken == [], "it is refused before it is unpacked"
    with pytest.raises(EOFError, match=r"^it is cut short$"):
        BoundedStream(pieces(3, 0), 9).read(4)


def test_a_stream_ends_with_zeros_as_far_as_allowed() -> None:
    BoundedStream(iter([b"\0" * 5, b"", b"\0" * 5]), 10).finish()
    partly = BoundedStream(iter([b"ab\0", b"\0"]), 4)
    assert partly.read(2) == b"ab"
    partly.finish()
    for end in ([b"\0X"], [b"\0", b"x"], [b"", b"x"]):
        with pytest.raises(ValueError, match=r"^there is something behind the tar's end$"):
            BoundedStream(iter(end), 10).finish()
    with pytest.raises(AdapterRefused, match="over the 9 bytes allowed"):
        BoundedStream(iter([b"\0" * 5] * 2), 9).finish()


def test_a_zips_table_is_read_within_a_bound() -> None:
    file = BoundedZip(bytes(MIB + 2))
    assert file.read(0) == b"" and len(file.read(MIB)) == MIB and file.read(None) == b"\0\0"
    file.seek(-3, 2)
    assert len(file.read()) == 3 and file.read(-2) == b""
    for size in (MIB + 1, -1, None):
        file.seek(1)
        with pytest.raises(AdapterRefused) as caught:
            file.read(size)
        assert [(r.code, r.message) for r in caught.value.reasons] == [
            ("too_large", "the zip's table is over the 1,048,576 bytes allowed")
        ]


def between(gap: int, where: str) -> bytes:
    """A zip with so many bytes before its second member or its table that nothing names."""
    data = zipped(C1, W1)
    table, second = data.index(b"PK\1\2"), data.rindex(b"PK\3\4")
    if where == "member":
        data = patched(data, WEIGHTS, "central", 42, second + gap)
    place = second if where == "member" else table
    data = data[:place] + bytes(gap) + data[place:]
    return data[:-6] + struct.pack("<L", table + gap) + data[-2:]


@pytest.mark.parametrize("where", ["member", "table"])
def test_24_bytes_of_sizes_may_stand_behind_a_zip_member(where: str) -> None:
    for gap in (0, 1, 24):
        assert [name for name, _, _, _ in walked(between(gap, where))] == [CONFIG, WEIGHTS]
    subject = f"'{WEIGHTS}'" if where == "member" else "the zip's table"
    assert told(between(25, where)) == [(AMBIGUOUS, f"there is something before {subject}")]


def test_members_of_a_zip_come_in_the_order_in_which_they_lie() -> None:
    data = zipped(C1, W1)
    table = data.index(b"PK\1\2")
    second = data.index(b"PK\1\2", table + 1)
    turned = data[:table] + data[second:-22] + data[table:second] + data[-22:]
    assert zipfile.ZipFile(BoundedZip(turned)).namelist() == [WEIGHTS, CONFIG]
    assert [name for name, _, _, _ in walked(turned)] == [CONFIG, WEIGHTS]


def test_names_of_zip_members_in_both_encodings() -> None:
    assert [name for name, *_ in walked(zipped(("ä", b""), ("x", b"")))] == ["ä", "x"]
    old = zipped(("a?", b"")).replace(b"a?", b"a\x84")  # cp437, without the flag of UTF-8
    assert [name for name, *_ in walked(old)] == ["aä"]


def test_sizes_that_stand_behind_the_data_or_in_an_extra_field() -> None:
    data = streamed(C1, W1)
    assert [size for _, _, size, _ in walked(data)] == [len(C), len(W)]
    for place in (18, 22):  # either of both sizes
        other = patched(zipped(C1, W1), WEIGHTS, "local", place, 2**32 - 1)
        assert [size for _, _, size, _ in walked(other)] == [len(C), len(W)]


@pytest.mark.parametrize(
    ("extra", "second"),
    [
        (struct.pack("<HH", 0x7075, 0), True),
        (struct.pack("<HHHH", 0x9999, 0, 0x7075, 0), True),
        (struct.pack("<HH4sHH", 0x9999, 4, b"uupp", 0x7075, 0), True),
        (struct.pack("<HH4s", 0x9999, 4, struct.pack("<HH", 0x7075, 0)), False),
        (struct.pack("<HH", 0x7076, 0), False),
        (struct.pack("<H", 0x7075) + b"\0", False),
        (struct.pack("<HH32769xHH", 0x9999, 32769, 0x7075, 0), True),
    ],
    ids=["alone", "behind-another", "behind-its-data", "within-data", "another", "cut", "behind-32-KiB"],
)
def test_second_names_in_extra_fields(extra: bytes, second: bool) -> None:
    plain = zipped(C1, W1)
    start = plain.rindex(b"PK\3\4")
    data = plain[:start] + patched(plain[start:], WEIGHTS, "local", 28, struct.pack("<H", len(extra)))
    cut = start + 30 + len(WEIGHTS)
    data = data[:cut] + extra + data[cut:]
    data = data[:-6] + struct.pack("<L", plain.index(b"PK\1\2") + len(extra)) + data[-2:]
    if second:
        assert told(data) == [(AMBIGUOUS, f"'{WEIGHTS}' has a second name")]
    else:
        assert [name for name, *_ in walked(data)] == [CONFIG, WEIGHTS]
