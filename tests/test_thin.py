"""Caches without Ĉ and V: what they serve, as a full cache does, and what is refused with them, and when."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import safelora_vllm as sl
from safelora_vllm.cli.main import main
from safelora_vllm.errors import PolicyError, ProjectorCacheError, StoreUnavailable, UsageError
from safelora_vllm.gate.protocol import Admit, Ensure, GateConfig
from safelora_vllm.gate.server import GateService
from safelora_vllm.methods import METHODS
from safelora_vllm.methods.delta import ModuleDelta
from safelora_vllm.methods.reads import check_parts, parts_read
from safelora_vllm.policy import METHOD_NAMES, SELECTIONS, Policy
from safelora_vllm.projectors import build as build_module
from safelora_vllm.projectors.build import THIN_MAX_ENERGY, BuildOptions, build
from safelora_vllm.projectors.cache import Parts, ProjectorCache
from safelora_vllm.projectors.shards import Shards
from safelora_vllm.settings import ServerSettings
from tests.tiny import Q0, Draft, Pair, key, lora, module_shapes

FULL = 0.95
# Every policy that reads Ĉ or V, and what its refusal says of it.
_SELECT = r"`select` '{0}' compares similarities, .* again without `thin`, or use `select` 'all'$"
_METHOD = (
    r"`method` 'safe-lora' multiplies by one of them\. Build it again without `thin`, or use `method` "
    r"'input-removal' or 'csulora' with `select` 'all'$"
)
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"method": "safe-lora"}, _METHOD),
    ({"method": "safe-lora", "select": "number"}, _METHOD),
    ({"method": "safe-lora", "select": "all"}, _METHOD),
    *(
        ({"method": method, "select": select}, _SELECT.format(select))
        for method in ("input-removal", "csulora")
        for select in ("threshold", "number")
    ),
]
SERVED: list[dict[str, Any]] = [
    {}, {"energy": 0.9}, {"method": "csulora"}, {"method": "csulora", "energy": 0.3}, {"mode": "report-only"},
]  # fmt: skip
each_refused = pytest.mark.parametrize(("policy", "told"), REFUSED, ids=str)


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


def test_the_refused_policies_are_all_that_read_an_operator() -> None:
    """So that a new method or selection is looked at here too."""
    for method in METHOD_NAMES:
        for select in SELECTIONS:
            listed = any(Policy(**policy) == Policy(method=method, select=select) for policy, _ in REFUSED)
            assert parts_read(Policy(method=method, select=select)).operator == listed


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


def test_one_thin_module_makes_a_thin_cache(cache: ProjectorCache, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(cache.folder, tmp_path / "mixed"))
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest["modules"][-1]["form"] = "thin"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(PolicyError, match="was built with `thin`"):
        check_parts(Policy(method="safe-lora"), ProjectorCache(folder))


# Building.


@pytest.fixture
def make(pair: Pair, tmp_path: Path) -> Callable[..., Path]:
    """Build the pair's cache."""

    def run(**options: Any) -> Path:
        return build(pair.base, pair.aligned, tmp_path / "made", BuildOptions(**options))

    return run


def test_the_default_energy_is_twice_the_default_policys() -> None:
    assert BuildOptions(thin=True).max_energy == THIN_MAX_ENERGY == 2 * Policy().energy
    assert BuildOptions().max_energy == FULL and not BuildOptions().thin
    for thin in (True, False):
        assert BuildOptions(thin=thin, max_energy=0.6).max_energy == 0.6
        with pytest.raises(UsageError, match="`max_energy` is nan: expected a share"):
            BuildOptions(thin=thin, max_energy=math.nan)


