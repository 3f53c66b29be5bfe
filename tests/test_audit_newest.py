"""The end of the audit log: newest first, over rotated files, within its bound."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from safelora_vllm.store import audit_log
from safelora_vllm.store.audit_log import AuditLog


def everything(_: dict[str, Any]) -> bool:
    return True


def test_newest_first_over_files_that_were_rotated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = AuditLog(tmp_path / "audit", max_bytes=400)
    assert log.newest(everything, 5) == ([], True)
    for number in range(20):
        log.record("a", "upload", f"n{number % 2}", decision="accepted", version=number)
    assert len(list(log.folder.glob("audit-*.jsonl"))) > 3
    found, complete = log.newest(everything, 20)
    assert [r["version"] for r in found] == list(range(19, -1, -1)) and complete
    found, complete = log.newest(everything, 3)
    assert [r["version"] for r in found] == [19, 18, 17] and not complete
    found, complete = log.newest(lambda r: r["adapter"] == "n1", 20, adapter="n1")
    assert [r["version"] for r in found] == list(range(19, 0, -2)) and complete
    with (log.folder / "audit.jsonl").open("ab") as stream:
        stream.write(b'{"half a li\n\xff\n[1]\n')
    assert len(log.newest(everything, 30)[0]) == 20, "what a crash left is passed over"
    monkeypatch.setattr(audit_log, "SEARCHED", 700)
    found, complete = log.newest(everything, 30)
    assert [r["version"] for r in found] == list(range(19, 19 - len(found), -1)) and 0 < len(found) < 8
    assert not complete


def test_lines_of_others_are_not_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parsing holds up all other work of a server."""
    log = AuditLog(tmp_path / "audit")
    for number in range(100):
        log.record("a", "upload", f"globex/{number}", decision="accepted", reason="acme/")
    log.record("a", "upload", 'acme/"x"', decision="accepted")
    log.record("a", "upload", "acme/y", decision="refused")
    parsed = []

    def loads(line: bytes) -> Any:
        parsed.append(line)
        return json.loads(line)

    monkeypatch.setattr(audit_log, "json", SimpleNamespace(loads=loads, dumps=json.dumps))
    found, complete = log.newest(everything, 9, adapter="acme/", decision=None)
    assert [r["adapter"] for r in found] == ["acme/y", 'acme/"x"'] and complete
    assert log.newest(everything, 9, adapter='acme/"x"')[0] == found[1:]
    assert log.newest(everything, 9, adapter="acme/", decision="refused")[0] == found[:1]
    assert len(parsed) == 4
