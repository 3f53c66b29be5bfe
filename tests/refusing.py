"""What the tables of refusals share: a way to spoil a sound adapter, and the check of the answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from safelora_vllm.gate import Admission, GateSettings, admit
from safelora_vllm.store import PublishedStore
from tests.tiny import Draft

Spoil = Callable[[Draft], object]
Case = tuple[str, str, Spoil]  # name, the one code expected, what is done to a sound adapter


def table(cases: list[Case]) -> pytest.MarkDecorator:
    """The cases as a parametrised test over (code, spoil)."""
    return pytest.mark.parametrize(
        ("code", "spoil"), [pytest.param(code, spoil, id=name) for name, code, spoil in cases]
    )


def config(**changes: object) -> Spoil:
    """Set keys of the config."""
    return lambda draft: draft.config.update(changes)


def judge(folder: Path, gate: GateSettings, store: PublishedStore) -> Admission:
    """The gate's answer; a refused adapter must leave nothing behind and have a valid report."""
    admission = admit(folder, "tenant", gate, store)
    report = admission.report
    text = report.to_json()  # allow_nan=False: raises on NaN and infinities
    assert json.loads(text)["accepted"] is report.accepted
    if not report.accepted:
        assert admission.key is admission.folder is None
        assert not list(store.root.rglob("*.safetensors"))
        assert report.reasons and all(reason.code and reason.detail for reason in report.reasons)
        assert all(len(reason.detail) < 1000 for reason in report.reasons)
        assert all(character.isprintable() for reason in report.reasons for character in reason.detail)
    return admission


def codes(admission: Admission) -> set[str]:
    """The distinct reason codes of an answer."""
    return {reason.code for reason in admission.report.reasons}
