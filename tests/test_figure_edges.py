"""The figures of a delta at the ends of their ranges, and the interval of a similarity to its last term."""

from __future__ import annotations

import contextlib
import math
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from safelora_vllm.methods import lowrank
from safelora_vllm.methods.certified import interval
from safelora_vllm.methods.delta import InputStats
from safelora_vllm.methods.input_removal import energy_that_keeps, largest_energy
from safelora_vllm.methods.method import Option, Spread
from safelora_vllm.methods.selection import Interval
from safelora_vllm.projectors import exact_products as products
from safelora_vllm.projectors.projector import Projector, Spectrum

SPECTRUM = Spectrum(torch.tensor([0.5, 0.25, 0.125], dtype=torch.float64), 0.573, 0.0625)
NAN, INF = math.nan, math.inf


def stated(n: float, d_squared: float, inside: float, coherence: float) -> tuple[float, float]:
    """The docstring's two ends, each moved outwards by what rounding can do to its terms.

    Each √x_i is off by 2⁻²³/√coherence at most: D by that times ‖w‖, and Σx_i and N by twice that times √k.
    """
    rounding = 2.0**-23 / math.sqrt(coherence)
    d, slack_d, slack_q = math.sqrt(d_squared), rounding * 0.573, 2 * rounding * math.sqrt(3)
    slack = (d * slack_q + slack_d) / (d - slack_d)
    q, t = min(1.0, max(0.0, 1.0 - inside) + slack_q), 0.0625
    low = max(0.0, n / d - slack)
    high = min(1.0, (n + t * q) / math.sqrt(d_squared + t * t * q) + slack)
    return low, high


@pytest.mark.parametrize("coherence", [1.0, 1e-3, 1e-8])
@pytest.mark.parametrize("inside", [0.0, 0.3, 1.0, 1.0 + 1e-9])
@pytest.mark.parametrize(("n", "d_squared"), [(0.2, 0.1), (0.05, 0.01), (0.3, 0.09), (0.0, 0.01)])
def test_the_interval_to_its_last_term(n: float, d_squared: float, inside: float, coherence: float) -> None:
    """Of a delta with ‖BA‖² = 4. The terms of rounding are far above the tolerance, that of float64 sums."""
    low, high = stated(n, d_squared, inside, coherence)
    found = interval((4 * n, 4 * d_squared, 4 * inside), 4.0, coherence, SPECTRUM)
    assert found.middle - found.error == pytest.approx(low, abs=1e-14)
    assert found.middle + found.error == pytest.approx(high, abs=1e-14)


@pytest.mark.parametrize("wrong", range(4))
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_no_interval_of_what_is_not_finite(wrong: int, bad: float) -> None:
    figures = [0.1, 0.1, 0.5, 1.0]
    figures[wrong] = bad
    assert all(map(math.isnan, interval(figures[:3], figures[3], 1.0, SPECTRUM)))


def test_nothing_is_known_of_what_has_no_direction_or_none_in_the_basis() -> None:
    nothing = Interval(0.5, 0.5)
    assert interval((0.0, 0.0, 0.0), 0.0, 1.0, SPECTRUM) == nothing
    assert interval((0.0, 0.0, 0.0), 1.0, 1.0, SPECTRUM) == nothing
    edge = 2.0**-23 * SPECTRUM.norm
    assert interval((0.1, edge**2, 0.5), 1.0, 1.0, SPECTRUM) == nothing
    assert interval((-1e-12, -1e-12, -1e-12), 1.0, 1.0, SPECTRUM) == nothing


@pytest.mark.parametrize(
    ("sums", "expected"),
    [((4.0, 2.0, 9.0), 2 / 6), ((4.0, 100.0, 9.0), 1.0), ((4.0, -100.0, 9.0), -1.0), ((0.0, 0.0, 9.0), 0.0),
     ((4.0, 0.0, 0.0), None), ((0.0, 0.0, 0.0), None)],
)  # fmt: skip
def test_a_cosine(sums: tuple[float, float, float], expected: float | None) -> None:
    assert lowrank.cosine(*sums) == expected


@pytest.mark.parametrize("sums", [(INF, 1.0, 1.0), (1.0, NAN, 1.0), (1.0, INF, 1.0), (1.0, 1.0, NAN)])
def test_a_cosine_of_what_is_not_finite(sums: tuple[float, float, float]) -> None:
    found = lowrank.cosine(*sums)
    assert found is not None and math.isnan(found)


def test_coherence_is_one_for_nothing() -> None:
    """So that a module of zeros is not refused for ranks that cancel."""
    assert (lowrank.coherence(0.0, 0.0), lowrank.coherence(0.0, 2.0), lowrank.coherence(1.0, 4.0)) == (
        1,
        0,
        0.25,
    )


def test_figures_of_weights_as_they_came() -> None:
    usual = InputStats.of((4.0, 3.0), (1.0, 1.0), None)
    assert (usual.norm, usual.coherence, usual.similarity) == (2.0, 4 / 9, Interval(0.5, 0.0))
    assert usual.unchanged == (1.0, 4 / 9)
    assert usual.served(1.0, 2.0) == (0.5, 0.25) and usual.served(-1e-20, 2.0) == (0.0, 0.0)
    nothing = InputStats.of((0.0, 0.0), (0.0, 0.0), None)
    assert (nothing.norm, nothing.coherence, nothing.similarity) == (0.0, 1.0, None)
    assert nothing.unchanged == (None, 1.0) and nothing.served(0.0, 0.0) == (None, 1.0)
    cancelling = InputStats.of((0.0, 3.0), (0.0, 0.0), None)
    assert cancelling.similarity == Interval(0.0, 0.0), "its ranks are not zero: it does change something"
    assert InputStats.of((-1e-20, 3.0), (-1e-20, 0.0), None).norm == 0.0
    endless = InputStats.of((INF, 3.0), (1.0, 1.0), None)
    assert endless.norm == INF and endless.similarity is not None and math.isnan(endless.similarity.middle)
    assert math.isnan(InputStats.of((NAN, 3.0), (1.0, 1.0), None).norm)
    certified = InputStats.of((4.0, 3.0), (0.8, 0.4, 1.2), SPECTRUM)
    assert certified.similarity == interval((0.8, 0.4, 1.2), 4.0, 4 / 9, SPECTRUM)


