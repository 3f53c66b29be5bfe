"""The gate's decision as a signed statement."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("cryptography", reason="the extra `signing`")
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256

from safelora_vllm import __version__
from safelora_vllm.cli.main import main
from safelora_vllm.errors import Reason
from safelora_vllm.gate.admit import GateSettings, admit
from safelora_vllm.report import Report
from safelora_vllm.store import AdapterRecord, NameStore, PublishedStore, Version
from safelora_vllm.store.audit_log import AuditLog, audit_fields
from tests.signing import encoded, identity, new_key, private_pem, public_pem, rule, sign_folder
from tests.tiny import Draft

KEY = new_key()


@pytest.fixture
def accepted(gate: GateSettings, store: PublishedStore, tmp_path: Path) -> tuple[Report, str]:
    """The report and the key of what was accepted, as a server's audit log has it."""
    folder = sign_folder(Draft().write(tmp_path / "adapter"), KEY)
    admission = admit(folder, "acme/x", gate, store, signing=rule(KEY))
    assert admission.key
    fields = audit_fields(admission.report, "accepted")
    more = {"version": 1, "ruleset": gate.ruleset_digest, "published": admission.key}
    AuditLog(store.root / "audit").record("acme/ci", "upload", "acme/x", **fields, **more)
    return admission.report, admission.key


@pytest.fixture
def key(tmp_path: Path) -> Path:
    file = tmp_path / "key.pem"
    file.write_bytes(private_pem(KEY))
    return file


def stated(
    store: PublishedStore, key: Path, name: str, capsys: pytest.CaptureFixture[str], *which: str
) -> dict[str, Any]:
    """The statement that the command prints, after its signature was verified."""
    assert main(["statement", name, "--adapter-store", str(store.root), "--key", str(key), *which]) == 0
    printed = capsys.readouterr()
    assert "docs/signatures.md" in printed.err
    envelope = json.loads(printed.out)
    payload = base64.b64decode(envelope["payload"])
    (signature,) = envelope["signatures"]
    assert envelope["payloadType"] == "application/vnd.in-toto+json"
    assert signature["keyid"] == identity(public_pem(KEY))
    what = base64.b64decode(signature["sig"]), encoded(envelope["payloadType"].encode(), payload)
    KEY.public_key().verify(*what, ec.ECDSA(SHA256()))
    with pytest.raises(InvalidSignature):
        KEY.public_key().verify(what[0], what[1] + b" ", ec.ECDSA(SHA256()))
    found = json.loads(payload)
    assert isinstance(found, dict) and found["_type"] == "https://in-toto.io/Statement/v1"
    return found


