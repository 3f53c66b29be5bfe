"""The gate as a whole: addresses, modes, and what happens when the store is in trouble."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from safelora_vllm.adapters.read import WEIGHTS, Limits
from safelora_vllm.errors import StoreUnavailable
from safelora_vllm.gate.admit import Admission, GateSettings, admit
from safelora_vllm.methods import METHODS
from safelora_vllm.policy import CAPS, Policy
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.report import Report
from safelora_vllm.store import PublishedStore, RawStore
from tests import reference
from tests.refusing import judge
from tests.tiny import Q0, UP0, Draft, Pair, key, lora, lora_config, module_shapes

FILES = ("adapter_config.json", "adapter_model.safetensors", "report.json")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A sound adapter's folder."""
    return Draft().write(tmp_path / "adapter")


def published(admission: Admission) -> Path:
    """The folder of an accepted adapter."""
    assert admission.report.accepted and admission.folder is not None
    return admission.folder


def content(folder: Path) -> dict[str, bytes]:
    """A folder's files."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def only_published(store: PublishedStore) -> list[str]:
    """What lies in the store, temporary folders included."""
    return sorted(path.name for path in (store.root / "published").glob("*"))


def test_an_accepted_adapter_is_published_with_its_report(
    adapter: Path, gate: GateSettings, store: PublishedStore, pair: Pair
) -> None:
    admission = admit(adapter, "tenant", gate, store)
    folder = published(admission)
    assert sorted(content(folder)) == sorted(FILES) and only_published(store) == [admission.key]
    assert not admission.cached and set(admission.stages.seconds) == {
        "read", "lookup", "vet", "project", "publish",
    }  # fmt: skip
    tensors, served = lora(), load_file(folder / WEIGHTS)
    modules = {module.name: module for module in admission.report.modules}
    decisions = set()
    for name in module_shapes():
        a, b = tensors[key(name, "A")], 2.0 * tensors[key(name, "B")]
        v, original = pair.v(name), b.double() @ a.double()
        found = modules[name]
        # Tolerances: those of float32 projectors, see test_methods.py.
        exact = reference.similarity(v, a, b)
        assert found.similarity == pytest.approx(exact, abs=1e-6) and abs(exact - 0.35) > 1e-6
        assert found.decision == ("projected" if exact <= 0.35 else "kept")
        expected = original if found.decision == "kept" else reference.projected(v, a, b)
        assert found.retained == pytest.approx(reference.ratio(expected, original), rel=2e-6)
        product = reference.product(*(served[key(name, side)] for side in "AB"))
        assert reference.ratio(product - expected, expected) < 2e-6
        assert found.relative_norm == pytest.approx(reference.ratio(original, pair.w(name)), rel=1e-9)
        assert found.null_similarity == pytest.approx(reference.null_similarity(v)) and found.rank == 4
        decisions.add(found.decision)
    assert decisions == {"projected", "kept"}


def test_the_same_bytes_have_one_key_whatever_their_name_and_the_work_is_done_once(
    adapter: Path, gate: GateSettings, store: PublishedStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = admit(adapter, "one", gate, store)
    monkeypatch.setattr("safelora_vllm.gate.admit.vet", lambda *_: pytest.fail("judged again"))
    copy = Path(shutil.copytree(adapter, tmp_path / "copy"))
    second = admit(copy, "two", gate, store)
    assert second.cached and (second.key, second.folder) == (first.key, first.folder)
    assert second.report == first.report.named("two")
    assert b"one" not in (published(first) / "report.json").read_bytes()  # names are not content


def test_a_known_adapter_counts_as_used_now_and_is_kept_too(
    adapter: Path, gate: GateSettings, store: PublishedStore
) -> None:
    report, raw = published(admit(adapter, "one", gate, store)) / "report.json", RawStore(store.root)
    os.utime(report, (1000, 1000))
    second = admit(adapter, "two", gate, store, raw)
    assert second.cached and report.stat().st_mtime > 1000
    assert raw.damaged(second.report.digest) is None


def test_another_policy_dtype_cache_or_model_has_another_key(
    adapter: Path, gate: GateSettings, build_cache: Callable[[str, str], Path], store: PublishedStore
) -> None:
    others = [
        gate,
        dataclasses.replace(gate, policy=Policy(method="safe-lora", threshold=0.36)),
        dataclasses.replace(gate, policy=Policy(method="safe-lora", mode="report-only")),
        dataclasses.replace(gate, dtype=torch.bfloat16),
        dataclasses.replace(gate, cache=ProjectorCache(build_cache("bfloat16", "dense"))),
        dataclasses.replace(gate, base_model="another"),
    ]
    answers = [admit(adapter, "tenant", settings, store) for settings in others]
    assert len({answer.key for answer in answers}) == len(others)
    assert not any(answer.cached for answer in answers)


@pytest.mark.parametrize("what", ["config", "weights"])
def test_other_bytes_have_another_key(
    what: str, adapter: Path, gate: GateSettings, store: PublishedStore
) -> None:
    first = admit(adapter, "tenant", gate, store)
    draft = Draft()
    if what == "config":
        draft.config["lora_alpha"] = 7
    else:
        draft.tensors = lora(seed=8)
    shutil.rmtree(adapter)
    second = admit(draft.write(adapter), "tenant", gate, store)
    assert second.key != first.key and not second.cached
    assert published(first).is_dir()  # what was published never changes


def test_report_only_serves_the_adapter_unprojected_and_says_so(
    adapter: Path, gate: GateSettings, store: PublishedStore, caplog: pytest.LogCaptureFixture
) -> None:
    enforced = admit(adapter, "tenant", gate, store)
    report_only = dataclasses.replace(gate, policy=Policy(method="safe-lora", mode="report-only"))
    with caplog.at_level(logging.INFO, "vllm.safelora"):
        admission = admit(adapter, "tenant", report_only, store)
    assert admission.report.modules == enforced.report.modules  # what enforcing would have done
    tensors, raw = load_file(published(admission) / "adapter_model.safetensors"), lora()
    for module in module_shapes():
        b, a = (tensors[key(module, side)].double() for side in "BA")
        raw_b, raw_a = (raw[key(module, side)].double() for side in "BA")
        assert torch.equal(b @ a, 2.0 * raw_b @ raw_a)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "UNPROJECTED" in record.getMessage()


def test_report_only_reports_the_cap_but_refuses_what_it_does_not_understand(
    gate: GateSettings, store: PublishedStore, tmp_path: Path
) -> None:
    report_only = dataclasses.replace(gate, policy=Policy(method="safe-lora", mode="report-only"))
    loud = Draft()
    loud.config["lora_alpha"] = 10_000
    report = admit(loud.write(tmp_path / "loud"), "loud", report_only, store).report
    assert report.accepted and {reason.code for reason in report.reasons} == {"relative_norm", "total_norm"}
    dora = Draft()
    dora.config["use_dora"] = True
    assert not admit(dora.write(tmp_path / "dora"), "dora", report_only, store).report.accepted


def test_a_copy_that_an_older_release_published_is_found(
    adapter: Path, gate: GateSettings, store: PublishedStore
) -> None:
    """Its report has the mode's former name, and reasons and their sentences in two lists."""
    report_only = dataclasses.replace(gate, policy=Policy(mode="report-only", max_total_norm=1e-9))
    first = admit(adapter, "tenant", report_only, store)
    file = published(first) / "report.json"
    saved = json.loads(file.read_text())
    report = saved["report"]
    report["policy"]["mode"] = "report-only"
    report["details"] = [reason["message"] for reason in report["reasons"]]
    report["reasons"] = [reason["code"] for reason in report["reasons"]]
    text = json.dumps(report, sort_keys=True).encode()
    file.write_text(json.dumps({**saved, "report_sha256": hashlib.sha256(text).hexdigest()}))
    second = admit(adapter, "tenant", report_only, store)
    assert second.cached and second.report == first.report and len(second.report.reasons) == 1


