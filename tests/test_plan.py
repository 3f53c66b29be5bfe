"""``plan``: its figures against a real cache and a real load, its assumption, its errors."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import safelora_vllm as sl
from safelora_vllm.cli.main import main
from safelora_vllm.errors import PolicyError, UsageError
from safelora_vllm.methods.reads import parts_read
from safelora_vllm.projectors import build_time
from safelora_vllm.projectors.assumed_spectrum import directions
from safelora_vllm.projectors.checkpoint import Checkpoint
from safelora_vllm.projectors.plan import CONTEXT_BYTES
from safelora_vllm.projectors.weight_files import read_header
from tests.tiny import SHAPES, Pair, module_shapes

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
GIB, MIB = 2**30, 2**20
LLAMA_3_8B = {
    "self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (1024, 4096), "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096), "mlp.gate_proj": (14336, 4096), "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}  # fmt: skip
LLAMA_3_70B = {
    "self_attn.q_proj": (8192, 8192), "self_attn.k_proj": (1024, 8192), "self_attn.v_proj": (1024, 8192),
    "self_attn.o_proj": (8192, 8192), "mlp.gate_proj": (28672, 8192), "mlp.up_proj": (28672, 8192),
    "mlp.down_proj": (8192, 28672),
}  # fmt: skip
LLAMA_2_7B = {
    **{f"self_attn.{part}_proj": (4096, 4096) for part in "qkvo"},
    "mlp.gate_proj": (11008, 4096), "mlp.up_proj": (11008, 4096), "mlp.down_proj": (4096, 11008),
}  # fmt: skip
POLICIES = {
    "the default": sl.Policy(),
    "number": sl.Policy(select="number"),
    "safe-lora": sl.Policy(method="safe-lora"),
    "safe-lora, all": sl.Policy(method="safe-lora", select="all"),
    "csulora": sl.Policy(method="csulora"),
    "csulora, threshold": sl.Policy(method="csulora", select="threshold"),
    "energy 0.7": sl.Policy(energy=0.7),
}


@pytest.fixture(autouse=True)
def small_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """The module that is built for the estimate, and a machine without a GPU."""
    monkeypatch.setattr(build_time, "_CPU_SIDE", 64)
    monkeypatch.setattr(build_time, "_CPU_THIN_SIDE", 64)
    monkeypatch.setattr(build_time, "_HASHED", 64 * 1024)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def headers(
    folder: Path, shapes: Mapping[str, tuple[int, int]], layers: int, sparse: bool = False, **config: Any
) -> Path:
    """A bfloat16 checkpoint of one file without weights: it ends after its header, or with a hole."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    header, end = {}, 0
    for layer in range(layers):
        for part, shape in shapes.items():
            start, end = end, end + 2 * math.prod(shape)
            entry = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
            header[f"model.layers.{layer}.{part}.weight"] = entry
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        if sparse:
            file.truncate(8 + len(text) + end)
    return folder


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """Run the command in a wide terminal: exit code, standard output, standard error."""
    monkeypatch.setenv("COLUMNS", "160")

    def call(*options: object) -> tuple[int, str, str]:
        try:
            code = main(["plan", *map(str, options)])
        except SystemExit as error:  # argparse ends the process itself
            assert isinstance(error.code, int)
            code = error.code
        return code, *capsys.readouterr()

    return call


