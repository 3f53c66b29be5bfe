"""The gate's answers to the figure and to the word, by projectors that can be worked out by hand."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from safelora_vllm.adapters.read import WEIGHTS, Limits, RawAdapter, read_adapter
from safelora_vllm.errors import AdapterRefused, QuotaExceeded, Reason, refuse
from safelora_vllm.gate import admit as module
from safelora_vllm.gate import caps
from safelora_vllm.gate.admit import Admission, GateSettings, Stages, admit, evaluate
from safelora_vllm.policy import Policy
from safelora_vllm.projectors.build import BuildOptions, build
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.report import Report
from safelora_vllm.store import PublishedStore, RawStore
from safelora_vllm.tenants.quotas import Allowance
from tests.tiny import Draft, key, lora_config, write_checkpoint

Q, K, V = (f"model.layers.0.self_attn.{side}_proj" for side in "qkv")
ROOT5 = math.sqrt(5)  # ‖V‖_F and ‖W_aligned‖_F of each module
GROWS = 4 / ROOT5  # Ĉ has the values 4/√5, 1/√5, 0 and 0 in its diagonal
FREE = {"max_relative_norm": 1e6, "max_total_norm": 1e6}
Log = Callable[[], list[tuple[int, str]]]


@pytest.fixture(scope="module")
def hand(tmp_path_factory: pytest.TempPathFactory) -> ProjectorCache:
    """Three modules whose V is diag(2, 1, 0, 0), as is the aligned weight."""
    root = tmp_path_factory.mktemp("hand")
    before = {f"{name}.weight": torch.zeros(4, 4) for name in (Q, K, V)}
    after = {name: torch.diag(torch.tensor([2.0, 1.0, 0.0, 0.0])) for name in before}
    pair = write_checkpoint(root / "base", before), write_checkpoint(root / "aligned", after)
    return ProjectorCache(build(*pair, root / "cache", BuildOptions(exact=True, dtype="float32")))


@pytest.fixture
def rules(hand: ProjectorCache) -> GateSettings:
    """q is kept under them, k projected, and v has nothing to project."""
    return GateSettings(hand, Policy(method="safe-lora", threshold=0.5))


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Log:
    """Levels and messages since the last call."""
    caplog.set_level(logging.INFO, "vllm.safelora.gate")

    def taken() -> list[tuple[int, str]]:
        found = [(record.levelno, record.getMessage()) for record in caplog.records]
        caplog.clear()
        return found

    return taken


def ranks(**modules: dict[int, float]) -> Draft:
    """An adapter of one rank: module → row of B → value there. All of A is in its first column, ½."""
    tensors = {}
    for name, rows in modules.items():
        full = {"q": Q, "k": K, "v": V}[name]
        tensors[key(full, "A")], tensors[key(full, "B")] = torch.zeros(1, 4), torch.zeros(4, 1)
        tensors[key(full, "A")][0, 0] = 0.5
        for row, value in rows.items():
            tensors[key(full, "B")][row, 0] = value
    return Draft(lora_config(r=1, lora_alpha=1), tensors)


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """‖ΔW‖ is 1 in q along what Ĉ keeps, ½ in k along what it removes, and 0 in v."""
    return ranks(q={0: 2.0}, k={2: 1.0}, v={}).write(tmp_path / "plain")


def read(folder: Path) -> RawAdapter:
    """The adapter as the gate reads it."""
    return read_adapter(folder, Limits())


def told(report: Report) -> list[tuple[str, str]]:
    """Codes and sentences."""
    return [(reason.code, reason.message) for reason in report.reasons]


# --- figures


@pytest.mark.parametrize("mode", ["enforce", "report-only"])
def test_the_figures_of_each_module(mode: str, plain: Path, rules: GateSettings) -> None:
    stages = Stages({"project": 7.0, "other": 1.0})
    report, weights = evaluate(read(plain), "name", rules.under({"mode": mode}), stages)
    assert (report.adapter, report.digest) == ("name", read(plain).digest)
    assert (report.projectors, report.policy.mode) == (rules.cache.id, mode)
    assert report.accepted and report.reasons == []
    null = rules.cache.modules[Q].null_similarity
    assert [dataclasses.astuple(line) for line in report.modules] == [
        (K, 1, 0.0, null, 0.0, pytest.approx(0.5 / ROOT5), "projected", 0.0, False),
        (Q, 1, 1.0, null, 1.0, pytest.approx(1.0 / ROOT5), "kept", 0.0, False),
        (V, 1, None, null, None, 0.0, "kept", 0.0, False),
    ]
    assert report.total_norm == pytest.approx(math.hypot(1, 0.5) / math.sqrt(15))
    assert weights is not None and list(weights) == [K, Q, V]
    products = {name: (b @ a)[:, 0].tolist() for name, (a, b) in weights.items()}
    served_k = [0.0] * 4 if mode == "enforce" else [0.0, 0.0, 0.5, 0.0]
    assert products == {K: served_k, Q: [1.0, 0.0, 0.0, 0.0], V: [0.0] * 4}
    assert set(stages.seconds) == {"vet", "project", "other"}
    assert 7.0 < stages.seconds["project"] < 8.0 and 0.0 < stages.seconds["vet"] < 1.0


def test_a_method_that_needs_no_similarity_says_how_far_it_is_known(
    rules: GateSettings, tmp_path: Path
) -> None:
    """By V's first direction alone: N/D ≤ similarity ≤ (N + tq)/√(D² + t²q), see `methods.certified`."""
    folder = ranks(q={0: 2.0, 1: 2.0}, k={2: 1.0}, v={}).write(tmp_path / "adapter")
    report, _ = evaluate(read(folder), "name", rules.under({"method": "input-removal", "select": "all"}))
    # q is half in the first direction. V's squared values are 4/5 and 1/5 of their sum.
    low, high = 0.4 / math.sqrt(0.32), (0.4 + 0.2 * 0.5) / math.sqrt(0.32 + 0.2**2 * 0.5)
    assert [(line.name, line.similarity, line.similarity_error) for line in report.modules] == [
        (K, 0.5, 0.5),  # nothing of it is in that direction
        (Q, pytest.approx((low + high) / 2), pytest.approx((high - low) / 2, rel=1e-5)),  # it has a slack
        (V, None, 0.0),
    ]


