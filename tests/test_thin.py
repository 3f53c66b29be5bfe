"""Caches without Ĉ and V: every policy works with them, and none serves more than with an exact cache."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import math
import re
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import safelora_vllm as sl
from safelora_vllm.adapters.read import Limits, read_adapter
from safelora_vllm.cli.main import main
from safelora_vllm.errors import PolicyError, ProjectorCacheError, UsageError
from safelora_vllm.gate.admit import GateSettings, evaluate
from safelora_vllm.gate.protocol import Admit, Ensure, GateConfig
from safelora_vllm.gate.service import GateService
from safelora_vllm.methods import METHODS
from safelora_vllm.methods.judge import judge
from safelora_vllm.methods.reads import parts_read, truncation
from safelora_vllm.methods.safe_lora import norm_kept
from safelora_vllm.policy import SELECTIONS, Policy
from safelora_vllm.projectors import build as build_module
from safelora_vllm.projectors.build import MAX_ENERGY, BuildOptions, build
from safelora_vllm.projectors.cache import Parts, ProjectorCache
from safelora_vllm.projectors.manifest import WHOLE
from safelora_vllm.report import Report
from safelora_vllm.settings import ServerSettings
from tests import reference
from tests.module_delta import ModuleDelta
from tests.tiny import Q0, Draft, Pair, key, lora, module_shapes, write_pair

FULL = 0.95
ENERGIES = (0.1, 0.4, FULL)
SERVED: list[dict[str, Any]] = [
    {}, {"energy": 0.9}, {"method": "csulora"}, {"method": "csulora", "energy": 0.3}, {"mode": "report-only"},
]  # fmt: skip
EVERY = [Policy(method=method, select=select) for method in METHODS for select in SELECTIONS[:-1]]
# C_k B is a float32 product of float32 bases, and what is served is float32: each errs by a few 2⁻²⁴.
ROUNDING = 1e-6
each_policy = pytest.mark.parametrize("policy", EVERY, ids=lambda p: f"{p.method}-{p.select}")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter on all modules."""
    return Draft().write(tmp_path / "adapter")


def config(cache: ProjectorCache, folder: Path, **policy: Any) -> GateConfig:
    """Settings of a gate with a store of its own."""
    settings = ServerSettings(str(cache.folder), str(folder / "store"), policy, trust_served_model=True)
    return GateConfig(str(folder / "gate.sock"), "not compared", settings, dtype="bfloat16")


def files(folder: Path) -> dict[str, bytes]:
    """All files below a folder, by their paths there."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def reported(cache: ProjectorCache, policy: Policy, upload: Path) -> Report:
    """What the gate says of an adapter."""
    return evaluate(read_adapter(upload, Limits()), "a", GateSettings(cache, policy))[0]


def projected(report: Report) -> set[str]:
    """The names of the modules that are."""
    return {module.name for module in report.modules if module.decision == "projected"}


def limited(policy: Policy, energy: float) -> Policy:
    """The policy with at most that energy, which a cache has."""
    too_much = policy.has_effect("energy") and policy.energy > energy
    return dataclasses.replace(policy, energy=energy) if too_much else policy


def test_what_is_read_of_a_thin_cache() -> None:
    """No operator. All of L where the policy decides by similarity or multiplies by Ĉ."""
    for policy in EVERY:
        exact, thin = (parts_read(policy, thin=thin) for thin in (False, True))
        assert not thin.operator and thin.input_energy == exact.input_energy
        assert thin.output_energy == (WHOLE if exact.operator else exact.output_energy)


@pytest.mark.parametrize("policy", SERVED, ids=str)
def test_a_thin_cache_serves_what_a_full_one_serves(
    policy: dict[str, Any], thin: ProjectorCache, cache: ProjectorCache, adapter: Path, tmp_path: Path
) -> None:
    """The same bytes and reports, but for the cache's id, from as much memory."""
    reports, published, held = [], [], []
    for kind in (cache, thin):
        service = GateService(config(kind, tmp_path / kind.id, **policy))
        answer = service.admit(Admit(str(adapter), "tenant"))
        assert answer.accepted_key() and answer.report.projectors == kind.id
        reports.append(dataclasses.replace(answer.report, projectors=""))
        copy = files(tmp_path / kind.id / "store" / "published" / answer.accepted_key())
        assert json.loads(copy.pop("report.json"))["report"]["projectors"] == kind.id
        published.append(copy)
        held.append(service._settings.cache.resident_bytes()["device"])
    assert reports[0] == reports[1] and len(reports[0].modules) == len(module_shapes())
    assert published[0] == published[1] and set(published[0]) == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert held[0] == held[1] > 0