def test_the_statement_of_what_was_accepted(
    accepted: tuple[Report, str], gate: GateSettings, store: PublishedStore, key: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    report, published = accepted
    found = stated(store, key, "acme/x", capsys)
    folder = store.root / "published" / published
    sides = [
        hashlib.sha256((folder / name).read_bytes()).digest()
        for name in ("adapter_config.json", "adapter_model.safetensors")
    ]
    assert found["subject"] == [
        {"name": "upload", "digest": {"sha256": report.digest}},
        {"name": "published", "digest": {"sha256": hashlib.sha256(b"".join(sides)).hexdigest()}},
    ]
    said = found["predicate"]
    assert said["policy"] == report.to_dict()["policy"] and said["ruleset"] == gate.ruleset_digest
    assert (said["decision"], said["adapter"], said["actor"]) == ("accepted", "acme/x", "acme/ci")
    assert (said["published"], said["signed_by"]) == (published, identity(public_pem(KEY)))
    assert said["release"] == said["stated_by"] == __version__


def test_the_newest_decision_counts(
    accepted: tuple[Report, str], store: PublishedStore, key: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    log = AuditLog(store.root / "audit")
    log.record("acme/ci", "upload", "acme/xy", **audit_fields(accepted[0], "accepted"))
    log.record("acme/ci", "upload", "acme/x", decision="refused", reasons=["quota"])
    log.record("acme/ci", "delete", "acme/x", decision="removed")
    assert stated(store, key, "acme/x", capsys)["predicate"]["decision"] == "accepted"
    monkeypatch.setattr("safelora_vllm.store.audit_log.SEARCHED", 200)
    assert stated(store, key, "acme/x", capsys)["predicate"]["published"] == accepted[1], "further back"
    monkeypatch.undo()
    fields = {**audit_fields(accepted[0], "refused"), "reasons": ["shape"]}
    log.record("acme/ci", "upload", "acme/x", **fields)
    found = stated(store, key, "acme/x", capsys)
    assert (found["predicate"]["decision"], found["predicate"]["reasons"]) == ("refused", ["shape"])
    assert [subject["name"] for subject in found["subject"]] == ["upload"]


def test_a_refused_attempt_does_not_take_the_place_of_what_is_served(
    accepted: tuple[Report, str], store: PublishedStore, key: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever has the tenant's key can have the same content refused, such as without its signature."""
    report, published = accepted
    names, log = NameStore(store.root), AuditLog(store.root / "audit")
    first = Version(0, report.digest, 1, 1, 0.0, "acme/ci", key=published)
    names.update("acme/x", lambda _: AdapterRecord("acme/x").with_version(first))
    attempt = {**audit_fields(report, "refused"), "reasons": ["signature"]}
    log.record("acme/stranger", "upload", "acme/x", **attempt)
    said = stated(store, key, "acme/x", capsys)["predicate"]
    assert (said["decision"], said["published"], said["actor"]) == ("accepted", published, "acme/ci")
    said = stated(store, key, "acme/x", capsys, "--digest", report.digest)["predicate"]
    assert (said["decision"], said["actor"]) == ("refused", "acme/stranger")
    # Another version is served: the first one is asked for by its number.
    second = dataclasses.replace(first, digest="2" * 64, refused=(Reason("total_norm", "too large"),))
    names.update("acme/x", lambda record: record and record.with_version(second))
    accepted_again = {**audit_fields(report, "accepted"), "digest": "2" * 64, "version": 2}
    log.record("acme/ci", "upload", "acme/x", **accepted_again)
    log.record("server", "rejudge", "acme/x", **{**accepted_again, "decision": "refused"})
    log.record("acme/stranger", "upload", "acme/x", **{**attempt, "digest": "2" * 64})
    said = stated(store, key, "acme/x", capsys)["predicate"]
    assert (said["decision"], said["version"], said["actor"]) == ("refused", 2, "server")
    said = stated(store, key, "acme/x", capsys, "--of-version", "1")["predicate"]
    assert (said["decision"], said["version"]) == ("accepted", 1)
    command = ["statement", "acme/x", "--adapter-store", str(store.root), "--key", str(key)]
    assert main([*command, "--of-version", "3"]) == 2
    assert "no decision about 'acme/x' of version 3" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*command, "--digest", "x"])
    assert "'x' is not a valid digest: expected 64 hex digits" in capsys.readouterr().err


def test_a_damaged_copy_is_no_subject(
    accepted: tuple[Report, str], store: PublishedStore, key: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (store.root / "published" / accepted[1] / "adapter_config.json").write_text("{}")
    found = stated(store, key, "acme/x", capsys)
    assert [subject["name"] for subject in found["subject"]] == ["upload"]
    assert found["predicate"]["published"] == accepted[1]


@pytest.mark.usefixtures("accepted")
def test_what_cannot_be_stated(
    store: PublishedStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.pem"
    for name, content, message in (
        ("acme/y", private_pem(KEY), "has no decision about 'acme/y'"),
        ("acme/x", b"x", "the key is none that can be read"),
        ("acme/x", public_pem(KEY).encode(), "the key is none that can be read"),
        ("acme/x", private_pem(new_key(ec.SECP384R1())), "the key is of the curve secp384r1"),
        ("acme/x", None, "other.pem cannot be read (No such file or directory)"),
    ):
        other.unlink(missing_ok=True)
        if content is not None:
            other.write_bytes(content)
        assert main(["statement", name, "--adapter-store", str(store.root), "--key", str(other)]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.usefixtures("accepted")
def test_the_script_in_the_documents(
    store: PublishedStore, key: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parents[1] / "docs" / "signatures.md").read_text()
    (script,) = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    assert main(["statement", "acme/x", "--adapter-store", str(store.root), "--key", str(key)]) == 0
    (tmp_path / "decision.json").write_text(capsys.readouterr().out)
    for signer, code in ((KEY, 0), (new_key(), 1)):
        (tmp_path / "operator.pub").write_text(public_pem(signer))
        done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
    assert "InvalidSignature" in done.stderr
