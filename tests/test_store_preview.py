"""``safelora-vllm store preview``: what another policy would change, and that nothing is written."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from safelora_vllm.adapters.read import read_adapter
from safelora_vllm.cli.main import main
from safelora_vllm.errors import Reason
from safelora_vllm.gate.admit import GateSettings, admit
from safelora_vllm.policy import Policy
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.store import AdapterRecord, NameStore, PublishedStore, RawStore, Version
from tests.tiny import Draft, lora

Run = Callable[..., dict[str, Any]]


@pytest.fixture
def root(cache: ProjectorCache, tmp_path: Path) -> Path:
    """Three names, judged by Safe LoRA with its threshold; one of them has a policy of its own."""
    store = tmp_path / "store"
    settings = GateSettings(cache, Policy(method="safe-lora"))
    for seed, (name, own) in enumerate((("acme/x", {}), ("b", {}), ("c", {"mode": "report-only"}))):
        folder = Draft(tensors=lora(seed=seed)).write(tmp_path / str(seed))
        done = admit(folder, name, settings.under(own), PublishedStore(store), RawStore(store))
        new = Version(0, done.report.digest, done.nbytes, 4, 0.0, "ops", own, bool(own), key=done.key or "")
        NameStore(store).update(name, lambda _, name=name, new=new: AdapterRecord(name).with_version(new))
    return store


@pytest.fixture
def run(root: Path, cache: ProjectorCache, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run it with policy options: name → what would become of it."""

    def call(*options: str) -> dict[str, Any]:
        before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
        given = ["--adapter-store", str(root), "--projectors", str(cache.folder), "--json"]
        assert main(["store", "preview", *given, *options]) == 0
        assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before
        return {change["name"]: change for change in json.loads(capsys.readouterr().out)}

    return call


def test_the_same_rules_change_nothing(run: Run) -> None:
    found = run("--method", "safe-lora")
    assert [change["changed"] for change in found.values()] == [False] * 3
    assert all(change["before"] == change["after"] for change in found.values())
    assert found["c"]["after"]["mode"] == "report-only", "an override stays one"


def test_stricter_rules(run: Run, root: Path) -> None:
    found = run("--method", "safe-lora", "--select", "all")
    assert found["acme/x"]["changed"] and found["b"]["changed"] and not found["c"]["changed"]
    before, after = found["b"]["before"], found["b"]["after"]
    assert before["projected"] < after["projected"] == after["modules"] == 14
    norm = after["total_norm"]
    refused = run("--method", "safe-lora", "--max-total-norm", str(norm / 2))["b"]["after"]
    assert not refused["accepted"] and refused["reasons"] == ["total_norm"]
    names = NameStore(root)
    live = dataclasses.replace(names.all()["b"].live, refused=(Reason("total_norm", "…"),), key="")
    names.update("b", lambda old: old and old.with_live(live))
    assert not run("--method", "safe-lora", "--max-total-norm", str(norm / 2))["b"]["changed"]
    assert run("--method", "safe-lora")["b"]["changed"]


def test_tenants_have_their_own_rules(run: Run, tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    keys.touch(0o600)
    keys.write_text('[tenants.acme.policy]\nselect = "all"\n')
    found = run("--method", "safe-lora", "--keys", str(keys))
    assert found["acme/x"]["changed"] and not found["b"]["changed"]


def test_the_table_shows_what_changes(
    root: Path, cache: ProjectorCache, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    given = ["--adapter-store", str(root), "--projectors", str(cache.folder)]
    assert main(["store", "preview", *given, "--method", "safe-lora", "--select", "all"]) == 0
    out = capsys.readouterr().out
    assert "2 of 3 names would change" in out and "acme/x" in out and "→" in out and " c " not in out


def test_an_upload_that_is_lost_is_named(
    root: Path, cache: ProjectorCache, capsys: pytest.CaptureFixture[str]
) -> None:
    digest = NameStore(root).all()["b"].live.digest
    assert read_adapter(RawStore(root).path(digest), GateSettings(cache, Policy()).limits).digest == digest
    RawStore(root).remove(digest)
    given = ["--adapter-store", str(root), "--projectors", str(cache.folder)]
    assert main(["store", "preview", *given]) == 2
    assert "the upload of 'b' is missing" in capsys.readouterr().err
