"""Modules that are judged together: the same answer as one by one, in a fixed number of operators."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from safelora_vllm.exam.ladder import parse
from safelora_vllm.methods import METHODS, judge, lowrank
from safelora_vllm.methods.judge import JudgedModule, grouped
from safelora_vllm.methods.reads import parts_read
from safelora_vllm.policy import Policy
from safelora_vllm.projectors.cache import ProjectorCache
from tests import reference
from tests.module_delta import ModuleDelta
from tests.tiny import Pair, key, lora, module_shapes

CPU = torch.device("cpu")
Q0 = "model.layers.0.self_attn.q_proj"
# The products with the bases are float32, up to 6e-8 per value in sums of another order, and so is what is
# served. All other sums are float64.
_SAME = 1e-6
POLICIES = [
    Policy(method=method, select=select, threshold=0.4, number=6, energy=0.6, mode=mode)
    for method in METHODS
    for select in ("all", "threshold", "number")
    for mode in ("enforce", "report-only")
]


def adapter(rank: int = 4, seed: int = 7) -> dict[str, tuple[Tensor, Tensor]]:
    """Module → A and B, of all modules in order."""
    tensors = lora(rank=rank, seed=seed)
    return {name: (tensors[key(name, "A")], tensors[key(name, "B")]) for name in sorted(module_shapes())}


def together(
    weights: dict[str, tuple[Tensor, Tensor]],
    cache: ProjectorCache,
    policy: Policy,
    dtype: torch.dtype = torch.float32,
) -> dict[str, JudgedModule]:
    """Module → the answer."""
    return {module.entry.name: module for module in judge.judge(weights, cache, policy, CPU, dtype)}


@pytest.fixture(params=[0, 40_000, 2**40], ids=["alone", "some", "all"])
def _size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes of a group: one module, some, and all of one shape."""
    monkeypatch.setattr(judge, "_CPU_BYTES", request.param)


@pytest.mark.usefixtures("_size")
@pytest.mark.parametrize("loaded", [True, False])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: f"{p.method}-{p.select}-{p.mode}")
def test_the_answer_is_that_of_each_module_by_itself(
    policy: Policy, loaded: bool, build_cache: Callable[[str, str], Path]
) -> None:
    cache, alone = (ProjectorCache(build_cache("bfloat16", "auto")) for _ in range(2))
    if loaded:
        cache.load("cpu", None, **dataclasses.asdict(parts_read(policy, cache.thin)))
    weights = adapter()
    deltas = {name: ModuleDelta(a, b, alone.projector(name)) for name, (a, b) in weights.items()}
    stats = {name: delta.stats(parts_read(policy, cache.thin)) for name, delta in deltas.items()}
    selected = policy.selects({name: s.similarity for name, s in stats.items()}).projected
    found = together(weights, cache, policy)
    assert list(found) == list(weights) and len(selected) > 0
    for name, module in found.items():
        delta, came = deltas[name], module.came
        assert module.projected == (name in selected) and module.rank == 4
        assert came.norm == pytest.approx(stats[name].norm, rel=1e-14)
        assert came.coherence == pytest.approx(stats[name].coherence, rel=1e-14)
        assert came.similarity == pytest.approx(stats[name].similarity, abs=1e-6)
        a, b = METHODS[policy.method].project(delta, policy) if name in selected else (delta.a, delta.b)
        assert module.served == pytest.approx(delta.served(a, b), rel=1e-6)
        expected = reference.product(*((a, b) if policy.enforcing else (delta.a, delta.b)))
        difference = reference.product(module.a, module.b) - expected
        # bfloat16 projectors: the products themselves are rounded to 8 bits, but from the same values.
        assert reference.ratio(difference, expected) < _SAME


