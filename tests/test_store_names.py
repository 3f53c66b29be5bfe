"""Records of names: what is on disk, what a change does, and what others see of it meanwhile."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import multiprocessing
import os
import stat
import string
import tempfile
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safelora_vllm.errors import StoreDamaged, StoreUnavailable, UsageError
from safelora_vllm.files import locked
from safelora_vllm.store import AdapterRecord, NameStore, Version
from safelora_vllm.store.name_record import file_of
from safelora_vllm.store.names import FIRST_ID, LAST_ID

A, B = "a" * 64, "b" * 64
_CONTEXT = multiprocessing.get_context("fork")  # quick, and safe: the children only handle files
_PROCESSES, _UPDATES = 4, 100
ODD = [
    "a", "acme/summary-1.0", ".", "..", "../../etc/passwd", ".lock", ".new-x", ".json", "a.json", "a b",
    "a%2Fb", "%", "é", "名前", "a\nb", "a\x00b", "~", "-", "CON", "A", "x" * 250, "🙂" * 20,
]  # fmt: skip
GOLDEN = """{
 "format": 1,
 "name": "acme/x",
 "current": 1,
 "versions": [
  {
   "version": 1,
   "digest": "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
   "bytes": 10,
   "rank": 4,
   "created": 2.5,
   "by": "acme/ci",
   "policy": {
    "threshold": 0.5
   },
   "override": true,
   "underlying": {},
   "reason": "asked",
   "key": "",
   "rules": "",
   "id": 0,
   "load_seconds": 0.0
  }
 ]
}"""


def version(digest: str = A, **changes: Any) -> Version:
    """A version as an upload makes it; its number comes from the record."""
    plain = Version(0, digest, bytes=10, rank=4, created=2.5, by="acme/ci")
    return dataclasses.replace(plain, **changes)


def put(names: NameStore, name: str, *digests: str) -> None:
    """One version of ``name`` for each digest."""
    for digest in digests:
        names.update(name, lambda old, d=digest: (old or AdapterRecord(name)).with_version(version(d)))


def settle(names: NameStore) -> None:
    """Make all files old enough to be remembered."""
    for file in names.folder.iterdir():
        os.utime(file, (1000, 1000))


@pytest.fixture
def names(tmp_path: Path) -> NameStore:
    return NameStore(tmp_path / "deep" / "store")


def test_versions_count_up_and_the_newest_ten_stay() -> None:
    record = AdapterRecord("x")
    for number in range(1, 15):
        record = record.with_version(version(f"{number:064x}"))
        assert record.current == record.live.version == number
        assert record.live.digest == f"{number:064x}"
    assert [v.version for v in record.versions] == list(range(5, 15))


def test_versions_by_their_numbers() -> None:
    record = AdapterRecord("x").with_version(version(A, policy={"number": 3})).with_version(version(B))
    earlier = record.version(1)
    assert earlier.digest == A and earlier.policy == {"number": 3}
    again = record.with_version(earlier)  # going back is a new version of the earlier content
    assert again.live == dataclasses.replace(earlier, version=3) and again.versions[:2] == record.versions
    assert record.current == 2  # the old object is as it was
    for unknown in (0, 3, -1):
        with pytest.raises(UsageError, match=rf"'x' has no version {unknown}; it has \[1, 2\]"):
            record.version(unknown)


def test_golden_record(names: NameStore) -> None:
    changes = {"policy": {"threshold": 0.5}, "override": True, "reason": "asked"}
    record = AdapterRecord("acme/x").with_version(version(A, **changes))
    assert names.update("acme/x", lambda _: record) == record
    file = names.root / "names" / "acme%2Fx.json"
    assert file.read_text() == GOLDEN
    assert names.get("acme/x") == record and names.all() == {"acme/x": record}


def test_a_record_with_a_mode_s_former_name_is_read_in_todays_words(names: NameStore) -> None:
    former, todays = {"mode": "audit", "energy": 0.5}, {"mode": "report-only", "energy": 0.5}
    stored = version(policy=former, override=True, base_policy=former)
    names.update("a", lambda _: AdapterRecord("a").with_version(stored))
    assert '"audit"' in (names.folder / "a.json").read_text()
    record = NameStore(names.root).get("a")
    assert record is not None and record.live.policy == record.live.base_policy == todays


def test_modes(names: NameStore) -> None:
    put(names, "x", A)
    for path in (names.root.parent, names.root, names.folder, *names.folder.iterdir()):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_nothing_is_there_and_nothing_is_made_by_looking(names: NameStore) -> None:
    assert names.get("x") is None and names.all() == {} and names.damaged() == {} and names.stamp() == 0
    assert not names.root.exists()
    assert names.update("x", lambda _: None) is None and names.all() == {}


@pytest.mark.parametrize("name", ODD, ids=ascii)
def test_odd_names(name: str, names: NameStore) -> None:
    put(names, name, A)
    put(names, "other", B)
    assert set(names.all()) == {name, "other"}
    found = names.get(name)
    assert found is not None and found.name == name
    assert {path.parent for path in names.root.rglob("*.json")} == {names.folder}
    names.update(name, lambda _: None)
    assert names.get(name) is None and set(names.all()) == {"other"}
    assert {path.name for path in names.folder.iterdir()} == {".lock", "other.json"}


@pytest.mark.parametrize("name", ["", "x" * 251, "é" * 45, "\ud800"], ids=ascii)
def test_names_that_cannot_be_files(name: str, names: NameStore) -> None:
    assert names.get(name) is None
    with pytest.raises(UsageError, match="is not a valid adapter name"):
        names.update(name, lambda _: AdapterRecord(name).with_version(version()))
    assert not names.root.exists()


@given(st.text(min_size=1, max_size=20))
def test_a_file_name_is_plain_and_says_the_name(name: str) -> None:
    file = file_of(name)
    assert unquote(file.removesuffix(".json")) == name
    assert set(file) <= {*string.ascii_letters, *string.digits, *"_.-~%"}


@given(st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=3, unique=True))
def test_any_names_live_side_by_side(texts: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        names = NameStore(folder)
        for text in texts:
            put(names, text, A)
        assert set(names.all()) == set(texts) and names.damaged() == {}


def test_a_change_that_fails_changes_nothing(names: NameStore) -> None:
    put(names, "x", A)
    before = names.get("x")

    def failing(_: object) -> None:
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        names.update("x", failing)
    # Records that could not be read again: no version, another name, no digest, no JSON.
    for wrong in (
        AdapterRecord("x"),
        AdapterRecord("y").with_version(version()),
        AdapterRecord("x").with_version(version("../x")),
        AdapterRecord("x").with_version(version(created=float("nan"))),
        AdapterRecord("x", 7, (version(version=1),)),
    ):
        with pytest.raises(ValueError):
            names.update("x", lambda _, wrong=wrong: wrong)
    assert names.get("x") == before
    put(names, "x", B)  # and the lock is free


def test_no_change_writes_nothing(names: NameStore) -> None:
    put(names, "x", A)
    file = names.folder / "x.json"
    stamp, before = names.stamp(), file.stat()
    time.sleep(0.02)  # more than a tick of the kernel's clock for files (at most 10 ms)
    names.update("x", lambda old: old)
    after = file.stat()  # its time of access may move: it was read
    assert names.stamp() == stamp
    assert (after.st_ino, after.st_mtime_ns, after.st_ctime_ns) == (
        before.st_ino, before.st_mtime_ns, before.st_ctime_ns,
    )  # fmt: skip


def test_the_stamp_moves_with_every_change(names: NameStore) -> None:
    stamps = []
    for change in (A, B, None):
        time.sleep(0.02)  # see above
        if change:
            put(names, "x", change)
        else:
            names.update("x", lambda _: None)
        stamps.append(names.stamp())
    assert stamps == sorted(set(stamps)) and stamps[0] > 0
    os.utime(names.folder, ns=(1, 12345))
    assert names.stamp() == 12345


def count_up(root: Path) -> None:
    """In a process of its own: many updates of one name."""
    for _ in range(_UPDATES):
        put(NameStore(root), "x", A)


def test_no_update_is_lost_between_processes(names: NameStore) -> None:
    processes = [_CONTEXT.Process(target=count_up, args=(names.root,)) for _ in range(_PROCESSES)]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):  # readers see whole records throughout
        assert names.damaged() == {}
    for process in processes:
        process.join()
        assert process.exitcode == 0
    record = names.get("x")
    assert record is not None and record.current == _PROCESSES * _UPDATES
    assert [v.version for v in record.versions] == list(range(391, 401))
    assert {path.name for path in names.folder.iterdir()} == {".lock", "x.json"}


def test_no_update_is_lost_between_threads(names: NameStore) -> None:
    threads = [threading.Thread(target=put, args=(names, "x", *[A] * 25)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    record = names.get("x")
    assert record is not None and record.current == 100


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_the_old_record(
    call: str, number: int, names: NameStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(names, "x", A)
    before = names.get("x")

    def failing(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        for name in ("x", "new"):
            with pytest.raises(
                StoreUnavailable, match=f"store {names.root} cannot be written .{os.strerror(number)}"
            ):
                put(names, name, B)
    assert names.get("x") == before and names.get("new") is None
    assert {path.name for path in names.folder.iterdir()} == {".lock", "x.json"}
    put(names, "x", B)  # and it works when there is room again


@pytest.mark.parametrize("failing_at", [0, 1])
def test_a_disk_that_fails_after_the_rename(
    failing_at: int, names: NameStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first fsync is the file's, the second its folder's, when the new record is in its place."""
    put(names, "x", A)
    calls: list[int] = []

    def failing(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > failing_at:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        with pytest.raises(StoreUnavailable):
            put(names, "x", B)
    record = names.get("x")
    assert record is not None and record.live.digest == (A, B)[failing_at]


def golden(**changes: Any) -> str:
    """The golden record with other fields of the record or of its version."""
    data = json.loads(GOLDEN)
    for name, value in changes.items():
        target = data if name in data or name == "more" else data["versions"][0]
        target[name] = value
    return json.dumps(data)


DAMAGED = {
    "empty": "", "cut": GOLDEN[:100], "binary": b"\xff\x00", "list": "[]", "number": "1", "null": "null",
    "deep": "[" * 100_000, "no format": "{}", "newer": golden(format=2), "other name": golden(name="y"),
    "name is a number": golden(name=1), "no versions": golden(versions=[]), "text": golden(versions="x"),
    "versions are numbers": golden(versions=[1]), "current gone": golden(current=2),
    "current true": golden(current=True), "version true": golden(version=True),
    "version text": golden(version="1"), "digest short": golden(digest="a"), "digest": golden(digest=1),
    "bytes": golden(bytes=1.5), "created": golden(created="now"), "nan": golden(created=float("nan")),
    "by": golden(by=None), "policy": golden(policy=[]), "override": golden(override=1),
    "underlying": golden(underlying=[]),
    "unknown field": golden(later=1),
    "versions twice": golden(versions=json.loads(GOLDEN)["versions"] * 2),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_record_does_not_hide_the_others(
    what: str, names: NameStore, caplog: pytest.LogCaptureFixture
) -> None:
    put(names, "good", A)
    put(names, "acme/x", A)
    file = names.folder / "acme%2Fx.json"
    text = DAMAGED[what]
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with caplog.at_level(logging.ERROR, "vllm.safelora.store"):
        for _ in range(3):
            assert set(names.all()) == {"good"}
    (entry,) = caplog.records  # once, not at every look
    assert entry.levelname == "ERROR" and str(file) in entry.getMessage()
    assert "restore it from a backup, or delete it" in entry.getMessage()
    assert set(names.damaged()) == {file}
    with pytest.raises(StoreDamaged, match="restore it from a backup, or delete it"):
        names.get("acme/x")
    with pytest.raises(StoreDamaged):
        names.update("acme/x", lambda _: None)
    assert file.exists()  # nobody but the operator decides about it
    file.write_text(GOLDEN)
    assert set(names.all()) == {"good", "acme/x"}


def test_what_is_no_record_is_not_taken_for_one(names: NameStore, caplog: pytest.LogCaptureFixture) -> None:
    put(names, "good", A)
    for other in ("README", ".new-1", "good.json~", ".good.json.swp"):
        (names.folder / other).write_text("something")
    os.mkfifo(names.folder / "pipe.json")
    (names.folder / "folder.json").mkdir()
    (names.folder / "link.json").symlink_to("good.json")
    (names.folder / "gone.json").symlink_to("nowhere")
    (names.folder / "%zz.json").write_text(golden(name="%zz"))  # quoted by hand, in another way
    (names.folder / "copy of good.json").write_text(golden(name="good"))
    os.close(os.open(os.fsencode(names.folder) + b"/\xff.json", os.O_CREAT))
    with caplog.at_level(logging.ERROR, "vllm.safelora.store"):
        assert set(names.all()) == set(names.all()) == {"good"}
    bad = {
        "pipe.json",
        "folder.json",
        "link.json",
        "gone.json",
        "%zz.json",
        "copy of good.json",
        "\udcff.json",
    }
    assert {path.name for path in names.damaged()} == bad and len(caplog.records) == len(bad)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_too_many_open_files_do_not_unload_a_name(
    number: int, names: NameStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(names, "x", A)

    def failing(*_: object, **__: object) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", failing)
        for look in (names.all, lambda: names.get("x")):
            with pytest.raises(StoreUnavailable, match="cannot be read now"):
                look()
    assert set(names.all()) == {"x"}


@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE, errno.EIO])
def test_a_folder_that_cannot_be_listed_unloads_nothing(
    number: int, names: NameStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(names, "x", A)

    def failing(_: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", failing)
        for look in (names.all, names.damaged):
            with pytest.raises(StoreUnavailable, match=f"names cannot be read now .{os.strerror(number)}"):
                look()
    assert set(names.all()) == {"x"}


def test_a_record_that_goes_while_the_folder_is_listed_is_gone(
    names: NameStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(names, "x", A)
    put(names, "y", A)
    settle(names)
    names.all()
    real = os.scandir

    def vanishing(folder: Path) -> Any:
        with real(folder) as entries:
            listed = list(entries)
        (folder / "x.json").unlink()
        return contextlib.nullcontext(listed)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", vanishing)
        assert set(names.all()) == {"y"}


def test_a_record_that_is_damaged_in_another_way_is_logged_again(
    names: NameStore, caplog: pytest.LogCaptureFixture
) -> None:
    put(names, "x", A)
    for text in ("{", "[1]"):
        (names.folder / "x.json").write_text(text)
        assert names.all() == names.all() == {}
    assert len(caplog.records) == 2


def test_a_removed_record_is_off_the_disk_before_it_is_reported(
    names: NameStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(names, "x", A)
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(Path(f"/proc/self/fd/{fd}").readlink().name))
    names.update("x", lambda _: None)
    assert synced == ["names"]


def test_only_what_changed_is_read_again(names: NameStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abc":
        put(names, name, A)
    settle(names)
    names.all()
    opened: list[str] = []
    real = os.open

    def counting(path: Any, *arguments: Any) -> int:
        opened.append(Path(path).name)
        return real(path, *arguments)

    monkeypatch.setattr("safelora_vllm.store.names.os.open", counting)
    assert set(names.all()) == set("abc") and opened == []
    put(NameStore(names.root), "b", B)
    (names.folder / "c.json").unlink()
    opened.clear()
    found = names.all()
    assert opened == ["b.json"] and set(found) == {"a", "b"} and found["b"].live.digest == B


def test_a_record_from_a_backup_is_seen_though_it_is_old(names: NameStore) -> None:
    put(names, "x", A)
    settle(names)
    names.all()
    text = (names.folder / "x.json").read_text()
    (names.folder / "x.json").write_text(text.replace(A, B))  # of the same size
    settle(names)
    assert names.all()["x"].live.digest == B


@pytest.mark.parametrize(("age", "read"), [(-1, True), (0, True), (100_000_000, True), (100_000_001, False)])
def test_a_record_is_read_at_each_look_for_a_tenth_of_a_second(
    age: int, read: bool, names: NameStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until then a second write may leave it in the same state. Ages in ns; a clock may be behind."""
    put(names, "x", A)
    now = time.time_ns()
    os.utime(names.folder / "x.json", ns=(now, now - age))
    opened: list[str] = []
    real = os.open

    def counting(path: Any, *arguments: Any) -> int:
        opened.append(Path(path).name)
        return real(path, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(time, "time_ns", lambda: now)
        names.all()
        patch.setattr(os, "open", counting)
        names.all()
    assert opened == ["x.json"] * read


def test_a_second_change_within_a_tick_is_seen(names: NameStore) -> None:
    """Same size, same mtime, and an inode that was given away again: only its age tells."""
    put(names, "x", A)
    file = names.folder / "x.json"
    names.all()
    status = file.stat()
    with file.open("r+") as stream:
        text = stream.read().replace(A, B)
        stream.seek(0)
        stream.write(text)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert names.all()["x"].live.digest == B


def test_a_thousand_names_are_looked_at_again_in_milliseconds(names: NameStore) -> None:
    """Records that have not changed are not read again. Compared in one run: other tests run beside it."""
    put(names, "acme/x", A)
    for number in range(1000):
        name = f"acme/adapter-{number}"
        (names.folder / file_of(name)).write_text(golden(name=name))
    settle(names)

    def look(at: NameStore) -> float:
        start = time.perf_counter()
        assert len(at.all()) == 1001
        return time.perf_counter() - start

    first = min(look(NameStore(names.root)) for _ in range(5))
    look(names)
    again = min(look(names) for _ in range(10))
    assert again < first / 4  # measured: 4 ms and 54 ms; reading them all again would be as slow as at first


def test_numbers_are_given_once(names: NameStore) -> None:
    """Also to another process, and after a restart. vLLM counts its own from 1."""
    assert [names.reserve_ids(count) for count in (1, 10)] == [2**20, 2**20 + 1]
    assert NameStore(names.root).reserve_ids(5) == FIRST_ID + 11
    assert (names.root / "ids").read_text() == str(FIRST_ID + 16)


def test_numbers_are_given_to_one_at_a_time(names: NameStore) -> None:
    """While another process gives some, this one waits."""
    names.reserve_ids(1)
    given: list[int] = []
    thread = threading.Thread(target=lambda: given.append(names.reserve_ids(1)))
    with locked(names.root):
        thread.start()
        thread.join(0.1)  # without the lock: 1 ms
        assert given == []
        (names.root / "ids").write_text(str(FIRST_ID + 100))
    thread.join()
    assert given == [FIRST_ID + 100]


def test_numbers_end_before_32_bits_do(names: NameStore) -> None:
    assert LAST_ID == 2**31 - 1
    names.reserve_ids(1)
    file = names.root / "ids"
    file.write_text(str(LAST_ID - 100))
    with pytest.raises(StoreUnavailable, match=r"all adapter ids are used up; start with a new store"):
        names.reserve_ids(101)
    assert file.read_text() == str(LAST_ID - 100), "nothing was given"
    assert names.reserve_ids(100) == LAST_ID - 100
    with pytest.raises(StoreUnavailable, match="used up"):
        names.reserve_ids(1)


def test_a_missing_count_gives_no_numbers_where_some_were_given(names: NameStore) -> None:
    """A copy of a store without it would give the numbers of its adapters again."""
    put(names, "x", A)
    with pytest.raises(
        StoreDamaged, match=r"ids is missing, but the store has names; restore it from a backup"
    ):
        names.reserve_ids(1)
    assert not (names.root / "ids").exists()
    (names.root / "ids").write_text(str(FIRST_ID + 100))
    assert names.reserve_ids(1) == FIRST_ID + 100


@pytest.mark.parametrize("text", ["", "many", "1.5", "\xff", "-1", "1", str(2**31), "9" * 5000])
def test_a_damaged_count_gives_no_numbers(text: str, names: NameStore) -> None:
    names.reserve_ids(1)
    (names.root / "ids").write_bytes(text.encode("latin-1"))
    with pytest.raises(
        StoreDamaged, match=r"holds no number; restore it from a backup, or start with a new store$"
    ):
        names.reserve_ids(1)
    assert (names.root / "ids").read_bytes() == text.encode("latin-1")


def test_what_is_wrong_with_a_file_is_told_in_full(
    names: NameStore, caplog: pytest.LogCaptureFixture
) -> None:
    put(names, "x", A)
    remedy = "restore it from a backup, or delete it and upload the adapter again"
    record, folder = names.folder / "x.json", names.folder / "y.json"
    record.write_text(golden(name="y"))
    folder.mkdir()
    expected = {
        record: "no record of a name (ValueError: it is the record of 'y')",
        folder: "a file that cannot be read (Is a directory)",
    }
    assert names.all() == {} and names.damaged() == expected
    told = {f"{file} is {wrong}; {remedy}" for file, wrong in expected.items()}
    assert {entry.getMessage() for entry in caplog.records} == told and len(caplog.records) == 2
    for name in "xy":
        with pytest.raises(StoreDamaged) as damaged:
            names.get(name)
        assert str(damaged.value) in told


def test_the_file_or_the_store_that_is_in_trouble_is_told(
    names: NameStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(names, "x", A)

    def failing(*_: object, **__: object) -> int:
        raise OSError(errno.ENFILE, os.strerror(errno.ENFILE))

    store = f"the adapter store {names.root}"
    for told, call, look in (
        (f"{names.folder / 'x.json'} cannot be read now", "os.open", lambda: names.get("x")),
        (f"{names.folder} cannot be read now", "os.scandir", names.all),
        (f"{store} cannot be written", "fcntl.flock", lambda: put(names, "x", B)),
        (f"{store} cannot be written", "fcntl.flock", lambda: names.reserve_ids(1)),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(call, failing)
            with pytest.raises(StoreUnavailable, match=f"^{told} .Too many open files in system"):
                look()


def test_a_link_to_a_known_record_is_no_record(names: NameStore) -> None:
    """Also where another folder was put in the folder's place, with links to the files in the old one."""
    put(names, "x", A)
    settle(names)
    assert set(names.all()) == {"x"}
    old = names.folder.rename(names.root / "old")
    names.folder.mkdir()
    (names.folder / "x.json").symlink_to(old / "x.json")
    assert names.all() == {} and set(names.damaged()) == {names.folder / "x.json"}