def test_the_method_the_dtype_and_the_device_are_those_of_the_settings(
    plain: Path, rules: GateSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def taken(weights: dict[str, Any], *given: object) -> None:
        assert torch.is_inference_mode_enabled() and list(weights) == [K, Q, V]
        raise LookupError(*given)

    monkeypatch.setattr(module, "judge", taken)
    device, policy = torch.device("meta"), Policy(method="csulora", select="number", number=1)
    settings = dataclasses.replace(rules, device=device, dtype=torch.bfloat16, policy=policy)
    with pytest.raises(LookupError) as caught:
        evaluate(read(plain), "name", settings)
    assert caught.value.args == (rules.cache, policy, device, torch.bfloat16)


def test_modules_are_judged_on_the_device(plain: Path, rules: GateSettings) -> None:
    """Of a device that computes nothing no value can be read."""
    with pytest.raises(NotImplementedError, match="meta"):
        evaluate(read(plain), "name", dataclasses.replace(rules, device=torch.device("meta")))


def test_a_refusal_before_anything_is_measured(rules: GateSettings, tmp_path: Path) -> None:
    draft = ranks(q={0: 1.0})
    draft.config["use_dora"] = True
    raw = read(draft.write(tmp_path / "a"))
    stages = Stages()
    report, weights = evaluate(raw, "name", rules, stages)
    reason = Reason("dora", "use_dora is set, which this gate cannot project; train without it")
    assert report == Report("name", raw.digest, rules.cache.id, rules.policy, False, [reason], [])
    assert weights is None and set(stages.seconds) == {"vet"}
    small = dataclasses.replace(rules, limits=Limits(weights_bytes=1))
    assert [code for code, _ in told(evaluate(raw, "name", small)[0])] == ["dora"]
    del draft.config["use_dora"]
    raw = read(draft.write(tmp_path / "b"))
    assert [code for code, _ in told(evaluate(raw, "name", small)[0])] == ["too_large"]


# --- caps

CAP = "allowed are {} (`{}`). A smaller lora_alpha makes {} smaller"


def over(figure: str, limit: str) -> str:
    """What the cap on modules says behind their names."""
    return f"{figure} times the module's weight, {CAP.format(limit, 'max_relative_norm', 'it')}"


def whole(figure: str, limit: str) -> str:
    """What the cap on all modules says."""
    text = f"all modules together are {figure} times the weights of all modules with a projector"
    return f"{text}, {CAP.format(limit, 'max_total_norm', 'them')}"


@pytest.mark.parametrize("mode", ["enforce", "report-only"])
def test_the_caps_on_what_came(mode: str, plain: Path, rules: GateSettings) -> None:
    raw, most, total = read(plain), 1.0 / ROOT5, math.hypot(1, 0.5) / math.sqrt(15)
    for values, expected in (
        ({"max_relative_norm": most}, []),
        ({"max_total_norm": total}, []),
        ({"max_relative_norm": 0.4}, [("relative_norm", f"{Q}: the adapter is {over('0.4472136', '0.4')}")]),
        (
            {"max_relative_norm": 0.1, "max_total_norm": 0.25},
            [
                ("relative_norm", f"{Q}, {K}: the adapter is up to {over('0.4472136', '0.1')}"),
                ("total_norm", whole("0.28867513", "0.25")),
            ],
        ),
        ({"max_total_norm": 0.25}, [("total_norm", whole("0.28867513", "0.25"))]),
    ):
        report, weights = evaluate(raw, "name", rules.under({"mode": mode, "threshold": 0.5, **values}))
        assert told(report) == expected
        assert report.accepted is (weights is not None) is (not expected or mode == "report-only")
        assert len(report.modules) == 3 and report.total_norm == pytest.approx(total)


def test_the_largest_is_named_first(rules: GateSettings, tmp_path: Path) -> None:
    raw = read(ranks(q={0: 1.0}, k={1: 2.0}, v={0: 0.5}).write(tmp_path / "a"))
    ((_, text),) = told(evaluate(raw, "name", rules.under({"max_relative_norm": 0.1}))[0])
    assert text.startswith(f"{K}, {Q}, {V}: the adapter is up to 0.4472136 times")


def test_the_caps_on_what_would_be_served(plain: Path, rules: GateSettings) -> None:
    """Ĉ enlarges q by 4/√5 and removes k: each counts by the larger of what came and what is served."""
    raw, total = read(plain), math.hypot(GROWS, 0.5) / math.sqrt(15)
    everything = {"select": "all"}
    for field, figure, text in (
        ("max_relative_norm", GROWS / ROOT5, f"{Q}: the adapter is {over('0.79999999', '0.79')}"),
        ("max_total_norm", total, whole(f"{total:.8g}", "0.47")),
    ):
        report, weights = evaluate(raw, "name", rules.under({**everything, field: figure * 1.0001}))
        assert report.accepted and weights is not None
        lines = {line.name: line for line in report.modules}
        assert lines[Q].retained == pytest.approx(GROWS)
        assert lines[Q].relative_norm == pytest.approx(1 / ROOT5), "what is reported is what came"
        limit = {"max_relative_norm": 0.79, "max_total_norm": 0.47}[field]
        report, weights = evaluate(raw, "name", rules.under({**everything, field: limit}))
        assert told(report) == [(field.removeprefix("max_"), text)] and weights is None


# --- what cannot be judged

_NOT_FINITE = "scaling (lora_alpha) or projecting gave values that are not finite; use a smaller lora_alpha"


def cancelling(*shares: float) -> Draft:
    """Two ranks in q, k and v whose sum keeps that share of each, so that the coherence is share²."""
    draft = ranks(**{side: {} for side in "qkv"[: len(shares)]})
    for name, share in zip((Q, K, V), shares, strict=False):
        draft.tensors[key(name, "A")] = torch.tensor([[0.5, 0, 0, 0], [0.5, 0, 0, 0]])
        draft.tensors[key(name, "B")] = torch.zeros(4, 2)
        draft.tensors[key(name, "B")][0] = torch.tensor([(1 + share) / 2, -(1 - share) / 2])
    draft.config.update(r=2, lora_alpha=2)
    return draft


@pytest.mark.parametrize("mode", ["enforce", "report-only"])
def test_ranks_that_cancel(mode: str, rules: GateSettings, tmp_path: Path) -> None:
    def judged(*shares: float) -> tuple[Report, object]:
        folder = cancelling(*shares).write(tmp_path / str(shares))
        return evaluate(read(folder), "name", rules.under({"mode": mode}))

    report, weights = judged(0.0625, 0.0390625)  # squared 0.0039 and 0.00153
    assert report.accepted and weights is not None
    report, weights = judged(0.0625, 0.03125, 0.015625)
    assert told(report) == [
        (
            "cancellation",
            f"{V}, {K}: the ranks cancel each other to 2.4e-04 of their squared norm; 0.0015 is the least "
            "that can be judged. Merge and factorise the delta again (a singular value decomposition of B·A)",
        )
    ]
    assert weights is None and not report.accepted and report.modules == []
    assert (report.adapter, report.projectors, report.policy.mode) == ("name", rules.cache.id, mode)
    assert len(report.digest) == 64


def test_the_least_coherence_that_passes() -> None:
    assert caps.check_sound({"a": 1.5e-3, "b": 1.0}) == []
    assert [reason.code for reason in caps.check_sound({"a": 1.4999e-3, "b": 1.0})] == ["cancellation"]


@pytest.mark.parametrize("mode", ["enforce", "report-only"])
def test_values_that_overflow(mode: str, rules: GateSettings, tmp_path: Path) -> None:
    """In float16, q by its scale and k by what Ĉ would make of it; v is sound, and cancels."""
    draft = cancelling(1.0, 1.0, 0.0)
    draft.tensors[key(Q, "B")][0] = 3e38
    draft.tensors[key(K, "B")][:, 0], draft.tensors[key(K, "A")][0] = torch.tensor([6e4, 6e4, 0, 0]), 6e4
    half = dataclasses.replace(rules.under({"select": "all", "mode": mode, **FREE}), dtype=torch.float16)
    report, weights = evaluate(read(draft.write(tmp_path / "a")), "name", half)
    (infinite, text), (cancels, other) = told(report)
    assert (infinite, cancels) == ("non_finite", "cancellation") and weights is None
    assert text == f"{K}, {Q}: {_NOT_FINITE}" and other.startswith(
        f"{V}: the ranks cancel each other to 0.0e"
    )


# --- the whole way


def test_an_accepted_adapter(plain: Path, rules: GateSettings, store: PublishedStore, log: Log) -> None:
    raw, raw_store = read(plain), RawStore(store.root)
    size = sum(map(len, raw.files.values()))
    admission = admit(str(plain), "tenant/a", rules, store, raw_store, Allowance(bytes=size, rank=1))
    key_of = hashlib.sha256(f"{rules.ruleset_digest}\n{raw.digest}".encode()).hexdigest()
    report = evaluate(raw, "tenant/a", rules)[0]
    expected = Admission(report, key_of, store.path(key_of), False, admission.stages, size)
    assert admission == expected and rules.key(raw.digest) == key_of
    assert list(admission.stages.seconds) == ["read", "lookup", "vet", "project", "publish", "keep"]
    assert raw_store.damaged(raw.digest) is None
    assert store.find(key_of) == report.named("")
    assert log() == [(logging.INFO, "adapter 'tenant/a' accepted: 1 of 3 modules projected by safe-lora")]

    def unheard(*_: object) -> None:
        pytest.fail("judged again")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "evaluate", unheard)
        again = admit(plain, "other", rules, store, raw_store, Allowance(bytes=size, rank=1))
    assert again == Admission(report.named("other"), key_of, store.path(key_of), True, again.stages, size)
    assert list(again.stages.seconds) == ["read", "lookup", "keep"]
    text = "adapter 'other' accepted: 1 of 3 modules projected by safe-lora, published before"
    assert log() == [(logging.INFO, text)]