@pytest.mark.parametrize("cap", CAPS)
def test_a_cap_holds_for_what_the_projection_enlarges(
    cap: str, enlarging: ProjectorCache, store: PublishedStore, tmp_path: Path
) -> None:
    """One module is enlarged, one made smaller, both from 0.2 of their weights. The larger figure counts."""
    draft = Draft(lora_config(r=1, lora_alpha=1), lora([UP0, Q0], rank=1))
    for module, column in ((UP0, 0), (Q0, -1)):
        b = enlarging.projector(module).output_basis(0.95)[:, column, None]
        size = 0.2 * enlarging.modules[module].aligned_norm / float(draft.tensors[key(module, "A")].norm())
        draft.change(key(module, "B"), size * b)
    folder = draft.write(tmp_path / "adapter")

    def judged(**caps: float) -> Report:
        policy = Policy(method="safe-lora", select="all", **{**dict.fromkeys(CAPS, 1e6), **caps})
        return judge(folder, GateSettings(enlarging, policy), PublishedStore(store.root / policy.id)).report

    free = judged()
    retained = {module.name: module.retained or 0.0 for module in free.modules}
    assert free.accepted and retained[UP0] > 2 and retained[Q0] < 0.5
    up, q = (0.2 * enlarging.modules[module].aligned_norm for module in (UP0, Q0))
    came, served, told = {
        "max_relative_norm": (0.2, 0.2 * retained[UP0], UP0),
        "max_total_norm": (
            math.hypot(up, q) / enlarging.aligned_norm,
            math.hypot(up * retained[UP0], q) / enlarging.aligned_norm,
            "all modules together",
        ),
    }[cap]
    # The adapter's float32 values are off by 6e-8 of theirs.
    assert free.total_norm == pytest.approx(math.hypot(up, q) / enlarging.aligned_norm, rel=1e-6)
    assert came < served / 1.5 and judged(**{cap: served * 1.0001}).accepted
    for limit in (served * 0.9999, (came + served) / 2):
        report = judged(**{cap: limit})
        assert not report.accepted
        assert [reason.code for reason in report.reasons] == [cap.removeprefix("max_")]
        (figure,) = re.findall(rf"^{told}.* ([\d.]+) times", report.reasons[0].message)
        assert float(figure) == pytest.approx(served, rel=1e-6)
        assert report.total_norm == free.total_norm, "what is reported is what came"


