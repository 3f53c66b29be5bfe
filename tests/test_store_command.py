"""``safelora-vllm store``: exit codes, what is printed, and what lies on disk afterwards."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from safelora_vllm.cli.main import main
from safelora_vllm.errors import Reason
from safelora_vllm.store import AdapterRecord, NameStore, PublishedStore, RawStore, Version, serving
from safelora_vllm.store.audit_log import AuditLog
from safelora_vllm.store.name_record import to_dict
from tests.test_store_housekeeping import age, digest_of, key_of, put

Run = Callable[..., tuple[int, str, str]]
HOUR = 3600.0


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A store with two names, one with an older version, and an upload without a name."""
    folder = tmp_path / "store"
    for number, name in enumerate(("acme/x", "acme/x", "b", None)):
        age(folder, put(folder, number, name), (10 - number) * HOUR)
    return folder


@pytest.fixture
def run(root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run ``store`` with options on the store: exit code, standard output, standard error."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*options: str, store: Path = root) -> tuple[int, str, str]:
        try:
            code = main(["store", *options, "--adapter-store", str(store)])
        except SystemExit as error:  # argparse ends the process itself
            assert isinstance(error.code, int)
            code = error.code
        return code, *capsys.readouterr()

    return call


def test_ls_shows_what_each_name_serves(run: Run, root: Path) -> None:
    digest = digest_of(2)
    changes = {"policy": {"threshold": 0.9}, "by": "ops", "override": True, "reason": "r"}
    NameStore(root).update(
        "b", lambda old: old and old.with_version(dataclasses.replace(old.live, **changes))
    )
    code, out, _ = run("ls")
    (x,) = [line.split() for line in out.splitlines() if "acme/x" in line]
    (b,) = [line.split() for line in out.splitlines() if digest[:12] in line]
    cells = [cell for cell in x if cell not in "│┃|"]
    assert code == 0 and cells[:7] == ["acme/x", "unknown", "2", digest_of(1)[:12], "1.0", "KB", "4"]
    assert cells[-1] == "tenant" and digest[:13] not in out
    assert [cell for cell in b if cell not in "│┃|"][-3:] == ["ops", "OVERRIDE", "threshold=0.9"]


def test_ls_json_has_all_versions(run: Run, root: Path) -> None:
    code, out, _ = run("ls", "--json")
    records = json.loads(out)
    assert code == 0 and [record["name"] for record in records] == ["acme/x", "b"]
    stored = NameStore(root).get("acme/x")
    assert stored is not None
    state = {"word": "unknown", "why": ""}
    assert records[0] == json.loads(json.dumps({**to_dict(stored), "state": state}))
    assert list(records[0]) == ["name", "current", "versions", "state"]
    assert list(records[0]["versions"][0])[:10] == [
        "version", "digest", "bytes", "rank", "created", "by", "policy", "override",
        "underlying", "reason",
    ]  # fmt: skip


def test_ls_finds_the_names_of_a_content(run: Run, root: Path) -> None:
    """Old versions too: one can be rolled back to."""
    NameStore(root).update("b", lambda old: old and old.with_version(NameStore(root).all()["acme/x"].live))
    shared, old, none = digest_of(1), digest_of(0), "f" * 64
    lines = [f"acme/x version 2 current {shared}", f"b version 2 current {shared}"]
    for given in (shared, shared[:12]):
        code, out, _ = run("ls", "--digest", given)
        assert code == 0 and out.splitlines() == lines
    assert run("ls", "--digest", old)[1] == f"acme/x version 1 old {old}\n"
    code, out, err = run("ls", "--digest", none)
    assert (code, out) == (0, "") and f"no name has a version with the content {none}" in err


@pytest.mark.parametrize("given", ["", "abc", "A" * 64, "sha256:" + "a" * 64, "a" * 65, "9b6d18e2…"])
def test_what_is_no_digest_is_an_error_and_not_an_empty_list(given: str, run: Run) -> None:
    code, out, err = run("ls", "--digest", given)
    assert code == 2 and not out and "expected 8 to 64 of the digits" in err


def test_ls_prints_json_or_a_digests_names(run: Run) -> None:
    code, out, err = run("ls", "--json", "--digest", "a" * 64)
    assert code == 2 and not out and "not allowed with" in err


def test_ls_sends_no_control_characters_to_the_terminal(run: Run, root: Path) -> None:
    name = "\x1b[31m[red]\n"
    new = Version(0, "a" * 64, 1, 1, 0.0, by="\x07")
    NameStore(root).update(name, lambda _: AdapterRecord(name).with_version(new))
    _, out, _ = run("ls")
    assert r"'\x1b[31m[red]\n'" in out and "\x1b" not in out and "\x07" not in out


def test_ls_of_a_store_without_names(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert run("ls", store=tmp_path / "empty")[0] == 0
    assert run("ls", "--json", store=tmp_path / "empty")[1] == "[]\n"


def test_gc_alone_removes_leftovers_only(run: Run, root: Path) -> None:
    old = root / "raw" / ".new-x"
    old.mkdir()
    os.utime(old, (1000, 1000))
    before = {path for path in root.rglob("*") if path != old}
    code, out, error = run("gc")
    assert (code, error) == (0, "") and "--unreferenced" in out
    assert set(root.rglob("*")) == before


def test_gc_down_to_a_size(run: Run, root: Path) -> None:
    code, out, _ = run("gc", "--max-bytes", "1GB")
    assert code == 0 and "published copies: removed 0 folders of 0 B" in out
    code, out, _ = run("gc", "--max-bytes", "0")
    assert code == 0 and "published copies: removed 2 folders of " in out
    assert set(PublishedStore(root).all()) == {key_of(digest_of(1)), key_of(digest_of(2))}
    assert len(RawStore(root).all()) == 4


def test_gc_of_uploads_that_no_name_refers_to(run: Run, root: Path) -> None:
    code, out, _ = run("gc", "--unreferenced")
    assert code == 0 and "uploads: removed 2 folders of " in out  # it and its published copy
    assert RawStore(root).all() == sorted(map(digest_of, range(3)))


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("0", 0), ("12", 12), ("7B", 7), ("500MB", 500_000_000), ("10GB", 10**10), ("10gb", 10**10),
        ("1.5 GB", 1_500_000_000), ("2GiB", 2**31), ("1TiB", 2**40), ("3kb", 3000),
    ],
)  # fmt: skip
def test_sizes(text: str, nbytes: int, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from safelora_vllm.store import housekeeping

    asked: list[int] = []

    def collect(_: Path, max_bytes: int) -> housekeeping.Collected:
        asked.append(max_bytes)
        return housekeeping.Collected((), 0, 0)

    monkeypatch.setattr(housekeeping, "collect", collect)
    assert run("gc", "--max-bytes", text)[0] == 0 and asked == [nbytes]


@pytest.mark.parametrize("text", ["", "GB", "-1", "1XB", "1 0", "ten", "1e9", "nan", "inf", "٣"])
def test_what_is_no_size(text: str, run: Run) -> None:
    code, _, error = run("gc", f"--max-bytes={text}")
    assert code == 2 and "10GB" in error


def test_verify_says_what_is_wrong_and_what_to_do(run: Run, root: Path) -> None:
    code, out, error = run("verify")
    assert (code, out) == (
        0,
        "the adapter store is sound: 2 names, 4 uploads\n",
    ) and "Adapter store" in error  # the bar
    RawStore(root).remove(digest_of(1))
    (root / "names" / "c.json").write_text("{")
    code, out, _ = run("verify")
    lines = out.splitlines()
    assert code == 1 and len(lines) == 3 and lines[-1] == "2 problems"
    assert "c.json" in lines[0] and "delete it" in lines[0]
    assert digest_of(1) in lines[1] and "upload the adapter again (version 2 of 'acme/x'" in lines[1]


def test_rm_takes_the_name_and_leaves_the_upload(run: Run, root: Path) -> None:
    code, out, _ = run("rm", "acme/x")
    assert code == 0 and "acme/x with 2 versions removed" in out
    assert set(NameStore(root).all()) == {"b"} and len(RawStore(root).all()) == 4
    code, out, error = run("rm", "acme/x")
    assert code == 2 and out == "" and "there is no adapter 'acme/x'" in error
    assert run("gc", "--unreferenced")[0] == 0
    assert RawStore(root).all() == [digest_of(2)]


def test_a_damaged_name_is_told(run: Run, root: Path) -> None:
    (root / "names" / "b.json").write_text("{")
    for options in (("rm", "b"), ("gc", "--unreferenced")):
        code, _, error = run(*options)
        assert code == 2 and "b.json" in error and "restore it from a backup" in error
    code, out, _ = run("ls")
    assert code == 0 and "acme/x" in out and (root / "names" / "b.json").exists()


@pytest.mark.parametrize("action", [("ls",), ("gc",), ("verify",), ("rm", "x")], ids=" ".join)
def test_a_store_that_is_not_there(action: tuple[str, ...], run: Run, tmp_path: Path) -> None:
    code, out, error = run(*action, store=tmp_path / "none")
    assert code == 2 and out == "" and "is not an adapter store: expected the server's" in error
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("action", [("ls",), ("gc",), ("verify",), ("rm", "x")], ids=" ".join)
def test_a_folder_of_other_things_is_no_store(action: tuple[str, ...], run: Run, tmp_path: Path) -> None:
    (tmp_path / "other" / "things").mkdir(parents=True)
    code, out, error = run(*action, store=tmp_path / "other")
    assert code == 2 and out == "" and "is not an adapter store: expected the server's" in error


def test_an_empty_folder_is_a_sound_store(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert run("verify", store=tmp_path / "empty")[:2] == (
        0,
        "the adapter store is sound: 0 names, 0 uploads\n",
    )


def test_the_default_store_is_the_server_s(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(root.parent))
    root.rename(root.parent / "safelora-vllm")
    assert main(["store", "ls", "--json"]) == 0
    assert "acme/x" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options", [(), ("more",), ("rm",), ("ls", "--jso"), ("gc", "--max-bytes")], ids=" ".join
)
def test_wrong_usage_is_2(options: tuple[str, ...], run: Run) -> None:
    code, out, error = run(*options)
    assert code == 2 and out == "" and "usage: safelora-vllm" in error


def test_times_are_local(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    assert "1970-01-01 00:00" in run("ls")[1]
    monkeypatch.undo()
    time.tzset()


def test_ls_says_what_is_served_and_why_the_rest_is_not(run: Run, root: Path) -> None:
    names, why = NameStore(root), (Reason("total_norm", "too large"),)
    for name, changes in (
        ("served", {}),
        ("refused", {"refused": why}),
        ("acme/other", {"ruleset_digest": "acme's"}),
        ("waits", {"ruleset_digest": "former"}),
        ("lost", {}),
    ):
        new = Version(0, "a" * 64, 1, 1, 0.0, "ops", ruleset_digest="server's")
        new = dataclasses.replace(new, **changes)
        names.update(name, lambda _, name=name, new=new: AdapterRecord(name).with_version(new))
    refused = json.loads(run("ls", "--json")[1])
    assert {r["name"]: r["state"]["word"] for r in refused}["refused"] == "refused", "also without a server"
    serving.save(root, serving.Serving("server's", {"acme": "acme's"}, {"lost": "its upload is damaged"}))
    found = {r["name"]: tuple(r["state"].values()) for r in json.loads(run("ls", "--json")[1])}
    assert found == {
        "served": ("served", ""),
        "refused": ("refused", "[total_norm] too large"),
        "acme/other": ("served", ""),
        "waits": ("being judged", "the rules have changed"),
        "lost": ("unavailable", "its upload is damaged"),
        "acme/x": ("being judged", "the rules have changed"),
        "b": ("being judged", "the rules have changed"),
    }
    out = run("ls")[1]
    assert "refused: [total_norm] too large" in out and "unavailable: its upload is damaged" in out
    (root / "serving.json").write_text("{")
    assert "unknown" in run("ls")[1]


def test_rm_is_in_the_audit_log(run: Run, root: Path) -> None:
    assert run("rm", "b")[0] == 0 and run("rm", "b")[0] == 2
    (record,) = AuditLog(root / "audit").read()
    assert record.pop("change") and {**record, "time": ""} == {
        "time": "", "actor": "operator", "action": "delete", "adapter": "b", "decision": "removed",
        "version": 1,
    }  # fmt: skip
