"""Stores on several disks with one bucket: the same names, none lost, none half done, also under kill -9."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from safelora_vllm.adapters.read import WEIGHTS, content_digest
from safelora_vllm.errors import ChangedMeanwhile, GuardError, StoreDamaged, StoreUnavailable
from safelora_vllm.remote.bucket import Bucket, Conflict, _allows_http
from safelora_vllm.remote.bucket_causes import because
from safelora_vllm.store import AdapterRecord, NameStore, RawStore, mirror
from safelora_vllm.store.housekeeping import verify
from safelora_vllm.store.mirror import MirroredNames, attach, check_mirror, open_names
from safelora_vllm.store.name_record import file_of
from tests.mirror_writer import add, files
from tests.moto_server import CREDENTIALS, s3

_numbers = iter(range(1000))


@pytest.fixture(scope="module")
def storage() -> Iterator[tuple[str, Any]]:
    with s3() as found:
        yield found


@pytest.fixture
def url(storage: tuple[str, Any], monkeypatch: pytest.MonkeyPatch) -> str:
    """Of a part of the bucket that is empty."""
    for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": storage[0], "AWS_ALLOW_HTTP": "true"}.items():
        monkeypatch.setenv(name, value)
    return f"s3://bucket/mirror{next(_numbers)}"


@pytest.fixture
def disks(url: str, tmp_path: Path) -> tuple[Path, Path]:
    for name in ("one", "two"):
        attach(tmp_path / name, url)
    return tmp_path / "one", tmp_path / "two"


def mirrored(root: Path) -> MirroredNames:
    names = open_names(root)
    assert isinstance(names, MirroredNames)
    return names


def test_what_the_bucket_has_to_guarantee(url: str) -> None:
    """The storage of these tests does: without it they would say nothing."""
    bucket = Bucket(url)
    first = bucket.put("a", b"1", None)
    for etag in (None, '"another"'):
        with pytest.raises(Conflict):
            bucket.put("a", b"2", etag)
    second = bucket.put("a", b"2", first)
    with pytest.raises(Conflict):
        bucket.put("a", b"3", first)
    assert bucket.get("a") == (b"2", second) and bucket.get("b") is None


def test_two_disks_serve_the_same(disks: tuple[Path, Path]) -> None:
    one, two = map(mirrored, disks)
    add(disks[0], "a", 1)
    two.pull()
    assert one.all() == two.all() and set(two.all()) == {"a"}
    digest = two.all()["a"].live.digest
    assert RawStore(disks[1]).damaged(digest) is None
    add(disks[1], "a", 2)
    one.look()
    assert one.all()["a"].current == 2
    one.update("a", lambda _: None)
    two.look()
    assert two.all() == {} == one.all()
    add(disks[1], "a", 3)
    one.look()
    assert one.all()["a"].current == 1 == two.all()["a"].current


def test_ids_are_never_given_twice(disks: tuple[Path, Path]) -> None:
    stores = [mirrored(disks[number % 2]) for number in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = [list(pool.map(lambda names: names.reserve_ids(3), stores)) for _ in range(4)]
    ids = [first + more for firsts in found for first in firsts for more in range(3)]
    assert len(set(ids)) == len(ids) == 48


def test_a_change_is_of_what_the_bucket_has(disks: tuple[Path, Path]) -> None:
    """A server that has not looked yet is told what the other wrote, and may refuse."""
    add(disks[0], "a", 1)
    seen: list[AdapterRecord | None] = []

    def change(record: AdapterRecord | None) -> AdapterRecord | None:
        seen.append(record)
        raise ChangedMeanwhile("a")

    with pytest.raises(ChangedMeanwhile):
        mirrored(disks[1]).update("a", change)
    assert seen[0] is not None and seen[0].current == 1


def test_a_change_begins_from_what_the_bucket_has(disks: tuple[Path, Path]) -> None:
    """Without waiting for the next look: a client may be sent to another server with each request."""
    one, two = map(mirrored, disks)
    assert two.newest("a") is None
    add(disks[0], "a", 1)
    assert two.get("a") is None
    found = two.newest("a")
    assert found is not None and found.current == 1 and found == two.get("a")
    assert RawStore(disks[1]).damaged(found.live.digest) is None, "it can be judged here"
    one.update("a", lambda _: None)
    assert two.newest("a") is None is two.get("a")
    assert two.newest("x" * 300) is None


def test_a_name_whose_upload_is_lost_can_be_replaced(disks: tuple[Path, Path]) -> None:
    add(disks[0], "a", 1)
    digest = mirrored(disks[0]).all()["a"].live.digest
    bucket = mirrored(disks[1])._bucket
    bucket.put(f"raw/{digest}/{WEIGHTS}", b"damaged", bucket.get(f"raw/{digest}/{WEIGHTS}")[1])
    found = mirrored(disks[1]).newest("a")
    assert found is not None and found.live.digest == digest
    add(disks[1], "a", 2)
    bucket.put(f"names/{file_of('b')}", b"no record", None)
    with pytest.raises(StoreDamaged):
        mirrored(disks[1]).newest("b")


def test_concurrent_changes_of_one_name_are_all_there(disks: tuple[Path, Path]) -> None:
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda number: add(disks[number % 2], "a", number), range(8)))
    for root in disks:
        names = mirrored(root)
        names.pull()
        assert names.all()["a"].current == 8
        assert len({version.digest for version in names.all()["a"].versions}) == 8


def test_a_bucket_that_does_not_answer(
    disks: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    add(disks[0], "a", 1)
    names = mirrored(disks[0])

    def fails(*_: Any) -> Any:
        raise StoreUnavailable("the bucket cannot be read")

    with monkeypatch.context() as patch:
        for method in ("get", "etags", "put", "size"):
            patch.setattr(Bucket, method, fails)
        names.look()
        names.look()
        assert set(names.all()) == {"a"} and names.is_out, "what is known stays"
    names.look()
    assert not names.is_out
    assert caplog.text.count("What is known of it stays in force") == 1
    monkeypatch.setattr(Bucket, "get", fails)
    with pytest.raises(StoreUnavailable):
        names.update("a", lambda _: None)
    assert set(names.all()) == {"a"}, "nothing is changed"


def test_content_that_is_not_what_its_name_says(
    disks: tuple[Path, Path], url: str, storage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    add(disks[0], "a", 1)
    digest = content_digest(*files("a", 1).values())
    key = f"{url.removeprefix('s3://bucket/')}/raw/{digest}/adapter_model.safetensors"
    storage[1].put_object(Bucket="bucket", Key=key, Body=b"other bytes")
    add(disks[0], "b", 2)
    names = mirrored(disks[1])
    names.pull()
    names.pull()
    assert set(names.all()) == {"b"} and not RawStore(disks[1]).has(digest)
    assert caplog.text.count("has other content") == 1
    with pytest.raises(StoreDamaged, match="other content"):
        names.update("a", lambda record: record)
    add(disks[0], "a", 3)  # the old version's upload is still wrong
    names.pull()
    assert set(names.all()) == {"a", "b"}


def test_a_record_that_is_none_is_left_out(
    disks: tuple[Path, Path], url: str, storage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    add(disks[0], "a", 1)
    prefix = url.removeprefix("s3://bucket/")
    storage[1].put_object(Bucket="bucket", Key=f"{prefix}/names/b.json", Body=b"{}")
    storage[1].put_object(Bucket="bucket", Key=f"{prefix}/names/..%2Fc.json", Body=b"{}")
    names = mirrored(disks[1])
    names.pull()
    names.pull()
    assert set(names.all()) == {"a"} and caplog.text.count("is left out") == 2
    with pytest.raises(StoreDamaged, match="is no record of a name"):
        names.update("b", lambda _: None)


def test_what_cannot_be_taken_over_is_not_fetched_each_time(
    disks: tuple[Path, Path], url: str, storage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(disks[0], "a", 1)
    key = f"{url.removeprefix('s3://bucket/')}/raw/{content_digest(*files('a', 1).values())}"
    sound = storage[1].get_object(Bucket="bucket", Key=f"{key}/{WEIGHTS}")["Body"].read()
    storage[1].put_object(Bucket="bucket", Key=f"{key}/{WEIGHTS}", Body=b"other bytes")
    names, asked, real = mirrored(disks[1]), list[str](), Bucket.get

    def get(self: Bucket, path: str, *more: int) -> Any:
        asked.append(path)
        return real(self, path, *more)

    monkeypatch.setattr(Bucket, "get", get)
    names.pull()
    seen = len(asked)
    names.pull()
    assert len(asked) == seen > 0 and not names.all()
    storage[1].put_object(Bucket="bucket", Key=f"{key}/{WEIGHTS}", Body=sound)
    monkeypatch.setattr(mirror, "_AGAIN_SECONDS", 0.0)  # minutes later
    names.pull()
    assert set(names.all()) == {"a"}


def test_a_slow_download_holds_up_no_change(
    disks: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    add(disks[0], "a", 1)
    begun, goes_on, real = Event(), Event(), Bucket.get

    def get(self: Bucket, path: str, *more: int) -> Any:
        if path.endswith(WEIGHTS):
            begun.set()
            assert goes_on.wait(10)
        return real(self, path, *more)

    monkeypatch.setattr(Bucket, "get", get)
    two = mirrored(disks[1])
    with ThreadPoolExecutor(2) as pool:
        pulled = pool.submit(two.pull)
        assert begun.wait(10)
        changed = pool.submit(add, disks[1], "b", 2)
        try:
            changed.result(timeout=5)
        finally:
            goes_on.set()
        pulled.result(timeout=10)
    two.pull()
    assert set(two.all()) == {"a", "b"}


def test_an_upload_that_is_there_is_not_downloaded_to_see_that(
    disks: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    add(disks[0], "a", 1)
    shutil.rmtree(disks[0] / "raw")  # of an older version, lost here
    real = Bucket.get
    asked: list[str] = []
    monkeypatch.setattr(
        Bucket, "get", lambda self, path, *more: asked.append(path) or real(self, path, *more)
    )
    add(disks[0], "a", 2)
    assert all(path.startswith(("names/", "ids")) for path in asked)


def test_a_damaged_count_in_the_bucket_gives_no_numbers_and_keeps_no_name_away(
    disks: tuple[Path, Path], url: str, caplog: pytest.LogCaptureFixture
) -> None:
    add(disks[0], "a", 1)
    before = (disks[0] / "ids").read_bytes()
    bucket = Bucket(url)
    found = bucket.get("ids")
    assert found is not None
    bucket.put("ids", b"many", found[1])
    with pytest.raises(StoreDamaged, match="ids of the bucket holds no number; restore it"):
        mirrored(disks[0]).reserve_ids(1)
    two = mirrored(disks[1])
    two.pull()
    assert set(two.all()) == {"a"} and "ids of the bucket holds no number" in caplog.text
    assert (disks[0] / "ids").read_bytes() == before and not (disks[1] / "ids").exists()


def test_a_large_object_may_take_longer(url: str) -> None:
    """A client's patience is for a whole request, whatever its size."""
    bucket, given = Bucket(url), list[str]()
    bucket._from_url = lambda _, client_options, **__: given.append(client_options["timeout"])
    for nbytes in (1, 300_000_000, 300_000_001):
        bucket._client(nbytes)
    assert given == ["60s", "1920s"] and 300_000_000 / 1920 < 256 * 1024