def test_balanced_factors_are_as_large_as_each_other_and_have_their_product() -> None:
    a = torch.tensor([[2.0**100, -(2.0**90)], [-(2.0**-60), 0.0], [0.0, 0.0]])
    b = torch.tensor([[2.0**-20, 2.0**40, 3.0], [1.0, -1.0, 5.0]])
    new_a, new_b = lowrank.balanced(a, b)
    assert torch.equal(new_b @ new_a, b.double() @ a.double())
    for rank in (0, 1):
        sizes = float(new_a[rank].abs().max()), float(new_b[:, rank].abs().max())
        assert 0.25 <= sizes[0] / sizes[1] <= 4.0
    assert new_a.dtype == new_b.dtype == torch.float64
    assert torch.equal(a, a.clone()) and float(a[0, 0]) == 2.0**100, "the author's own stay"


def test_what_is_not_finite_is_no_scale() -> None:
    """One bad value spoils its own rank and not the size of the others."""
    x = torch.tensor([[INF, 1.0], [NAN, 1.0]], dtype=torch.float64)
    small, scale = lowrank.unit(x)
    assert float(scale) == 1.0 and small.isfinite().sum() == 2
    for value in (-8.0, 8.0):
        assert float(lowrank.unit(torch.tensor([[value, 1.0]]))[1]) == 16.0


@pytest.mark.parametrize(("more", "mine", "theirs", "strict", "stricter"), [
    (True, 0.2, 0.1, True, 0.2), (True, 0.1, 0.2, False, 0.2), (True, 0.1, 0.1, True, 0.1),
    (False, 0.2, 0.1, False, 0.2), (False, 0.1, 0.2, False, 0.1), (False, 0.1, 0.1, True, 0.1),
])  # fmt: skip
def test_which_value_of_an_option_is_stricter(
    more: bool, mine: float, theirs: float, strict: bool, stricter: float
) -> None:
    option = Option("", more_is_stricter=more)
    assert option.at_least_as_strict(mine, theirs) is strict
    assert option.tightened(mine, theirs) == stricter


def test_a_spread() -> None:
    assert Spread.of([3.0, 1.0, 2.0, 10.0]) == Spread(1.0, 2.5, 10.0)


class Layer:
    """Of a projector what a search for a strength reads: k of its hundred inputs for each hundredth."""

    def __init__(self, name: str, share: float, kept: float = 0.95) -> None:
        self.entry: Any = SimpleNamespace(name=name, shape=(1, 100))
        self.energies = torch.tensor([kept], dtype=torch.float64)
        self._share = share

    def directions(self, energy: float) -> int:
        return round(100 * energy * self._share)


def layers(*of: Layer) -> list[Projector]:
    return list(of)  # type: ignore[arg-type]


def test_the_strength_is_that_of_the_layer_that_loses_most() -> None:
    few, many = Layer("few", 0.1), Layer("many", 1.0)
    assert energy_that_keeps(0.7, layers(few, many)) == 0.3
    assert energy_that_keeps(0.7, layers(many, few)) == 0.3
    assert energy_that_keeps(0.0, layers(many)) == energy_that_keeps(0.05, layers(many)) == 0.95
    for keep in (-0.01, 1.01, NAN):
        with pytest.raises(Exception, match="expected a share from 0 to 1"):
            energy_that_keeps(keep, layers(few))
    with pytest.raises(Exception, match=r"takes 3 of 100 directions in worst and leaves 0.9700. .* 0.97 or"):
        energy_that_keeps(1.0, layers(Layer("b", 2.0), Layer("worst", 3.0), Layer("c", 1.0)))
    assert energy_that_keeps(1.0, layers(Layer("x", 0.0))) == 0.95


@pytest.mark.parametrize(
    ("kept", "largest"), [(0.95, 0.95), (0.9599, 0.95), (0.96 - 1e-10, 0.96), (1.0 + 1e-9, 1.0)]
)
def test_the_largest_hundredth(kept: float, largest: float) -> None:
    assert largest_energy(layers(Layer("x", 1.0, 2.0), Layer("y", 1.0, kept))) == largest


def test_the_precision_of_the_process_is_its_own_again_and_one_at_a_time() -> None:
    assert isinstance(products._PRODUCTS, type(threading.RLock()))
    matmul = torch.backends.cuda.matmul
    names = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    before = {name: getattr(matmul, name) for name in names}
    held: list[bool] = []

    def try_it() -> None:
        held.append(products._PRODUCTS.acquire(blocking=False))

    try:
        for value in (True, False):
            for name in names:
                setattr(matmul, name, value)
            with contextlib.suppress(ValueError), products.exact_products():
                assert [getattr(matmul, name) for name in names] == [False, False]
                held.clear()
                other = threading.Thread(target=try_it)
                other.start()
                other.join()
                assert held == [False], "the settings are the process's"
                raise ValueError
            assert [getattr(matmul, name) for name in names] == [value, value]
    finally:
        for name, value in before.items():
            setattr(matmul, name, value)