Run = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("form", ["auto", "dense", "factored"])
def test_a_planned_gate_holds_what_a_real_one_loads(
    pair: Pair, build_cache: Callable[[str, str], Path], policy: sl.Policy, form: str
) -> None:
    cache = sl.ProjectorCache(build_cache("bfloat16", form))
    plan = sl.plan_projectors(pair.aligned, policy, projectors=cache)
    loaded, parts = sl.ProjectorCache(cache.folder), parts_read(policy, cache.thin)
    loaded.load("cpu", None, parts.input_energy, parts.output_energy, parts.operator)
    assert plan.device_bytes == loaded.resident_bytes()["device"]
    on_gpu = sl.plan_projectors(pair.aligned, policy, projectors=cache, gpu_memory=GIB)
    assert on_gpu.device_bytes == plan.device_bytes - plan.held.energy  # which stays in host memory


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("form", ["auto", "dense", "factored"])
def test_a_planned_cache_is_as_large_as_its_shards(
    pair: Pair, build_cache: Callable[[str, str], Path], dtype: str, form: str
) -> None:
    folder = build_cache(dtype, form)
    plan = sl.plan_projectors(pair.aligned, projectors=folder)
    found = dict.fromkeys(("projector", "delta", "input_basis", "output_basis", "energy"), 0)
    for file in folder.glob("*.safetensors"):
        for key, info in read_header(file).items():
            found[key.rpartition(".")[2]] += info.nbytes
    assert plan.disk.operator == found["projector"] + found["delta"]
    for part in ("input_basis", "output_basis", "energy"):
        assert getattr(plan.disk, part) == found[part]
    assert plan.disk.total == sum(
        shard["tensor_bytes"]
        for shard in json.loads((folder / "manifest.json").read_text())["shards"].values()
    )
    assert (plan.modules, plan.assumed, plan.max_energy) == (len(module_shapes()), False, None)


