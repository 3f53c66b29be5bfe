"""What is certain with a thin cache, of exact and of approximate directions, against dense float64 matrices.

Nothing is larger than Ĉ leaves it, but for a bound; and no module is left alone that the exact similarity
would not leave alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from safelora_vllm.methods.judge import judge
from safelora_vllm.policy import Policy
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.projectors.manifest import WHOLE
from safelora_vllm.projectors.projector import Projector
from safelora_vllm.projectors.subspace import CONVERGED
from tests import reference
from tests.module_delta import ModuleDelta
from tests.test_certified import adapters
from tests.tiny import Pair, module_shapes

# Of directions, see `subspace.CONVERGED`; ∞ stops as soon as the energy is held.
CONVERGENCE = {"converged": CONVERGED, "unconverged": math.inf}
CACHES = [(kind, energy) for kind in ("exact", *CONVERGENCE) for energy in (0.1, 0.4)] + [("exact", 0.95)]
CPU = torch.device("cpu")
# C_k B is a float32 product of float32 bases, and what is served is float32: each errs by a few 2⁻²⁴.
ROUNDING = 1e-6


@pytest.fixture(params=CACHES, ids=lambda p: f"{p[0]}-{p[1]}")
def cache(
    request: pytest.FixtureRequest,
    thin_at: Callable[[float], ProjectorCache],
    approximate_at: Callable[[float, float], ProjectorCache],
) -> ProjectorCache:
    """A thin cache, most of whose modules have directions of that kind."""
    kind, energy = request.param
    if kind == "exact":
        return thin_at(energy)
    found = approximate_at(energy, CONVERGENCE[kind])
    assert sum(entry.following < 1.0 for entry in found.modules.values()) >= len(module_shapes()) // 2
    return found


def truncated(projector: Projector) -> Tensor:
    """C_k in float64, from what the cache has."""
    left = projector.output_basis(WHOLE).double()
    return (left * projector.spectrum(WHOLE).sizes) @ left.T * projector.entry.norm


def worst(cut: Tensor, operator: Tensor, a: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Adapters of one output direction: those where ‖C_k b‖ is above ‖Ĉ b‖ by most, if it is at all."""
    vectors = torch.linalg.eigh(cut @ cut - operator @ operator).eigenvectors
    for column in (-1, -2):
        yield a[:1], vectors[:, column, None].float()


def test_safe_lora_leaves_no_more_than_the_operator_does(cache: ProjectorCache, pair: Pair) -> None:
    """‖C_k B A‖ ≤ ‖Ĉ B A‖ + f ‖V‖_F ‖B A‖, in the Frobenius norm and for every input; f of the spectrum."""
    policy = Policy(method="safe-lora", select="all")
    generator, above = torch.Generator().manual_seed(1), 0
    for index, name in enumerate(module_shapes()):
        v, projector = pair.v(name), cache.projector(name)
        operator, cut = reference.operator(v), truncated(projector)
        spectrum, norm = projector.spectrum(WHOLE), float(torch.linalg.matrix_norm(v))
        assert (spectrum.residual > 0) == (projector.entry.following < 1.0)
        of_adapters = list(adapters(v, index))
        for a, b in [*of_adapters, *worst(cut, operator, of_adapters[0][0])]:
            delta = ModuleDelta(a, b, projector)
            (found,) = judge({name: (a, b)}, cache, policy, CPU, torch.float32)
            came, served = reference.product(delta.a, delta.b), reference.product(found.a, found.b)
            whole = operator @ came
            scale = float(delta.b.double().norm() * delta.a.double().norm())
            error = ROUNDING * scale * float(torch.linalg.matrix_norm(operator, 2))
            most = spectrum.residual * norm
            assert float((served - cut @ came).norm()) <= error
            assert float(served.norm()) <= float(whole.norm() + most * came.norm()) + error
            above += float(served.norm()) > float(whole.norm()) + error
            inputs = torch.randn(came.shape[1], 8, generator=generator, dtype=torch.float64)
            slack = most * (came @ inputs).norm(dim=0) + error * inputs.norm(dim=0)
            assert ((served @ inputs).norm(dim=0) <= (whole @ inputs).norm(dim=0) + slack).all()
            left_out = came - projector.output_basis(WHOLE).double() @ (
                projector.output_basis(WHOLE).double().T @ came
            )
            taken = spectrum.following * norm * left_out.norm() + most * came.norm()
            assert float((whole - served).norm()) <= float(taken) + error
            assert found.served.retained is not None
            ratio = reference.ratio(whole, came) + most
            assert found.served.retained <= ratio * (1 + 1e-6) + error / came.norm()
    approximate = any(cache.projector(name).spectrum(WHOLE).residual for name in cache.modules)
    assert (above > 0) == approximate  # without f it would be no bound


@pytest.mark.parametrize("method", ["safe-lora", "input-removal"])
def test_no_module_is_left_alone_that_the_exact_similarity_would_not_leave_alone(
    method: str, cache: ProjectorCache, pair: Pair
) -> None:
    """Thousands of modules of random, leaning and adversarial adapters, by threshold and by number."""
    uncertain, kept, compared = 0, 0, 0
    energy = min(float(cache.projector(name).energies[-1]) for name in cache.modules)
    kinds = {name: list(adapters(pair.v(name), 0)) for name in module_shapes()}
    for kind in range(min(map(len, kinds.values()))):
        weights = {name: pairs[kind] for name, pairs in kinds.items()}
        values = {}
        for name, (a, b) in weights.items():  # of the weights as they are measured, balanced and rounded
            delta = ModuleDelta(a, b, cache.projector(name))
            values[name] = reference.similarity(pair.v(name), delta.a, delta.b)
        for policy in (
            *(Policy(method=method, select="threshold", threshold=x) for x in (0.2, 0.35, 0.5, 0.8)),
            *(Policy(method=method, select="number", number=x) for x in (1, 5, 10)),
        ):
            if policy.has_effect("energy") and policy.energy > energy:
                policy = dataclasses.replace(policy, energy=0.1)
            found = judge(weights, cache, policy, CPU, torch.float32)
            exact = {n for n, v in values.items() if v <= policy.threshold}
            if policy.select == "number":
                exact = set(sorted(values, key=lambda n: (values[n], n))[: policy.number])
            chosen = {module.entry.name for module in found if module.projected}
            marked = {module.entry.name for module in found if module.uncertain}
            assert exact <= chosen and marked <= chosen
            assert chosen - marked <= exact
            uncertain, kept = uncertain + len(marked), kept + len(values) - len(chosen)
            compared += len(values)
    assert compared > 1300 and uncertain > 0
    assert kept > 100 or energy < 0.95  # where the intervals are narrow, modules are left alone