def test_it_is_smaller_by_the_operators_and_nothing_else(thin: ProjectorCache, cache: ProjectorCache) -> None:
    sizes = [kind.resident_bytes()["disk"] for kind in (thin, cache)]
    operators = sum(
        torch.float32.itemsize * d_out * min(d_out, d_in) for d_out, d_in in module_shapes().values()
    )
    assert sizes[0] == sizes[1] - operators
    on_disk = [
        sum(len(data) for name, data in files(k.folder).items() if "proj" in name) for k in (thin, cache)
    ]
    # The headers of the shards name one tensor a module less.
    assert operators < on_disk[1] - on_disk[0] < operators + 200 * len(module_shapes())
    for name, entry in thin.modules.items():
        full = cache.modules[name]
        assert dataclasses.replace(full, form="thin", shard=entry.shard) == entry
        projectors = thin.projector(name), cache.projector(name)
        assert torch.equal(*(p.energies for p in projectors))
        for side in ("input_basis", "output_basis"):
            assert torch.equal(*(getattr(p, side)(FULL) for p in projectors))


def test_its_manifest_and_its_checksums(thin: ProjectorCache, tmp_path: Path) -> None:
    manifest = json.loads((thin.folder / "manifest.json").read_bytes())
    assert (manifest["version"], manifest["dtype"], manifest["max_energy"]) == (2, None, FULL)
    assert {module["form"] for module in manifest["modules"]} == {"thin"} and thin.thin
    folder = Path(shutil.copytree(thin.folder, tmp_path / "copy"))
    ProjectorCache(folder).verify()
    shard = next(folder.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ProjectorCacheError, match="its bytes are not those"):
        ProjectorCache(folder).verify()


def test_everything_is_loaded_that_is_there(thin: ProjectorCache) -> None:
    whole = ProjectorCache(thin.folder)
    whole.load("cpu")
    assert whole.resident_bytes() == {"device": thin.resident_bytes()["disk"], "host": 0, "disk": 0}


def test_one_thin_module_makes_a_thin_cache(cache: ProjectorCache, adapter: Path, tmp_path: Path) -> None:
    """Its similarities are all certified, and the module without Ĉ is multiplied by C_k."""
    folder = Path(shutil.copytree(cache.folder, tmp_path / "mixed"))
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest["modules"][-1]["form"] = "thin"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    mixed = ProjectorCache(folder)
    report = reported(mixed, Policy(method="safe-lora", select="all"), adapter)
    exact = reported(cache, Policy(method="safe-lora", select="all"), adapter)
    assert mixed.thin and all(module.similarity_error > 0 for module in report.modules)
    assert [m.retained for m in report.modules[:-1]] == [m.retained for m in exact.modules[:-1]]
    assert report.modules[-1].retained < exact.modules[-1].retained  # type: ignore[operator]


# Building.


@pytest.fixture
def make(pair: Pair, tmp_path: Path) -> Callable[..., Path]:
    """Build the pair's cache."""

    def run(**options: Any) -> Path:
        return build(pair.base, pair.aligned, tmp_path / "made", BuildOptions(**options))

    return run


def test_the_default_energy_is_twice_the_default_policys() -> None:
    assert BuildOptions().max_energy == MAX_ENERGY == 2 * Policy().energy
    assert BuildOptions(exact=True).max_energy == FULL and not BuildOptions().exact
    for exact in (True, False):
        assert BuildOptions(exact=exact, max_energy=0.6).max_energy == 0.6
        with pytest.raises(UsageError, match="`max_energy` is nan: expected a share"):
            BuildOptions(exact=exact, max_energy=math.nan)


