"""The check of an answer, which all tests of refusals share."""

from __future__ import annotations

import json
from pathlib import Path

from safelora_vllm.gate.admit import Admission, GateSettings, admit
from safelora_vllm.store import PublishedStore


def judge(folder: Path, gate: GateSettings, store: PublishedStore) -> Admission:
    """The gate's answer; a refused adapter must leave nothing behind and have a valid report."""
    admission = admit(folder, "tenant", gate, store)
    report = admission.report
    text = report.to_json()  # allow_nan=False: raises on NaN and infinities
    assert json.loads(text)["accepted"] is report.accepted
    if not report.accepted:
        assert admission.key is admission.folder is None
        assert not list(store.root.rglob("*.safetensors"))
        assert report.reasons and all(reason.code and reason.message for reason in report.reasons)
        assert all(len(reason.message) < 1000 for reason in report.reasons)
        assert all(character.isprintable() for reason in report.reasons for character in reason.message)
    return admission


def codes(admission: Admission) -> set[str]:
    """The distinct reason codes of an answer."""
    return {reason.code for reason in admission.report.reasons}