def test_without_a_store_of_uploads_nothing_is_kept(
    plain: Path, rules: GateSettings, store: PublishedStore
) -> None:
    for cached in (False, True):
        admission = admit(plain, "a", rules, store)
        assert admission.cached is cached and "keep" not in admission.stages.seconds
    assert not (store.root / "raw").exists()


def test_a_known_copy_is_used_now(
    plain: Path, rules: GateSettings, store: PublishedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = admit(plain, "a", rules, store)
    touched: list[str] = []
    monkeypatch.setattr(PublishedStore, "touch", lambda _, name: touched.append(name))
    assert admit(plain, "a", rules, store).cached and touched == [first.key]


def test_what_is_served_is_published_for_the_model(
    plain: Path, rules: GateSettings, store: PublishedStore
) -> None:
    settings = dataclasses.replace(rules, base_model="org/model", revision="v1", dtype=torch.bfloat16)
    folder = admit(plain, "a", settings, store).folder
    assert folder is not None
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/model", "v1")
    tensors = load_file(folder / WEIGHTS)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert not tensors[key(K, "B")].any() and tensors[key(Q, "B")].any()


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize(
    ("allowance", "text"),
    [(Allowance(bytes=9), "bytes, 9 are left of max_bytes"), (Allowance(rank=0), "rank 1, max_rank is 0")],
    ids=["bytes", "rank"],
)
def test_nothing_is_stored_over_the_allowance(
    allowance: Allowance, text: str, known: bool, plain: Path, rules: GateSettings, store: PublishedStore
) -> None:
    if known:
        admit(plain, "a", rules, store)
    before, raw_store = store.all(), RawStore(store.root)
    with pytest.raises(QuotaExceeded, match=text):
        admit(plain, "a", rules, store, raw_store, allowance)
    assert store.all() == before and not (store.root / "raw").exists()
    digest = read(plain).digest
    owned = Allowance(bytes=9, owned=[digest])
    assert admit(plain, "a", rules, store, raw_store, owned).report.accepted


def test_refusals_at_each_stage(
    plain: Path, rules: GateSettings, store: PublishedStore, tmp_path: Path, log: Log,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def refused(folder: Path, code: str, text: str, stages: list[str]) -> None:
        admission = admit(folder, "name", rules, store, RawStore(store.root), Allowance())
        report = admission.report
        digest = "" if stages == ["read"] else read(folder).digest
        assert admission == Admission(report, None, None, False, admission.stages, 0)
        assert list(admission.stages.seconds) == stages
        assert (report.adapter, report.digest, report.projectors) == ("name", digest, rules.cache.id)
        assert (report.policy, report.accepted) == (rules.policy, False)
        assert told(report)[0] == (code, text)
        codes = ",".join(dict.fromkeys(reason.code for reason in report.reasons))
        assert log() == [(logging.WARNING, f"adapter 'name' refused: {codes} ({text})")]
        assert store.all() == [] and not (store.root / "raw").exists()

    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "missing_file", "the adapter has no adapter_config.json", ["read"])
    draft = ranks(q={0: 1.0})
    draft.config.update(use_dora=True, bias="all", lora_bias=True)
    sentence = "use_dora is set, which this gate cannot project; train without it"
    refused(draft.write(tmp_path / "dora"), "dora", sentence, ["read", "lookup", "vet"])

    def failing(*_: object) -> None:
        raise AdapterRefused([Reason("non_finite", "too large")])

    monkeypatch.setattr(module, "canonical_files", failing)
    refused(plain, "non_finite", "too large", ["read", "lookup", "vet", "project", "publish"])


def test_the_limits_of_the_settings_are_those_of_the_reader(
    plain: Path, rules: GateSettings, store: PublishedStore
) -> None:
    settings = dataclasses.replace(rules, limits=Limits(config_bytes=9))
    ((code, text),) = told(admit(plain, "a", settings, store).report)
    assert code == "too_large" and "9 bytes" in text


IDLE = "; it changes nothing: each module has an A or a B of zeros"
ONLY = "REPORT-ONLY MODE: adapter 'a' is served UNPROJECTED; enforcing would have projected"


@pytest.mark.parametrize(
    ("values", "modules", "level", "text"),
    [
        ({}, {"q": {}}, logging.INFO, f"adapter 'a' accepted: 0 of 1 modules projected by safe-lora{IDLE}"),
        ({"select": "none"}, {"q": {0: 1.0}}, logging.INFO, "adapter 'a' accepted: nothing projected"),
        ({"mode": "report-only"}, {"q": {}}, logging.WARNING, f"{ONLY} 0 of 1 modules{IDLE}"),
        ({"mode": "report-only"}, {"q": {0: 1.0}, "k": {3: 1.0}}, logging.WARNING, f"{ONLY} 1 of 2 modules"),
        (
            {"mode": "report-only"}, {"q": {0: 9.0}, "k": {3: 1.0}}, logging.WARNING,
            f"{ONLY} 1 of 2 modules and refused it",
        ),
    ],
)  # fmt: skip
def test_the_log_line_of_a_decision(
    values: dict[str, Any], modules: dict[str, dict[int, float]], level: int, text: str,
    rules: GateSettings, store: PublishedStore, tmp_path: Path, log: Log,
) -> None:  # fmt: skip
    admit(ranks(**modules).write(tmp_path / "a"), "a", rules.under(values), store)
    assert log() == [(level, text)]


def test_a_refusal_of_several_kinds_names_each_code_once(
    rules: GateSettings, store: PublishedStore, tmp_path: Path, log: Log
) -> None:
    draft = ranks(q={0: 1.0})
    draft.config.update(lora_bias=True, bias="all", r=0)
    admit(draft.write(tmp_path / "a"), "a", rules, store)
    sentence = "lora_bias is set, which this gate cannot project; train without it"
    assert log() == [(logging.WARNING, f"adapter 'a' refused: bias,config_type ({sentence})")]


# --- settings


def test_the_rules_have_the_address_of_this_format(rules: GateSettings) -> None:
    parts = [6, rules.cache.id, rules.policy.id, "torch.float32", "", 512]
    assert rules.ruleset_digest == hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def test_values_replace_those_of_the_policy(rules: GateSettings) -> None:
    assert rules.under({}) is rules
    other = rules.under({"threshold": 0.25})
    assert other == dataclasses.replace(rules, policy=dataclasses.replace(rules.policy, threshold=0.25))


def test_stages_add_up_and_count_what_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 12.0, 100.0, 105.0])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    stages = Stages()
    with stages.time("a"):
        pass
    assert stages.seconds == {"a": 2.0}
    with pytest.raises(AdapterRefused), stages.time("a"):
        raise refuse("dora", "x")
    assert stages.seconds == {"a": 7.0}