def test_a_store_keeps_to_its_bucket(url: str, tmp_path: Path) -> None:
    add(tmp_path / "own", "a", 1)
    with pytest.raises(GuardError, match="has names already"):
        attach(tmp_path / "own", url)
    attach(tmp_path / "own", None)
    attach(tmp_path / "one", f"{url}/")
    attach(tmp_path / "one", url)
    for other in (None, "s3://bucket/other"):
        with pytest.raises(GuardError, match="start with --store-mirror"):
            attach(tmp_path / "one", other)
    assert type(open_names(tmp_path / "own")) is NameStore
    for wrong in ("/srv/x", "https://host.example/x", "file:///srv", "s3://bucket/x?y"):
        with pytest.raises(GuardError, match="is not a valid bucket"):
            Bucket(wrong)


def test_an_endpoint_without_tls_needs_no_second_word(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever names an http:// endpoint for S3 has said that it has no TLS."""
    monkeypatch.delenv("AWS_ALLOW_HTTP")
    assert Bucket(url).get("a") is None
    assert not _allows_http("gs://bucket/x"), "the endpoint is that of S3"
    monkeypatch.setenv("AWS_ALLOW_HTTP", "false")
    with pytest.raises(StoreUnavailable, match=r"no TLS; set AWS_ALLOW_HTTP=true, or give an https://"):
        Bucket(url).get("a")


def test_a_bucket_that_cannot_be_used_is_said_to_be_so_at_once(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the cause and what to do, before vLLM starts and with nothing written."""
    monkeypatch.setattr("safelora_vllm.remote.bucket._RETRY", {"max_retries": 0})
    with pytest.raises(StoreUnavailable, match="there is no such bucket; create it"):
        check_mirror(tmp_path / "one", "s3://none-of-these/x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StoreUnavailable, match="its endpoint was not reached; check the endpoint"):
        check_mirror(tmp_path / "one", url)
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(GuardError, match="set AZURE_STORAGE_ACCOUNT_NAME"):
        check_mirror(tmp_path / "one", "az://container/x")
    assert not (tmp_path / "one").exists()
    check_mirror(tmp_path / "one", None)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("PUT http://169.254.169.254/latest/api/token - status code: 403", "there are no credentials"),
        ("Server returned non-2xx status code: 403 Forbidden: <Code>X</Code>", "access was denied; check"),
        ("inner: BareRedirect", "set AWS_REGION"),
        ("status code: 501 Not Implemented", "writes on condition"),
        ("kind: Timeout,", "did not answer in time; try again later"),
        ("status code: 503 Slow Down: X-Amz-Signature=abc", "it answered status 503; try again later"),
        ("X-Amz-Signature=abc", "ValueError; try again later"),
    ],
)
def test_the_cause_is_named_without_the_text_of_the_other_side(text: str, cause: str) -> None:
    said = because(ValueError(text))
    assert cause in said and "abc" not in said and "<Code>" not in said


def test_killed_writers_lose_nothing_and_leave_nothing_half_done(
    disks: tuple[Path, Path], url: str, tmp_path: Path
) -> None:
    """Two writers on two disks, killed at some moment, four times. Then a third disk has the same."""
    done, may_be = 0, dict[str, set[str]]()  # name → digests, "none" without the name
    for turn in range(4):
        writers = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.mirror_writer", str(root), str(turn)], stdout=subprocess.PIPE,
                cwd=Path(__file__).parents[1], env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            for root in disks
        ]  # fmt: skip
        said: list[list[str]] = []
        for writer in writers:
            assert writer.stdout is not None
            said.append([writer.stdout.readline().decode() for _ in range(7)])  # three changes
        time.sleep(0.03 * turn)
        for writer, first in zip(writers, said, strict=True):
            writer.kill()
            lines = first + writer.communicate()[0].decode().splitlines(keepends=True)
            done += lines.count("done\n")
            for line, after in zip(lines, [*lines[1:], ""], strict=True):
                if line.startswith("try ") and line.endswith("\n"):
                    _, name, digest = line.split()
                    answered = after == "done\n"
                    may_be[name] = {digest} if answered else may_be.get(name, {"none"}) | {digest}
    assert done > 10
    attach(tmp_path / "three", url)
    roots = [*disks, tmp_path / "three"]
    for root in roots:
        mirrored(root).pull()
    found = [mirrored(root).all() for root in roots]
    assert found[0] == found[1] == found[2] and found[0]
    for name in set(may_be) - {"shared"}:
        record = found[0].get(name)
        assert (record.live.digest if record else "none") in may_be[name], "an answered change is in force"
    ids = [version.id for record in found[0].values() for version in record.versions]
    assert len(set(ids)) == len(ids)
    for root in roots:
        problems = [
            problem for problem in verify(root, stale_seconds=3600.0) if "no name refers" not in str(problem)
        ]
        assert not problems