@pytest.mark.parametrize("mode", ["enforce", "report-only"])
def test_a_cap_holds_for_modules_that_are_not_projected(
    mode: str, gate: GateSettings, store: PublishedStore, tmp_path: Path
) -> None:
    draft = Draft()
    draft.tensors[key(Q0, "B")] *= 20
    settings = gate.under({"select": "number", "number": 0, "max_total_norm": 9.0, "mode": mode})
    report = judge(draft.write(tmp_path / "adapter"), settings, store).report
    assert report.accepted is (mode == "report-only") and report.count("kept") == len(module_shapes())
    (reason,) = report.reasons
    assert reason.code == "relative_norm" and reason.message.startswith(Q0)


@pytest.mark.parametrize(
    "values", [{"select": "all"}, {"threshold": 1.0}, {"select": "number", "number": 99}]
)
def test_a_module_without_a_delta_is_never_projected(
    values: dict[str, object], gate: GateSettings, store: PublishedStore, tmp_path: Path
) -> None:
    draft = Draft()
    draft.change(key(Q0, "B"), torch.zeros_like(draft.tensors[key(Q0, "B")]))
    report = judge(draft.write(tmp_path / "adapter"), gate.under(values), store).report
    assert report.accepted
    kept = [module for module in report.modules if module.decision == "kept"]
    assert [(m.name, m.similarity, m.retained, m.relative_norm) for m in kept] == [(Q0, None, None, 0.0)]


def test_a_cap_holds_for_what_came_where_the_projection_makes_it_smaller(
    gate: GateSettings, store: PublishedStore, tmp_path: Path
) -> None:
    folder = Draft().write(tmp_path / "adapter")
    everything = Policy(method="safe-lora", select="all")
    report = admit(folder, "tenant", dataclasses.replace(gate, policy=everything), store).report
    most = max(report.values("relative_norm"))
    assert report.accepted and max(report.values("retained")) < 0.9
    for cap, figure in (("max_relative_norm", most), ("max_total_norm", report.total_norm)):
        for share, accepted in ((0.9999, False), (1.0, True)):
            settings = gate.under({"select": "all", cap: share * figure})
            assert admit(folder, "tenant", settings, store).report.accepted is accepted


def test_another_largest_rank_is_another_rule(gate: GateSettings) -> None:
    """What was accepted before vLLM's --max-lora-rank was lowered is judged again."""
    lower = dataclasses.replace(gate, limits=Limits(max_rank=4))
    assert lower.ruleset_digest != gate.ruleset_digest and lower.key("0" * 64) != gate.key("0" * 64)