@pytest.mark.usefixtures("_size")
@pytest.mark.parametrize("energy", [0.2, 0.6, 0.9])
def test_groups_remove_what_the_float64_formula_does(
    energy: float, cache: ProjectorCache, pair: Pair
) -> None:
    loaded = ProjectorCache(cache.folder)
    loaded.load("cpu", None, 0.6, 0.6, False)  # fewer and more directions than those that are held
    for rank in (1, 4, 40):  # 40: more than some sides have
        weights = adapter(rank)
        for name, module in together(weights, loaded, Policy(energy=energy)).items():
            expected = reference.removed(pair.v(name), *weights[name], energy)
            original = reference.product(*weights[name])
            # The basis and what is served are float32, see test_methods.py.
            assert reference.ratio(reference.product(module.a, module.b) - expected, original) < 2e-6
            assert (module.a.shape, module.b.shape) == tuple(side.shape for side in weights[name])


@pytest.mark.usefixtures("_size")
def test_modules_of_other_ranks_and_some_modules_only(cache: ProjectorCache, pair: Pair) -> None:
    narrow, wide = adapter(2), adapter(6)
    weights = {
        name: (narrow if index % 2 else wide)[name]
        for index, name in enumerate(module_shapes())
        if index != 3
    }
    found = together(weights, cache, Policy())
    assert list(found) == list(weights)
    for name, module in found.items():
        expected = reference.removed(pair.v(name), *weights[name], 0.2)
        assert module.rank == module.a.shape[0] == weights[name][0].shape[0]
        assert reference.ratio(reference.product(module.a, module.b) - expected, expected) < 2e-6


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: f"{p.method}-{p.select}-{p.mode}")
def test_a_delta_of_zero_among_others_stays_as_it_is(policy: Policy, cache: ProjectorCache) -> None:
    weights = adapter()
    weights[Q0] = weights[Q0][0], torch.zeros(96, 4)
    found = together(weights, cache, policy)
    zero = found[Q0]
    assert zero.similarity is None and not zero.projected and zero.served == (None, 1.0)
    # As it came, up to the powers of two that go from one side to the other.
    assert not zero.b.any() and zero.a.any()
    plain = together({name: pair for name, pair in weights.items() if name != Q0}, cache, policy)
    for name, module in plain.items():
        if policy.select != "number":
            assert module.projected == found[name].projected
            whole = [reference.product(m.a, m.b) for m in (found[name], module)]
            assert reference.ratio(whole[0] - whole[1], whole[1]) < _SAME  # the group is another one


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_module_that_is_not_finite_spoils_no_other(bad: float, method: str, cache: ProjectorCache) -> None:
    weights, policy = adapter(), Policy(method=method, select="all", energy=0.6)
    plain = together(weights, cache, policy)
    b = weights[Q0][1].clone()
    b[1, 1] = bad
    found = together({**weights, Q0: (weights[Q0][0], b)}, cache, policy)
    assert not math.isfinite(found[Q0].came.norm)
    for name, module in found.items():
        if name != Q0:
            assert (module.came, module.served) == (plain[name].came, plain[name].served)
            assert torch.equal(module.a, plain[name].a) and torch.equal(module.b, plain[name].b)


class Operators(TorchDispatchMode):
    """Counts operators that are no views."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a value is read from the device"
        result = func(*args, **(kwargs or {}))
        self.count += not (func.is_view and shares_memory(result, args[0]))
        return result


def shares_memory(result: Any, source: Any) -> bool:
    """Whether nothing was computed: ``to`` and ``reshape`` copy only where they have to."""
    return (
        not isinstance(result, Tensor)
        or result.untyped_storage().data_ptr() == source.untyped_storage().data_ptr()
    )


@contextmanager
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The methods by which the host reads values of a tensor."""
    seen: list[str] = []
    with monkeypatch.context() as patch:
        for name in ("tolist", "item", "__float__", "__bool__", "__int__"):
            inner = getattr(Tensor, name)
            patch.setattr(Tensor, name, lambda x, name=name, inner=inner: seen.append(name) or inner(x))
        yield seen