def test_the_command_and_the_function_build_the_same(
    pair: Pair, make: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = [tmp_path / name for name in ("command", "more")]
    given = ["build", "--base", str(pair.base), "--aligned", str(pair.aligned), "--thin"]
    assert main([*given, "--out", str(out[0])]) == 0 and str(out[0]) in capsys.readouterr().out
    assert main([*given, "--out", str(out[1]), "--max-energy", "0.7"]) == 0
    by_function = sl.build_projectors(pair.base, pair.aligned, tmp_path / "api", thin=True)
    assert {ProjectorCache(folder).id for folder in (out[0], make(thin=True))} == {by_function.id}
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
    told = f"`{option}` has no effect with `thin`: .* Leave `{option}` or `thin` out"
    with pytest.raises(UsageError, match=told):
        sl.build_projectors(pair.base, pair.aligned, tmp_path / "out", thin=True, **{option: value})  # type: ignore[arg-type]
    default = getattr(BuildOptions(), option)
    for given in (value, default):  # on the command line also where it is the default
        command = ["build", "--base", str(pair.base), "--aligned", str(pair.aligned), "--thin"]
        assert main([*command, "--out", str(tmp_path / "out"), f"--{option}", given]) == 2
        error = capsys.readouterr().err
        assert (
            f"--{option} has no effect with --thin:" in error and f"Leave --{option} or --thin out" in error
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("energy", [None, FULL])
def test_the_room_that_is_asked_for(
    energy: float | None, make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Enough, and less than for a full cache by Ĉ; at 0.95 not twice what is needed."""
    usage, free = namedtuple("usage", "total used free"), 1
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(10**9, 0, free))
    options: dict[str, Any] = {} if energy is None else {"max_energy": energy}
    kept = energy or THIN_MAX_ENERGY

    def asked(**more: Any) -> int:
        with pytest.raises(UsageError, match=r"or give fewer `modules` or a smaller `max_energy`") as refused:
            make(modules=(Q0,), **more)
        found = re.search(r"up to ([\d,]+) bytes", str(refused.value))
        assert found is not None
        return int(found[1].replace(",", ""))

    room = asked(thin=True, **options)
    assert room == asked(max_energy=kept) - torch.bfloat16.itemsize * math.prod(module_shapes()[Q0])
    free = room
    cache = ProjectorCache(make(thin=True, modules=(Q0,), **options))
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
    make(thin=True)
    assert written == {"input_basis", "output_basis", "energy"}


# What is refused, at every entry, before anything is read or written.


@each_refused
def test_a_gate_does_not_start(
    policy: dict[str, Any], told: str, thin: ProjectorCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Shards, "_verify", lambda *_: pytest.fail("read"))
    start = re.escape(f"the projector cache {thin.folder} was built with `thin` and holds neither Ĉ nor V")
    with pytest.raises(PolicyError, match=f"^{start}, but {told}"):
        GateService(config(thin, tmp_path, **policy))


@each_refused
@pytest.mark.parametrize("opened", [True, False])
def test_functions_refuse(
    policy: dict[str, Any], told: str, opened: bool, thin: ProjectorCache, adapter: Path, tmp_path: Path
) -> None:
    cache: Any = thin if opened else str(thin.folder)
    with pytest.raises(PolicyError, match=told):
        sl.inspect_adapter(adapter, cache, sl.Policy(**policy))
    with pytest.raises(PolicyError, match=told):
        sl.project_adapter(adapter, cache, tmp_path / "out", sl.Policy(**policy))
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@each_refused
@pytest.mark.parametrize("command", ["inspect", "project"])
def test_commands_refuse(
    command: str, policy: dict[str, Any], told: str, thin: ProjectorCache, adapter: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    options = [word for name, value in policy.items() for word in (f"--{name}", value)]
    out = ["--out", str(tmp_path / "out")] if command == "project" else []
    assert main([command, str(adapter), "--projectors", str(thin.folder), *out, *options]) == 2
    said = capsys.readouterr()
    told = re.sub("`([a-z]+)`", r"--\1", told)
    assert re.search(told, said.err.strip()) and "was built with --thin" in said.err and not said.out
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("policy", [p for p, _ in REFUSED if METHODS[p["method"]].calibrator] + [{}], ids=str)
def test_calibrate_needs_no_operator(
    policy: dict[str, Any], thin: ProjectorCache, cache: ProjectorCache
) -> None:
    """Its figures are those of the manifest and the energies."""
    rules = sl.Policy(**policy)
    assert sl.calibrate_policy(thin, rules) == sl.calibrate_policy(cache, rules)


def test_more_energy_than_it_keeps_is_refused_as_always(pair: Pair, adapter: Path, tmp_path: Path) -> None:
    cache = sl.build_projectors(pair.base, pair.aligned, tmp_path / "cache", thin=True)
    assert sl.inspect_adapter(adapter, cache, sl.Policy(energy=0.4)).accepted
    for policy in (sl.Policy(energy=0.9), sl.Policy(method="csulora")):
        with pytest.raises(PolicyError, match=rf"with a `max_energy` of {policy.energy} or more"):
            sl.inspect_adapter(adapter, cache, policy)
        with pytest.raises(PolicyError, match=rf"with a `max_energy` of {policy.energy} or more"):
            GateService(config(cache, tmp_path, method=policy.method, energy=policy.energy))


@pytest.fixture
def service(thin: ProjectorCache, tmp_path: Path) -> Iterator[GateService]:
    """A gate with the default policy and a thin cache."""
    yield GateService(config(thin, tmp_path))


@each_refused
def test_a_call_with_such_a_policy_loses_nothing(
    policy: dict[str, Any], told: str, service: GateService, adapter: Path, tmp_path: Path
) -> None:
    """An admin's override asks for it. Callers are not told where the cache is."""
    kept = service.admit(Admit(str(adapter), "tenant"))
    before = files(tmp_path / "store")
    start = "^the server's projector cache was built with `thin`"
    for call in (
        Admit(str(adapter), "tenant", policy, override=True),
        Ensure(kept.report.digest, "tenant", policy, override=True),
        Admit(str(tmp_path / "nothing"), "tenant", policy, override=True),
    ):
        with pytest.raises(PolicyError, match=f"{start}.*{told}"):
            service.answer(call)
    assert files(tmp_path / "store") == before
    assert service.ensure(Ensure(kept.report.digest, "tenant")).accepted_key() == kept.accepted_key()
    with pytest.raises(StoreUnavailable):  # what it says of anything else stays
        service.ensure(Ensure("0" * 64, "tenant"))


@pytest.mark.parametrize("policy", [policy for policy, _ in REFUSED], ids=str)
def test_without_an_override_the_servers_policy_holds(
    policy: dict[str, Any], service: GateService, adapter: Path
) -> None:
    """Such a policy, kept from another server, is less strict or cannot be compared."""
    found = service.admit(Admit(str(adapter), "tenant", policy)).report
    assert found.accepted and found.policy == Policy()


# The figures in Python.


def test_a_delta_has_a_certified_similarity_or_says_why_not(
    thin: ProjectorCache, cache: ProjectorCache
) -> None:
    tensors, name = lora(), Q0
    pairs = [tensors[key(name, side)] for side in "AB"]
    deltas = [ModuleDelta(pairs[0], pairs[1], kind.projector(name)) for kind in (thin, cache)]
    certified = [delta.stats(Parts(False, 0.5, 0.5)) for delta in deltas]
    assert certified[0] == certified[1] and certified[0].similarity is not None
    exact = deltas[1].similarity
    assert exact is not None and abs(certified[0].similarity.middle - exact) <= certified[0].similarity.error
    assert (deltas[0].norm, deltas[0].coherence) == (deltas[1].norm, deltas[1].coherence)
    for figure in (lambda: deltas[0].similarity, lambda: deltas[0].image, lambda: deltas[0].stats(Parts())):
        with pytest.raises(
            PolicyError, match=rf"thin` and holds neither .* Ĉ B of {name} is a product .* `thin`$"
        ):
            figure()