def test_the_command_and_the_function_build_the_same(
    pair: Pair, make: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = [tmp_path / name for name in ("command", "more")]
    given = ["build", "--base", str(pair.base), "--aligned", str(pair.aligned)]
    assert main([*given, "--out", str(out[0])]) == 0 and str(out[0]) in capsys.readouterr().out
    assert main([*given, "--out", str(out[1]), "--max-energy", "0.7"]) == 0
    by_function = sl.build_projectors(pair.base, pair.aligned, tmp_path / "api")
    assert {ProjectorCache(folder).id for folder in (out[0], make())} == {by_function.id}
    energies = [
        [float(cache.projector(name).energies[-1]) for name in cache.modules]
        for cache in (by_function, ProjectorCache(out[1]))
    ]
    assert all(0.4 <= less < 0.7 <= more for less, more in zip(*energies, strict=True))
    assert by_function.resident_bytes()["disk"] < ProjectorCache(out[1]).resident_bytes()["disk"]


@pytest.mark.parametrize(("option", "value"), [("dtype", "float32"), ("form", "dense"), ("form", "factored")])
def test_options_of_what_is_left_out_are_refused(
    option: str, value: str, pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = f"`{option}` has no effect without `exact`: .* Add `exact`, or leave `{option}` out"
    with pytest.raises(UsageError, match=told):
        sl.build_projectors(pair.base, pair.aligned, tmp_path / "out", **{option: value})  # type: ignore[arg-type]
    default = getattr(BuildOptions(), option)
    for given in (value, default):  # on the command line also where it is the default
        command = ["build", "--base", str(pair.base), "--aligned", str(pair.aligned)]
        assert main([*command, "--out", str(tmp_path / "out"), f"--{option}", given]) == 2
        error = capsys.readouterr().err
        assert f"--{option} has no effect without --exact:" in error
        assert f"Add --exact, or leave --{option} out" in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("energy", [None, FULL])
def test_the_room_that_is_asked_for(
    energy: float | None, make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Enough, and less than for a full cache by Ĉ; at 0.95 not twice what is needed."""
    usage, free = namedtuple("usage", "total used free"), 1
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(10**9, 0, free))
    options: dict[str, Any] = {} if energy is None else {"max_energy": energy}
    kept = energy or MAX_ENERGY

    def asked(**more: Any) -> int:
        with pytest.raises(UsageError, match=r"or give fewer `modules` or a smaller `max_energy`") as refused:
            make(modules=(Q0,), **more)
        found = re.search(r"up to ([\d,]+) bytes", str(refused.value))
        assert found is not None
        return int(found[1].replace(",", ""))

    room = asked(**options)
    assert room == asked(exact=True, max_energy=kept) - torch.bfloat16.itemsize * math.prod(
        module_shapes()[Q0]
    )
    free = room
    cache = ProjectorCache(make(modules=(Q0,), **options))
    needed = cache.resident_bytes()["disk"]
    assert needed <= room and (energy is None or room / 2 < needed)


def test_no_operator_is_made(make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither of a square, nor of a wide or tall module: the build's memory has no place for it."""
    written: set[str] = set()
    inner = build_module.build_module

    def spy(*given: Any) -> Any:
        figures, tensors = inner(*given)  # type: ignore[misc]
        written.update(tensors)
        return figures, tensors

    monkeypatch.setattr(build_module, "build_module", spy)
    make()
    assert written == {"input_basis", "output_basis", "energy"}


# What a policy does with it.


@each_policy
@pytest.mark.parametrize("energy", [MAX_ENERGY, FULL])
def test_every_policy_works(
    policy: Policy, energy: float, thin_at: Callable[[float], ProjectorCache], cache: ProjectorCache,
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """A gate, the functions and the commands. All modules that an exact cache projects are projected."""
    thin, policy = thin_at(energy), limited(policy, 0.4)
    options: dict[str, Any] = {"method": policy.method, "select": policy.select}
    if policy.method == "csulora":
        options["energy"] = 0.4
    service = GateService(config(thin, tmp_path / "gate", **options))
    answer = service.admit(Admit(str(adapter), "tenant"))
    report, exact = sl.inspect_adapter(adapter, thin, policy), sl.inspect_adapter(adapter, cache, policy)
    assert answer.accepted_key() and report.accepted and exact.accepted
    assert projected(exact) <= projected(report) and projected(answer.report) == projected(report)
    assert sl.project_adapter(adapter, str(thin.folder), tmp_path / "out", policy) == report
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    assert main(["inspect", str(adapter), "--projectors", str(thin.folder), *words]) == 0
    shown = capsys.readouterr().out
    assert ("uncertain" in shown) == (report.uncertain > 0)
    assert report.uncertain == sum(module.uncertain for module in report.modules)
    if policy.select == "all":
        assert report.uncertain == 0
    elif energy == MAX_ENERGY:
        assert report.uncertain > 0
    assert main(["inspect", str(adapter), str(adapter), "--projectors", str(thin.folder), *words]) == 0
    assert ("uncertain" in capsys.readouterr().out) == (report.uncertain > 0)
    (tmp_path / "uploads").mkdir()
    shutil.copytree(adapter, tmp_path / "uploads" / "one")
    bulk = [
        "--all",
        str(tmp_path / "uploads"),
        "--out",
        str(tmp_path / "all"),
        "--projectors",
        str(thin.folder),
    ]
    caplog.clear()
    assert main(["project", *bulk, *words]) == 0
    assert ("uncertain" in capsys.readouterr().out) == (report.uncertain > 0)
    warned = [text for text in caplog.messages if "multiplies by Ĉ" in text]
    assert len(warned) == (policy.method == "safe-lora")
    assert main(["project", *bulk, *words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["uncertain"] == report.uncertain
    written = tmp_path / "by-command"
    assert (
        main(["project", str(adapter), "--projectors", str(thin.folder), "--out", str(written), *words]) == 0
    )
    assert ("uncertain" in capsys.readouterr().out) == (report.uncertain > 0)
    assert files(written) == files(tmp_path / "out")


def dense_truncated(v: Tensor, k: int) -> Tensor:
    """C_k of V in float64: Ĉ's part in the first k left singular vectors."""
    left, sizes, _ = torch.linalg.svd(v, full_matrices=False)
    return (left[:, :k] * (sizes[:k] ** 2 / torch.linalg.matrix_norm(v))) @ left[:, :k].T


def test_the_same_bases_beside_an_operator_decide_exactly(
    thin: ProjectorCache, cache: ProjectorCache, adapter: Path
) -> None:
    for policy in (Policy(method="safe-lora"), Policy(select="number")):
        report, exact = reported(thin, policy, adapter), reported(cache, policy, adapter)
        assert exact.uncertain == 0 and all(module.similarity_error == 0 for module in exact.modules)
        for found, known in zip(report.modules, exact.modules, strict=True):
            assert found.similarity is not None and known.similarity is not None
            assert found.similarity_error > 0 and found.null_similarity == known.null_similarity
            # Ĉ in float32 gives the other one.
            assert abs(found.similarity - known.similarity) <= found.similarity_error + 1e-6


# What is accepted.


@each_policy
@pytest.mark.parametrize("size", [1.0, 2.0, 30.0])
def test_the_caps_refuse_what_they_refuse_with_an_exact_cache(
    policy: Policy,
    size: float,
    thin_at: Callable[[float], ProjectorCache],
    cache: ProjectorCache,
    tmp_path: Path,
) -> None:
    """Nothing is accepted because a similarity is not known, nor refused."""
    draft = Draft()
    for name in module_shapes():
        draft.tensors[key(name, "B")] *= size
    upload = draft.write(tmp_path / "adapter")
    policy = limited(policy, 0.4)
    thin, exact = (reported(kind, policy, upload) for kind in (thin_at(0.4), cache))
    assert thin.accepted == exact.accepted == (size < 10) and thin.reasons == exact.reasons
    assert thin.total_norm == exact.total_norm


def test_values_that_are_not_finite_are_refused(thin: ProjectorCache, tmp_path: Path) -> None:
    huge = Draft(config={**Draft().config, "lora_alpha": 1e38})
    huge.tensors[key(Q0, "B")] *= 1e30
    report = reported(thin, Policy(method="safe-lora"), huge.write(tmp_path / "huge"))
    assert [reason.code for reason in report.reasons] == ["non_finite"]


@pytest.fixture(scope="session")
def enlarging_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[ProjectorCache, ProjectorCache]:
    """An exact and a thin cache of a pair whose ‖V‖ is far above 1."""
    root = tmp_path_factory.mktemp("enlarging")
    pair = write_pair(root, step=0.4)
    options = {"exact": BuildOptions(exact=True, dtype="float32"), "thin": BuildOptions(max_energy=0.1)}
    exact, thin = (ProjectorCache(build(pair.base, pair.aligned, root / n, o)) for n, o in options.items())
    return exact, thin


def test_a_cap_holds_for_what_is_served(
    enlarging_pair: tuple[ProjectorCache, ProjectorCache], tmp_path: Path
) -> None:
    """C_k enlarges less than Ĉ does. So an adapter may be served that Ĉ would have made too large."""
    delta, kept = enlarging_pair[0].projector(Q0), len(enlarging_pair[1].projector(Q0).energies)
    tensors = lora([Q0])
    tensors[key(Q0, "B")] = delta.output_basis(0.9)[:, kept - 1 : kept + 3].clone()  # where the thin one ends
    adapter = Draft(tensors=tensors).write(tmp_path / "adapter")
    free = Policy(method="safe-lora", select="all", max_relative_norm=1e9, max_total_norm=1e9)
    exact, thin = (reported(cache, free, adapter) for cache in enlarging_pair)
    grown = [[m.retained * m.relative_norm for m in report.modules] for report in (exact, thin)]  # type: ignore[operator]
    assert all(less <= more * (1 + ROUNDING) for more, less in zip(*grown, strict=True))
    largest = [max(max(sizes), *(m.relative_norm for m in exact.modules)) for sizes in grown]
    assert largest[0] > largest[1]
    for cap, accepted in ((largest[0] * 1.01, (True, True)), (largest[1] * 1.01, (False, True)),
                          (largest[1] * 0.99, (False, False))):  # fmt: skip
        capped = dataclasses.replace(free, max_relative_norm=cap)
        assert tuple(reported(cache, capped, adapter).accepted for cache in enlarging_pair) == accepted


@pytest.mark.parametrize(
    ("field", "values"), [("threshold", [0.1, 0.3, 0.5, 0.9]), ("number", [1, 3, 9, 14])]
)
def test_a_stricter_policy_projects_all_that_another_does(
    field: str, values: list[Any], thin_at: Callable[[float], ProjectorCache], adapter: Path
) -> None:
    """So that policies are compared as with exact similarities."""
    policies = [Policy(method="safe-lora", select=field, **{field: value}) for value in values]
    policies.append(Policy(method="safe-lora", select="all"))
    found = [projected(reported(thin_at(0.4), policy, adapter)) for policy in policies]
    for less, more in itertools.pairwise(policies):
        assert more.at_least_as_strict(less) and not less.at_least_as_strict(more)
    assert all(less <= more for less, more in itertools.pairwise(found))


# What is said of it.


def loss(cache: ProjectorCache, pair: Pair) -> tuple[float, float]:
    """The share of ‖Ĉ‖_F² that a cache has, in all and in the module with the least."""
    parts = []
    for name in cache.modules:
        v, k = pair.v(name), len(cache.projector(name).energies)
        parts.append([float(x.square().sum()) for x in (dense_truncated(v, k), reference.operator(v))])
    kept, whole = (sum(column) for column in zip(*parts, strict=True))
    return kept / whole, min(part / of for part, of in parts)


def test_a_gate_a_plan_and_a_calibration_say_what_is_lost(
    thin_at: Callable[[float], ProjectorCache], cache: ProjectorCache, pair: Pair, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    thin = thin_at(0.4)
    share, least = loss(thin, pair)
    assert 0.3 < least < share < 0.999
    told = (
        rf"{re.escape(str(thin.folder))} is thin, and `method` 'safe-lora' multiplies by Ĉ\. Its directions "
        rf"hold {share:.3f} of ‖Ĉ‖_F² \(in model\.layers\..*: {least:.3f}, the least\)\. .* with `exact`\. A "
        "larger `max_energy`"
    )
    policy = Policy(method="safe-lora", select="number")
    for said in (
        lambda: GateService(config(thin, tmp_path, method="safe-lora")),
        lambda: sl.plan_projectors(pair.aligned, policy, projectors=thin),
        lambda: sl.calibrate_policy(thin, policy),
    ):
        caplog.clear()
        said()
        (record,) = (r for r in caplog.records if r.levelno == logging.WARNING and "Ĉ" in r.getMessage())
        assert re.search(told, record.getMessage())
    caplog.clear()
    sl.plan_projectors(pair.aligned, policy)
    assert "would be thin, and `method` 'safe-lora' multiplies by Ĉ" in caplog.text
    caplog.clear()
    assert truncation(policy, cache) == truncation(Policy(select="number"), thin) == ""
    GateService(config(cache, tmp_path, method="safe-lora"))
    sl.plan_projectors(pair.aligned, policy, exact=True)
    sl.plan_projectors(pair.aligned)
    assert "thin" not in caplog.text


@pytest.mark.parametrize("energy", ENERGIES)
def test_calibrate_says_what_a_random_adapter_keeps_with_it(
    energy: float, thin_at: Callable[[float], ProjectorCache], cache: ProjectorCache, pair: Pair
) -> None:
    thin = thin_at(energy)
    for name in thin.modules:
        cut = dense_truncated(pair.v(name), len(thin.projector(name).energies))
        dense = float(torch.linalg.matrix_norm(cut)) / cut.shape[0] ** 0.5
        assert norm_kept(thin.projector(name)) == pytest.approx(dense, rel=1e-9)
    for policy in EVERY:
        if policy.method == "csulora":
            continue
        rules = limited(policy, energy)
        found, exact = sl.calibrate_policy(thin, rules), sl.calibrate_policy(cache, rules)
        assert found.whole.projected >= exact.whole.projected
        assert found.whole.effect_kept <= exact.whole.effect_kept + 1e-12
        if policy == Policy() and energy >= policy.energy:
            assert found.whole == exact.whole
    # What the gate does with random adapters is what is told of them, as far as they are near their mean.
    policy, generator = Policy(method="safe-lora", threshold=0.3), torch.Generator().manual_seed(3)
    told, counts = sl.calibrate_policy(thin, policy).whole.projected, []
    for _ in range(20):
        weights = {
            name: (torch.randn(8, columns, generator=generator), torch.randn(rows, 8, generator=generator))
            for name, (rows, columns) in module_shapes().items()
        }
        judged = judge(weights, thin, policy, torch.device("cpu"), torch.float32)
        counts.append(sum(module.projected for module in judged))
    assert abs(sum(counts) / len(counts) - told) < 1.5


def test_more_energy_than_it_keeps_is_refused_as_always(pair: Pair, adapter: Path, tmp_path: Path) -> None:
    cache = sl.build_projectors(pair.base, pair.aligned, tmp_path / "cache")
    assert sl.inspect_adapter(adapter, cache, sl.Policy(energy=0.4)).accepted
    for policy in (
        sl.Policy(energy=0.9),
        sl.Policy(method="csulora"),
        sl.Policy(energy=0.9, select="number"),
    ):
        with pytest.raises(PolicyError, match=rf"with a `max_energy` of {policy.energy} or more"):
            sl.inspect_adapter(adapter, cache, policy)
        with pytest.raises(PolicyError, match=rf"with a `max_energy` of {policy.energy} or more"):
            given = {"method": policy.method, "energy": policy.energy, "select": policy.select}
            GateService(config(cache, tmp_path, **given))


def test_an_admins_policy_for_one_adapter(thin: ProjectorCache, adapter: Path, tmp_path: Path) -> None:
    """The gate has loaded what its own policy reads; what another one reads comes from the shards."""
    service = GateService(config(thin, tmp_path))
    kept = service.admit(Admit(str(adapter), "tenant"))
    for policy in ({"method": "safe-lora"}, {"select": "number"}):
        answer = service.answer(Ensure(kept.report.digest, "tenant", policy, override=True))
        alone = GateService(config(thin, tmp_path / policy.get("method", "number"), **policy))
        expected = alone.admit(Admit(str(adapter), "tenant"))
        assert answer.report == expected.report  # type: ignore[union-attr]
    assert service.ensure(Ensure(kept.report.digest, "tenant")).accepted_key() == kept.accepted_key()


# The figures in Python.


def test_a_delta_has_a_certified_similarity_and_no_other(thin: ProjectorCache, cache: ProjectorCache) -> None:
    tensors, name = lora(), Q0
    pairs = [tensors[key(name, side)] for side in "AB"]
    deltas = [ModuleDelta(pairs[0], pairs[1], kind.projector(name)) for kind in (thin, cache)]
    certified = [delta.stats(Parts(False, 0.5, 0.5)) for delta in deltas]
    assert certified[0] == certified[1] and certified[0].similarity is not None
    exact = deltas[1].similarity
    assert exact is not None and abs(certified[0].similarity.middle - exact) <= certified[0].similarity.error
    whole = deltas[0].stats(Parts(False, 0.0, WHOLE)).similarity
    assert whole is not None and whole.error < certified[0].similarity.error
    assert (deltas[0].norm, deltas[0].coherence) == (deltas[1].norm, deltas[1].coherence)
    for figure in (lambda: deltas[0].similarity, lambda: deltas[0].stats(Parts())):
        with pytest.raises(AssertionError, match="C_k is not Ĉ"):
            figure()