# Selecting by number measures everything first, as nothing else does.
@pytest.mark.parametrize(
    ("policy", "operators", "waits"),
    [
        (Policy(), 105, 1),
        (Policy(method="safe-lora", select="all"), 60, 1),
        (Policy(method="safe-lora"), 60, 2),
        (Policy(method="csulora"), 161, 1),
        (Policy(select="number"), 180, 2),
    ],
    ids=lambda value: f"{value.method}-{value.select}" if isinstance(value, Policy) else str(value),
)
def test_operators_and_waits_do_not_depend_on_the_number_of_modules(
    policy: Policy, operators: int, waits: int, cache: ProjectorCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge, "_CPU_BYTES", 2**40)
    loaded = ProjectorCache(cache.folder)
    loaded.load("cpu", None, **dataclasses.asdict(parts_read(policy, cache.thin)))
    weights = adapter()
    groups = len(grouped(weights, loaded, 2**40))
    assert groups == 4  # shapes: q and o, k and v, gate and up, down
    applied = (
        4 * len(weights) if parts_read(policy, cache.thin).operator else 0
    )  # Ĉ or V of a module is applied alone
    together(weights, loaded, policy)  # spectra are kept
    with reads(monkeypatch) as seen, torch.inference_mode(), Operators() as counted:
        together(weights, loaded, policy)
    assert len(seen) == waits * groups
    assert counted.count <= operators * groups + applied, counted.count / groups