def test_another_way_of_publishing_is_another_rule(
    gate: GateSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an older release published is made again, by the newer one's formulas."""
    rules = gate.ruleset_digest
    monkeypatch.setattr("safelora_vllm.gate.admit._FORMAT", 10**6)
    assert gate.ruleset_digest != rules


def test_one_log_line_per_decision(
    adapter: Path, gate: GateSettings, store: PublishedStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "vllm.safelora"):
        admit(adapter, "good\nname", gate, store)
        (tmp_path / "empty").mkdir()
        admit(tmp_path / "empty", "bad", gate, store)
    good, bad = (record.getMessage() for record in caplog.records)
    assert "accepted" in good and "\n" not in good and "changes nothing" not in good
    assert "refused: missing_file" in bad


@pytest.mark.parametrize("mode", ["enforce", "report-only"])
def test_the_log_says_that_an_adapter_of_zeros_changes_nothing(
    mode: str, gate: GateSettings, store: PublishedStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    draft = Draft()
    for module in module_shapes():
        draft.tensors[key(module, "B")].zero_()
    with caplog.at_level(logging.INFO, "vllm.safelora"):
        admit(draft.write(tmp_path / "zeros"), "zeros", gate.under({"mode": mode}), store)
    (record,) = caplog.records
    assert record.getMessage().endswith("; it changes nothing: each module has an A or a B of zeros")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "gone"])
def test_a_damaged_copy_is_made_again(
    name: str, damage: str, adapter: Path, gate: GateSettings, store: PublishedStore
) -> None:
    folder = published(admit(adapter, "tenant", gate, store))
    sound = content(folder)
    data = bytearray(sound[name])
    data[data.rindex(b"0.") + 2 if name == "report.json" else len(data) // 2] ^= 1  # a figure's digit
    (folder / name).unlink()
    if damage != "gone":
        (folder / name).write_bytes({"flipped": bytes(data), "cut": sound[name][:-9], "empty": b""}[damage])
    admission = admit(adapter, "tenant", gate, store)
    assert content(published(admission)) == sound and only_published(store) == [admission.key]
    assert not admission.cached


def test_a_file_in_the_place_of_a_published_folder(
    adapter: Path, gate: GateSettings, store: PublishedStore
) -> None:
    folder = published(admit(adapter, "tenant", gate, store))
    shutil.rmtree(folder)
    folder.touch()
    with pytest.raises(StoreUnavailable):  # nothing of ours puts one there: an operator must look
        admit(adapter, "tenant", gate, store)
    assert folder.is_file() and only_published(store) == [folder.name]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
@pytest.mark.parametrize("call", ["Path.mkdir", "tempfile.mkdtemp", "os.write", "Path.rename"])
def test_a_store_that_cannot_be_written(
    call: str,
    number: int,
    adapter: Path,
    gate: GateSettings,
    store: PublishedStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(f"safelora_vllm.files.{call}", failing)
        with pytest.raises(StoreUnavailable, match=f"cannot be written .{os.strerror(number)}"):
            admit(adapter, "tenant", gate, store)
    assert only_published(store) == []
    assert not admit(adapter, "tenant", gate, store).cached  # and it works when there is room again


def test_a_key_cannot_leave_the_store(store: PublishedStore) -> None:
    for bad in ("", "../x", "a" * 63, "A" * 64, "g" * 64, "a" * 64 + "/"):
        with pytest.raises(ValueError, match="no key"):
            store.path(bad)


def test_reports_on_disk_are_plain_json(
    adapter: Path, cache: ProjectorCache, store: PublishedStore, tmp_path: Path
) -> None:
    zero = Draft(tensors={name: torch.zeros_like(tensor) for name, tensor in lora().items()})
    for index, folder in enumerate((adapter, zero.write(tmp_path / "zero"))):
        for policy in (
            *(Policy(method=method, energy=0.8) for method in METHODS),
            Policy(method="safe-lora", mode="report-only"),
        ):
            out = published(admit(folder, str(index), GateSettings(cache, policy), store))
            json.loads((out / "report.json").read_text(), parse_constant=lambda name: pytest.fail(name))