def test_the_most_that_a_build_takes_is_what_build_asks_of_the_disk(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    plan = sl.plan_projectors(pair.aligned, max_energy=0.8)
    with pytest.raises(UsageError, match=f"needs up to {plan.disk_at_most:,} bytes"):
        sl.build_projectors(pair.base, pair.aligned, tmp_path / "out", max_energy=0.8)
    assert plan.disk.total < plan.disk_at_most


def test_a_thin_cache_is_planned_and_read_as_it_is_built(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = sl.build_projectors(pair.base, pair.aligned, tmp_path / "thin")
    plan = sl.plan_projectors(pair.aligned, projectors=built)
    manifest = json.loads((built.folder / "manifest.json").read_text())
    assert plan.disk.total == sum(shard["tensor_bytes"] for shard in manifest["shards"].values())
    assert plan.disk.operator == 0 and {group.form for group in plan.groups} == {"thin"}
    for policy in (sl.Policy(select="number"), sl.Policy(method="safe-lora", select="all"), sl.Policy()):
        plan, loaded = (
            sl.plan_projectors(pair.aligned, policy, projectors=built),
            sl.ProjectorCache(built.folder),
        )
        loaded.load("cpu", None, **dataclasses.asdict(parts_read(policy, thin=True)))
        assert plan.device_bytes == loaded.resident_bytes()["device"]
        decides = policy != sl.Policy()
        assert (
            plan.held.output_basis == plan.disk.output_basis
        ) == decides  # all of L, or what is read anyway
    assumed = sl.plan_projectors(pair.aligned)
    assert (assumed.max_energy, assumed.disk.operator) == (0.4, 0)
    exact = sl.plan_projectors(pair.aligned, max_energy=0.4, exact=True)
    assert assumed.held == exact.held and exact.disk.operator > 0
    assert sl.plan_projectors(pair.aligned, exact=True).max_energy == 0.95
    whole = sl.plan_projectors(pair.aligned, sl.Policy(method="safe-lora"))
    assert (whole.held.operator, whole.held.output_basis) == (0, whole.disk.output_basis)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(UsageError, match=f"needs up to {assumed.disk_at_most:,} bytes"):
        sl.build_projectors(pair.base, pair.aligned, tmp_path / "out")


def test_the_device_of_8b_is_near_the_benchmarks(tmp_path: Path) -> None:
    measured = json.loads((RESULTS / "projector_memory.json").read_text())["policies"]
    folder = headers(tmp_path / "8b", LLAMA_3_8B, 32, sparse=True)
    plan = sl.plan_projectors(folder)
    # A quarter: its k are of matrices that were drawn, and an energy of 0.2 has about 17 directions.
    default = measured["input-removal, all (the default)"]["llama_3_8b_bytes"]
    assert plan.device_bytes == pytest.approx(default, rel=0.25)
    dense = sl.plan_projectors(folder, sl.Policy(method="safe-lora"), exact=True)
    # Ĉ and V do not depend on a spectrum. The shares do: the benchmark's cache ends at energy 0.2.
    assert dense.device_bytes - dense.held.energy == pytest.approx(
        measured["safe-lora, threshold"]["llama_3_8b_bytes"], rel=1e-4
    )
    assert plan.modules == 224 and plan.held.operator == 0 < dense.held.operator


@pytest.mark.parametrize(
    ("shape", "energy", "k"),
    [
        # Of one draw each, as benchmarks/projector_memory.py draws V.
        ((4096, 4096), 0.2, 18), ((4096, 4096), 0.8, 991), ((4096, 4096), 0.95, 2051),
        ((4096, 11008), 0.2, 32), ((4096, 11008), 0.8, 1560), ((4096, 11008), 0.95, 2928),
    ],
)  # fmt: skip
def test_the_assumed_directions_are_those_that_were_measured(
    shape: tuple[int, int], energy: float, k: int
) -> None:
    # 2 of 18 and 3 of 32 are missed at an energy of 0.2, which few directions hold; 3.5 % of 991 at 0.8.
    assert directions(shape, energy) == pytest.approx(k, rel=0.15 if energy == 0.2 else 0.04)


@pytest.mark.parametrize("shape", [(256, 256), (128, 512), (512, 128), (96, 32)])
def test_the_assumed_directions_are_those_of_a_drawn_matrix(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(*shape, dtype=torch.float64, generator=generator)
    values = torch.linalg.svdvals(v * torch.arange(1, shape[1] + 1).pow(-0.4)).square()
    shares = values.cumsum(0) / values.sum()
    for energy in (0.1, 0.2, 0.5, 0.8, 0.95, 0.99):
        drawn = int((shares < energy).sum()) + 1
        assert abs(directions(shape, energy) - drawn) <= max(1, 0.04 * drawn)  # of one draw
    assert (directions(shape, 0.0), directions(shape, 1.0)) == (0, min(shape))


def test_no_weights_are_read(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same figures from whole files, from holes in place of the data, and from headers alone."""
    whole = sl.plan_projectors(pair.aligned, max_energy=0.9)
    cut, file = tmp_path / "cut", pair.aligned / "model.safetensors"
    cut.mkdir()
    (cut / "config.json").write_bytes((pair.aligned / "config.json").read_bytes())
    start = min(info.start for info in read_header(file).values())
    (cut / "model.safetensors").write_bytes(file.read_bytes()[:start])
    real = Checkpoint.raw
    monkeypatch.setattr(  # the module of the trial build is read
        Checkpoint, "raw", lambda model, name: pytest.fail(name) if model.folder == cut else real(model, name)
    )
    found = sl.plan_projectors(cut, max_energy=0.9)
    assert (found.groups, found.disk, found.held) == (whole.groups, whole.disk, whole.held)
    assert found.weight_bytes == whole.weight_bytes


def test_70b_in_shards_of_headers(tmp_path: Path, run: Run) -> None:
    folder = headers(tmp_path / "70b", LLAMA_3_70B, 80)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    names = [f"model.layers.{i}.{part}.weight" for i in range(80) for part in LLAMA_3_70B]
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    code, out, _ = run("--aligned", folder, "--exact", "--gpu-memory", "79.2", "--json")
    found = json.loads(out)
    assert (code, found["modules"], found["gpus"], found["fits"]) == (0, 560, 2, True)
    assert [shape["modules"] for shape in found["shapes"]] == [80, 160, 160, 160]
    assert (
        found["device_bytes"] < 2 * GIB and 300 * GIB < found["disk_bytes"] < 400 * GIB
    )  # 343 GiB, 1.07 of R
    assert found["disk_bytes"] == sum(found["disk"].values()) == sum(s["disk_bytes"] for s in found["shapes"])
    code, out, _ = run("--aligned", folder, "--exact", "--gpu-memory", "79.2", "--method", "safe-lora")
    assert code == 0 and "does not fit beside" in out and "on each of 2 GPUs" in out


def test_the_gate_on_a_gpu_has_a_context_and_groups(tmp_path: Path) -> None:
    """Of Llama-2-7B's shapes, as benchmarks/gpu measured it on an H100."""
    measured = json.loads((RESULTS / "gpu_check.json").read_text())
    folder = headers(tmp_path / "7b", LLAMA_2_7B, 32)
    projecting = measured["projecting"]
    ranks = {rank: row["transient_mib"] for rank, row in projecting["ranks"].items()}
    for rank, transient in ranks.items():
        plan = sl.plan_projectors(folder, lora_rank=int(rank), gpu_memory=79 * GIB)
        # 8 times the A and B of a group, and an eighth of it more, of the worst rank up to this one.
        assert 0.8 * plan.transient_bytes / MIB <= transient <= plan.transient_bytes / MIB
    csulora = sl.plan_projectors(folder, sl.Policy(method="csulora", energy=0.2), gpu_memory=79 * GIB)
    transient = projecting["csulora, 32 layers, r 16"]["transient_mib"]
    assert 0.8 * csulora.transient_bytes / MIB <= transient <= csulora.transient_bytes / MIB
    # That gate had warmed up for rank 512. The allowance is set by this sum; k differ by a fifth.
    assert plan.gate_bytes / MIB == pytest.approx(measured["gate_memory"]["after_rank_256_mib"], rel=0.05)
    assert plan.gate_bytes == plan.device_bytes + plan.transient_bytes + CONTEXT_BYTES
    on_cpu = sl.plan_projectors(folder)
    assert (on_cpu.context_bytes, on_cpu.gpu_share, on_cpu.fits) == (0, None, None)
    assert on_cpu.transient_bytes <= 9 * MIB


def test_a_smaller_budget_leaves_operators_elsewhere(tmp_path: Path, run: Run) -> None:
    folder = headers(tmp_path / "8b", LLAMA_3_8B, 32)
    given = ("--aligned", folder, "--exact", "--method", "safe-lora", "--gpu-memory", "80")
    given += ("--projector-memory", "2GiB")
    code, out, _ = run(*given)
    assert code == 0 and "in pinned host memory" not in out and "reads from disk at each use" in out
    whole = json.loads(run(*given[:-2], "--json")[1])
    assert (whole["host_bytes"], whole["read_bytes"]) == (0, 0) and whole["device_bytes"] > 10 * GIB
    found = json.loads(run(*given, "--projector-host-memory", "4GiB", "--json")[1])
    assert found["least_bytes"] == whole["least_bytes"] < 2 * GIB
    assert found["device_bytes"] + found["transient_bytes"] <= 2 * GIB and 0 < found["host_bytes"] <= 4 * GIB
    assert sum(found[f"{tier}_bytes"] for tier in ("device", "host", "read")) == whole["device_bytes"]
    assert found["gate_bytes"] <= 2 * GIB + CONTEXT_BYTES
    assert "in pinned host memory" in run(*given, "--projector-host-memory", "4GiB")[1]


def test_an_adapter_has_the_size_of_its_factors(pair: Pair) -> None:
    plan = sl.plan_projectors(pair.aligned, lora_rank=4)
    factors = 4 * sum(rows + columns for rows, columns in module_shapes().values())
    assert (plan.adapter_uploaded, plan.adapter_served) == (4 * factors, 2 * factors)
    part = sl.plan_projectors(pair.aligned, modules=["q_proj"])
    assert part.modules == 2 and part.groups[0].kinds == ["q_proj"]


def test_the_estimate_grows_with_the_work(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_time, "_hash_seconds", lambda: 0.0)
    monkeypatch.setattr(build_time, "_module_seconds", lambda side, *_: 1.0 * side**3)
    plan = sl.plan_projectors(pair.aligned)
    # Of a square module of 64, d³ is half of d_min² (d_out + d_in): 1 s a unit.
    expected = sum(min(shape) ** 2 * sum(shape) / 2 for shape in module_shapes().values())
    assert plan.build_seconds == pytest.approx(expected)
    monkeypatch.setattr(build_time, "_hash_seconds", lambda: 64 * 1024)  # a second a byte
    more = sl.plan_projectors(pair.aligned).build_seconds - expected
    assert more == pytest.approx(2 * plan.weight_bytes + plan.disk.total)


def test_the_table_says_what_is_assumed(tmp_path: Path, run: Run) -> None:
    folder = headers(tmp_path / "8b", LLAMA_3_8B, 32)
    code, out, _ = run("--aligned", folder)
    assert code == 0 and "224 modules under input-removal, energy 0.2, select all" in out
    assert "gate_proj, up_proj" in out and "14336 × 4096" in out and "gate on a CPU" in out
    assert "Assumed before a build: V = G diag(j^-0.4)" in out and "--max-energy 0.4" in out
    assert (
        "estimated" in out
        and "share" not in out.replace("shares of energy", "")
        and "does not fit" not in out
    )
    code, out, _ = run("--aligned", folder, "--gpu-memory", "24")
    assert "gate on a GPU" in out and "allowance for CUDA's context" in out and "GPU's 24.0 GiB" in out


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        (
            ("--exact", "--method", "safe-lora"),
            "--method input-removal and --select all, which read neither Ĉ nor V.",
        ),
        (("--exact", "--select", "threshold"), "or take --select all, which reads neither Ĉ nor V."),
        (
            ("--max-energy", "0.95", "--select", "threshold"),
            "weights: take --select all, which reads less of L.",
        ),
        (("--max-energy", "0.95", "--method", "csulora"), "weights: take a smaller --energy."),
    ],
)
def test_a_gate_that_does_not_fit_has_advice(
    tmp_path: Path, run: Run, options: tuple[str, ...], advice: str
) -> None:
    folder = headers(tmp_path / "8b", LLAMA_3_8B, 32)
    found = " ".join(run("--aligned", folder, "--gpu-memory", "24", *options)[1].split())
    assert "does not fit beside the model's 13.0 GiB of weights: " in found and advice in found
    if "--exact" not in options:  # reads nothing that could stay on disk
        assert "--projector-memory" not in found
        return
    least = int(re.search(r"set --projector-memory to (\d+) or more, so", found)[1])
    for memory, code in ((least, 0), (least - 1, 2)):
        given = ("--gpu-memory", "24", "--projector-memory", memory)
        assert run("--aligned", folder, *given, *options)[0] == code
    assert "does not fit" not in run("--aligned", folder, "--gpu-memory", "80", *options)[1]


def test_a_cache_replaces_the_assumption(pair: Pair, run: Run, cache: sl.ProjectorCache) -> None:
    where = ("--aligned", pair.aligned, "--projectors", cache.folder)
    code, out, _ = run(*where)
    assert code == 0 and "Assumed" not in out and "at most" not in out and "–" in out  # several k of a shape
    found = json.loads(run(*where, "--json")[1])
    assert (found["assumed_spectrum"], found["max_energy"]) == (False, None)
    assert found["device_bytes"] == found["device_bytes_at_most"]
    assert sum(shape["modules"] for shape in found["shapes"]) == found["modules"] == 14


def test_wrong_usage_is_2_with_a_sentence(
    pair: Pair, run: Run, tmp_path: Path, cache: sl.ProjectorCache
) -> None:
    (tmp_path / "empty").mkdir()
    here, other = ("--aligned", pair.aligned), dict(SHAPES)
    other["self_attn.q_proj"] = (96, 64)
    cases = {
        ("--aligned", "nowhere"): "nowhere is not a folder: expected the folder of the aligned model",
        ("--aligned", "org/name"): "org/name is not a folder: expected",
        ("--aligned", tmp_path / "empty"): "has no model.safetensors; expected model.safetensors, or shards",
        ("--aligned", headers(tmp_path / "none", {}, 1)): "has no linear layers in numbered blocks",
        ("--aligned", headers(tmp_path / "gpt2", SHAPES, 1, model_type="gpt2")): "store transposed weights",
        (*here, "--modules", "x_proj"): "has no linear layers named ['x_proj']; it has ['down_proj'",
        (*here, "--method", "other"): "invalid choice: 'other'",
        (*here, "--energy", "2"): "--energy is 2.0: expected a number from 0 to 1",
        (*here, "--number", "3"): "--number has no effect with --select 'all'",
        (*here, "--exact", "--energy", "0.97"): "--energy 0.97 is above the --max-energy 0.95 of the build",
        (*here, "--max-energy", "1.5"): "--max-energy is 1.5: expected a share above 0 and at most 1",
        (*here, "--lora-rank", "0"): "--lora-rank is 0: expected 1 or more",
        (*here, "--gpu-memory", "0"): "--gpu-memory is 0: expected GiB, a number above 0",
        (*here, "--gpu-memory", "nan"): "--gpu-memory is nan: expected GiB",
        (*here, "--device", "nonsense"): "torch cannot use the --device 'nonsense' here; try cpu",
        (*here, "--projectors", "nowhere"): "there is no projector cache in nowhere",
        (*here, "--projectors", cache.folder, "--max-energy", "0.9"): "and --exact have no effect",
        (*here, "--projectors", cache.folder, "--exact"): "--max-energy and --exact have no effect",
        (*here, "--energy", "0.5"): "is above the --max-energy 0.4 of the build",
        (*here, "--projectors", cache.folder, "--energy", "0.99"): "is above the 0.9",
        ("--aligned", headers(tmp_path / "o", other, 2), "--projectors", cache.folder):
            "was made for another model: it has model.layers.0.self_attn.q_proj as (96, 96)",
        ("--aligned", headers(tmp_path / "one", SHAPES, 1), "--projectors", cache.folder):
            "has no linear layer model.layers.1.",
        (): "the following arguments are required: --aligned",
    }  # fmt: skip
    for options, sentence in cases.items():
        code, out, error = run(*options)
        assert (code, out) == (2, "") and sentence in error, (options, error)


def test_a_quantised_or_damaged_checkpoint_is_refused(tmp_path: Path, run: Run) -> None:
    folder = headers(tmp_path / "int8", SHAPES, 1)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"BF16"', b'"I8"  '))
    code, _, error = run("--aligned", folder)
    assert code == 2 and "is I8; expected one of" in error and "Give the unquantised checkpoint" in error
    file.write_bytes(b"\x80\x02}" + bytes(20))
    code, _, error = run("--aligned", folder)
    assert code == 2 and "is not a whole safetensors file" in error
    file.write_bytes(b"\x10")
    assert run("--aligned", folder)[0] == 2


def test_a_damaged_cache_is_refused(pair: Pair, tmp_path: Path, run: Run, cache: sl.ProjectorCache) -> None:
    folder = Path(shutil.copytree(cache.folder, tmp_path / "cache"))
    (file,) = folder.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    code, _, error = run("--aligned", pair.aligned, "--projectors", folder)
    assert code == 2 and "cannot be used" in error
    with pytest.raises(PolicyError):
        sl.plan_projectors(pair.aligned, sl.Policy(number=3))
    with pytest.raises(UsageError, match="`gpu_memory` is 0"):
        sl.plan_projectors(pair.aligned, gpu_memory=0)