@pytest.mark.parametrize("kind", ["exact", "thin"])
def test_where_no_module_is_selected_nothing_is_read(
    kind: str, cache: ProjectorCache, thin: ProjectorCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a server whose memory was planned for another policy, as on the first rung of many ladders."""
    (policy,) = parse("as-uploaded", Policy())
    loaded = ProjectorCache((thin if kind == "thin" else cache).folder)
    loaded.load("cpu", None, **dataclasses.asdict(parts_read(Policy(), loaded.thin)))
    weights = adapter()
    expected = together(weights, loaded, Policy(mode="report-only"))
    monkeypatch.setattr(loaded._shards, "read", lambda *_: pytest.fail("read"))
    found = together(weights, loaded, policy)
    assert list(found) == list(weights) and not any(module.projected for module in found.values())
    for name, module in found.items():
        assert torch.equal(module.a, expected[name].a) and torch.equal(module.b, expected[name].b)
        assert module.similarity == (0.5, 0.5), "anything from 0 to 1"
        assert (module.served.retained, module.came.norm) == (1.0, expected[name].came.norm)


@pytest.mark.parametrize("nbytes", [0, 5_000, 40_000, 10**9])
def test_groups_are_bounded(nbytes: int, cache: ProjectorCache) -> None:
    weights = adapter()
    groups = grouped(weights, cache, nbytes)
    assert sorted(name for names in groups for name in names) == sorted(weights)
    for names in groups:
        assert len({cache.modules[name].shape for name in names}) == 1
        size = sum(side.nbytes for name in names for side in weights[name])
        assert len(names) == 1 or size <= nbytes


def test_tensors_go_to_the_host_as_one() -> None:
    tensors = [torch.randn(3, 5).double(), torch.randn(2, 3).T, torch.randn(4, 1, 2).bfloat16()]
    packed = judge.packed(tensors)
    assert packed.dtype == torch.uint8 and packed.shape == (3 * 5 * 8 + 6 * 4 + 8 * 2,)
    for found, expected in zip(judge.unpacked(packed, tensors), tensors, strict=True):
        assert found.dtype == expected.dtype and torch.equal(found, expected)


@given(
    d_out=st.integers(1, 48), d_in=st.integers(1, 48), ranks=st.integers(1, 24), lost=st.integers(0, 8),
    power=st.integers(-100, 100), seed=st.integers(0, 2**32),
)  # fmt: skip
def test_orthonormal_keeps_the_product_and_has_ranks_that_cannot_cancel(
    d_out: int, d_in: int, ranks: int, lost: int, power: int, seed: int
) -> None:
    """Also where B has fewer ranks than columns, or columns of zeros, as padded adapters have."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(2, ranks, d_in, generator=generator).double()
    b = torch.randn(2, d_out, ranks, generator=generator).double() * 2.0**power
    b[0, :, : min(lost, ranks)] = 0.0
    b[1, :, : min(lost, ranks)] = b[1, :, -1:]
    new_a, new_b = lowrank.orthonormal(a, b, lowrank.gram(b.mT))
    assert (new_a.shape, new_b.shape) == (a.shape, b.shape)
    for i in range(2):
        whole = b[i].norm() * a[i].norm()
        # Float64 on both sides; the shift adds nothing to the product.
        assert float((new_b[i] @ new_a[i] - b[i] @ a[i]).norm()) <= 1e-13 * float(whole)
        squared, root = lowrank.norm_sums(lowrank.gram(new_b[i].mT), lowrank.gram(new_a[i])).tolist()
        assert lowrank.coherence(squared, root**2) >= 1 / ranks - 1e-9 or squared < 1e-20 * float(whole) ** 2


def test_the_bases_of_a_group_are_those_of_its_modules(cache: ProjectorCache) -> None:
    """Of neighbours, of others, and whether they are held in one tensor or not."""
    whole, part, none = (ProjectorCache(cache.folder) for _ in range(3))
    whole.load("cpu")
    part.load("cpu", None, 0.3, 0.3, False)
    names = [name for name, shape in module_shapes().items() if shape == (96, 96)]
    for opened in (whole, part, none):
        for chosen in (names, names[:1], [names[0], names[-1]], names[::-1]):
            group = opened.group(chosen)
            for energy in (0.0, 0.2, 0.3, 0.9):
                counts = [cache.projector(name).directions(energy) for name in chosen]
                for basis in ("input_basis", "output_basis"):
                    found = getattr(group, basis)(energy) * group.taken(energy)
                    assert found.shape == (len(chosen), 96, max(counts))
                    for name, columns, count in zip(chosen, found, counts, strict=True):
                        assert torch.equal(columns[:, :count], getattr(cache.projector(name), basis)(energy))
                        assert not columns[:, count:].any()


# How a process may have set the precision of its products, and what it then asks.
_PRECISIONS = {
    "nothing": "pass",
    "medium": "torch.set_float32_matmul_precision('medium')",
    "high": "torch.set_float32_matmul_precision('high')",
    "allow_tf32": "matmul.allow_tf32 = True",
    "of CUDA": "matmul.fp32_precision = 'tf32'",
    "of all": "torch.backends.fp32_precision = 'tf32'",
    "sums": "matmul.allow_bf16_reduced_precision_reduction = False",
}
_TOLD = """
import torch
from safelora_vllm.methods.judge import exact_products

matmul = torch.backends.cuda.matmul


def asked():
    found = [matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction]
    found += [matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision]
    try:
        return [*found, torch.get_float32_matmul_precision()]
    except RuntimeError:  # torch itself, where both of its interfaces were used
        return [*found, "mixed"]


SETTING
before = asked()
try:
    with exact_products(), exact_products():
        inside = asked()
        raise ValueError
except ValueError:
    pass
after = asked()
assert inside[:4] == [False, False, "ieee", "ieee"], inside
assert before == after, (before, after)
"""


@pytest.mark.parametrize("setting", _PRECISIONS.values(), ids=_PRECISIONS)
def test_products_are_exact_whatever_the_process_has_set(setting: str) -> None:
    """With TF32 a thousand times as much of the removed inputs stays, as a GPU has shown."""
    code = _TOLD.replace("SETTING", setting)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_adapters_are_judged_with_exact_products(
    cache: ProjectorCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    depth, seen = [0], []
    inner = METHODS["input-removal"].project

    @contextlib.contextmanager
    def exact() -> Iterator[None]:
        depth[0] += 1
        yield
        depth[0] -= 1

    def project(*given: Any) -> Any:
        seen.append(depth[0])
        return inner(*given)

    method = dataclasses.replace(METHODS["input-removal"], project=project)
    monkeypatch.setitem(METHODS, "input-removal", method)
    monkeypatch.setattr(judge, "exact_products", exact)
    for select in ("all", "number"):
        together(adapter(), cache, Policy(select=select))
    assert set(seen) == {1} and depth == [0]


@pytest.mark.parametrize("power", [0, 10, 60, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_huge_column_that_does_nothing_hides_no_other(power: int, dtype: torch.dtype) -> None:
    """Its row of A is zero. Against it all other ranks would seem to depend on others, and stay as they came:
    two that nearly cancel would then be rounded to what their author chose.
    """
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(3, 64, generator=generator).double()
    a[2] = -a[1] + 1e-3 * torch.randn(64, generator=generator).double()
    a[0] = 0.0
    b = torch.zeros(64, 3).double()
    b[1:, 1:] = 2.0**-5
    b[0, 0] = 2.0**power
    new_a, new_b = lowrank.orthonormal(a, b, lowrank.gram(b.mT))
    squared, root = lowrank.norm_sums(lowrank.gram(new_b.mT), lowrank.gram(new_a)).tolist()
    assert lowrank.coherence(squared, root**2) > 0.3
    served = new_b.to(dtype).double() @ new_a.to(dtype).double()
    assert reference.ratio(served - b @ a, b @ a) < (1e-2 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("policy", [Policy(energy=0.9), Policy(method="csulora")], ids=lambda p: p.method)
def test_copies_of_bases_bound_a_group_too(policy: Policy, cache: ProjectorCache) -> None:
    """Their size does not depend on the rank: of rank 1 all modules would go together."""
    parts, weights = parts_read(policy, cache.thin), adapter(1)
    nbytes = 50_000
    for names in grouped(weights, cache, nbytes, parts):
        copies = 0
        for name in names:
            (d_out, d_in), projector = cache.modules[name].shape, cache.projector(name)
            copies = max(copies, 4 * d_in * projector.directions(parts.input_energy)
                         + 8 * d_out * projector.directions(parts.output_energy))  # fmt: skip
        assert len(names) == 1 or len(names) * copies <= judge._BASES * nbytes
    assert len(grouped(weights, cache, nbytes, parts)) > len(grouped(weights, cache, nbytes))


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: f"{p.method}-{p.select}-{p.mode}")
def test_a_warm_up_judges_the_largest_group_of_each_shape_at_each_rank(
    policy: Policy, cache: ProjectorCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged: list[tuple[int, tuple[int, int], int]] = []
    inner = judge.judge

    def watched(weights: Any, opened: Any, *others: Any) -> Any:
        shapes = {opened.modules[name].shape for name in weights}
        ranks = {side.shape[0] for side, _ in weights.values()}
        assert len(shapes) == len(ranks) == 1
        assert not any(side.any() for pair in weights.values() for side in pair)
        judged.append((*ranks, *shapes, len(weights)))
        return inner(weights, opened, *others)

    monkeypatch.setattr(judge, "judge", watched)
    monkeypatch.setattr(judge, "_CPU_BYTES", 40_000)
    judge.warm_up(cache, policy, CPU, torch.bfloat16, 32)
    apart = {name for names in cache.in_groups(cache.modules) for name in names[::2]}
    expected = set()
    for rank in (1, 16, 32):
        sides = {name: pair for name, pair in adapter(rank).items() if rank > 1 or name in apart}
        sizes: dict[tuple[int, int], int] = {}
        for names in grouped(sides, cache, 40_000, parts_read(policy, cache.thin)):
            shape = cache.modules[names[0]].shape
            sizes[shape] = max(sizes.get(shape, 0), len(names))
        expected |= {(rank, shape, count) for shape, count in sizes.items()}
    assert set(judged) == expected and len(judged) == len(expected)


@pytest.mark.parametrize(("largest", "ranks"), [(4, {1, 4}), (16, {1, 16}), (17, {1, 16, 17})])
def test_a_warm_up_takes_no_larger_rank_than_is_accepted(
    largest: int, ranks: set[int], cache: ProjectorCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[int] = set()

    def watched(weights: Any, *_: Any) -> None:
        seen.update(a.shape[0] for a, _ in weights.values())

    monkeypatch.setattr(judge, "judge", watched)
    judge.warm_up(cache, Policy(), CPU, torch.bfloat16, largest)
    assert seen == ranks
