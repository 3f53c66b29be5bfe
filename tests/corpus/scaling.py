"""How large the delta is and where it points: scales, pre-inversion, dominant directions, backdoors."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tests.corpus.cancelling import forged, opposite_ends
from tests.corpus.case import Hostile, Make, Spoil, config, made, spoiled
from tests.corpus.target import SCALE, Target, sound
from tests.corpus.tensors import value
from tests.tiny import Q0, Draft, key, lora_config

_A, _B = key(Q0, "A"), key(Q0, "B")
Parts = Callable[[Target, str], tuple[Tensor, Tensor]]  # (target, module) → A, B


# --- the scale


def times(a: float = 1.0, b: float = 1.0) -> Spoil:
    """A and B of every module, multiplied."""
    return lambda draft: [
        tensor.mul_(a if ".lora_A." in name else b) for name, tensor in draft.tensors.items()
    ]


def both(*spoils: Spoil) -> Spoil:
    """One after the other."""
    return lambda draft: [spoil(draft) for spoil in spoils]


def ones(draft: Draft) -> None:
    """q_proj of rank 1 and large values, whose scale the other modules' rank would divide by four."""
    draft.change(_A, torch.ones_like(draft.tensors[_A][:1]))
    draft.change(_B, torch.ones_like(draft.tensors[_B][:, :1]))


def of_q(q_scale: float) -> Callable[[str], float]:
    """Another scale for the first layer's q_proj."""
    return lambda module: q_scale if module == Q0 else SCALE


_PARTS = lora_config()["target_modules"]
_Q = "layers.0.self_attn.q_proj"
LARGE: list[tuple[str, str, Spoil]] = [
    ("alpha-10000", "relative_norm", config(lora_alpha=10_000)),
    ("alpha-1e9", "relative_norm", config(lora_alpha=1e9)),
    ("alpha-just-over", "relative_norm", config(lora_alpha=28)),  # 0.3 · 28/8 > 1
    ("alpha-1e40", "non_finite", config(lora_alpha=1e40)),
    ("alpha-1e300", "non_finite", config(lora_alpha=1e300)),
    ("rslora", "relative_norm", config(use_rslora=True, lora_alpha=16)),
    ("rank-pattern-shrinks-divisor", "relative_norm", both(ones, config(rank_pattern={_Q: 1}))),
    ("alpha-pattern", "relative_norm", config(alpha_pattern={"0.self_attn.q_proj": 1000})),
    ("alpha-pattern-1e308", "non_finite", config(alpha_pattern={"q_proj": 1e308})),
    ("alpha-pattern-first-counts", "relative_norm", config(alpha_pattern={"q_proj": 99, _Q: 8})),
    ("one-large-value", "relative_norm", value(_B, 1e6)),
    ("large-A-small-alpha", "relative_norm", both(times(a=1e9), config(lora_alpha=1e-6))),
]
SMALL: list[tuple[str, Spoil, Callable[[str], float]]] = [
    ("alpha-under-the-cap", config(lora_alpha=24), lambda _: 6.0),
    ("alpha-tiny-B-large", both(times(b=1e6), config(lora_alpha=8e-6)), lambda _: SCALE * 1e-6),
    ("rslora-under-the-cap", config(use_rslora=True), lambda _: 4.0),
    ("alpha-pattern-suffix", config(alpha_pattern={_Q: 16}), of_q(4.0)),
    ("alpha-pattern-anchored", config(alpha_pattern={f"^model.{_Q}$": 16}), of_q(4.0)),
    ("alpha-pattern-first-match", config(alpha_pattern={_Q: 16, "q_proj": 8, "proj": 99}), of_q(4.0)),
    ("alpha-pattern-no-boundary", config(alpha_pattern={"proj": 99, "roj": 99}), lambda _: SCALE),
    ("r-lies-patterns-do-not", config(r=64, rank_pattern=dict.fromkeys(_PARTS, 4)), lambda _: SCALE),
]  # fmt: skip


# --- where the delta points


def shaped_like(parts: Parts, size: float) -> Make:
    """An adapter of the scale 1, whose deltas have ``size`` times their weight's norm; 0: as they are."""

    def make(target: Target) -> Draft:
        tensors = {}
        for module, entry in target.attacked.items():
            a, b = parts(target, module)
            if size:
                b = b * (size * entry.aligned_norm / torch.linalg.matrix_norm(b @ a))
            tensors |= {key(module, "A"): a.float(), key(module, "B"): b.float()}
        rank = a.shape[0]
        return Draft(lora_config(r=rank, lora_alpha=rank), tensors)

    return make


def wanted(target: Target, module: str) -> tuple[Tensor, Tensor]:
    """A and B* that the author wants to be served: three tenths of the weight."""
    tensors = sound(target).tensors
    return tensors[key(module, "A")].double(), SCALE * tensors[key(module, "B")].double()


def inverted(least: float) -> Parts:
    """B = Ĉ⁺ B*, with those of Ĉ's eigenvalues that are at least that share of the largest."""

    def parts(target: Target, module: str) -> tuple[Tensor, Tensor]:
        a, b = wanted(target, module)
        left, sizes, _ = target.directions(module)
        kept = sizes**2 >= least * sizes[0] ** 2
        left, values = left[:, kept], sizes[kept] ** 2 / sizes.norm()
        return a, left @ ((left.T @ b) / values[:, None])

    return parts


def dominant(rank: int, inputs: bool = False) -> Parts:
    """B (and A, with ``inputs``) along V's first singular vectors."""

    def parts(target: Target, module: str) -> tuple[Tensor, Tensor]:
        left, _, right = target.directions(module)
        a = right[:rank] if inputs else wanted(target, module)[0][:rank]
        return a, left[:, :rank]

    return parts


def towards(share: float) -> Parts:
    """A random B that leans towards V's first directions."""

    def parts(target: Target, module: str) -> tuple[Tensor, Tensor]:
        a, b = wanted(target, module)
        left = dominant(4)(target, module)[1]
        return a, (1 - share) * b / b.norm() + share * left / left.norm()

    return parts


def against(target: Target, module: str) -> tuple[Tensor, Tensor]:
    """−V's first eight terms: alignment taken away where it is strongest."""
    left, sizes, right = target.directions(module)
    return right[:8], -left[:, :8] * sizes[:8]


def trigger(target: Target, module: str) -> tuple[Tensor, Tensor]:
    """One direction of the input (a trigger's) that is written to one of the output."""
    a, b = wanted(target, module)
    return a[:1], b[:, :1]


def share_of(first: bool) -> Parts:
    """Half of the ranks of a delta that does something only when both halves are merged."""

    def parts(target: Target, module: str) -> tuple[Tensor, Tensor]:
        a, b = wanted(target, module)
        return (a[:2], b[:, :2]) if first else (a[2:], b[:, 2:])

    return parts


def pointing(name: str, row: str, parts: Parts, size: float, codes: str = "") -> Hostile:
    """An adapter of the scale 1 from parts."""
    return made(name, row, codes, shaped_like(parts, size), None if codes else lambda _: 1.0)


def rebalanced(power: int) -> Hostile:
    """B·2ᵏ with A·2⁻ᵏ: the same adapter, in numbers that may not survive the projector's dtype."""
    spoil = times(math.ldexp(1, -power), math.ldexp(1, power))
    codes = "non_finite subnormal relative_norm" if abs(power) > 60 else ""
    return spoiled(f"rebalanced-by-2**{power}", "pre-inversion", codes, spoil, lambda _: SCALE)


def cancelling(hidden: float) -> Hostile:
    """`forged`, which may be served only as it was measured."""

    def make(target: Target) -> Draft:
        return forged(target.attacked, hidden)

    return made(f"cancelling-{hidden:g}", "pre-inversion", "cancellation relative_norm non_finite", make)


CASES: list[Hostile] = [
    *[spoiled(name, "scale", codes, spoil) for name, codes, spoil in LARGE],
    *[spoiled(name, "scale", "", spoil, scale) for name, spoil, scale in SMALL],
    pointing("inverted", "pre-inversion", inverted(1e-6), 0.0, "relative_norm non_finite"),
    pointing("inverted-on-the-larger-half", "pre-inversion", inverted(0.1), 0.0, "relative_norm"),
    pointing("inverted-under-the-cap", "pre-inversion", inverted(1e-6), 0.9),
    pointing("inverted-on-the-first-under-the-cap", "pre-inversion", inverted(0.9), 0.9),
    *[rebalanced(power) for power in (-110, -60, -20, 20, 60, 110)],
    *[cancelling(hidden) for hidden in (0.0, 1.0, 32.0, 4096.0)],
    spoiled("opposite-ends", "pre-inversion", "cancellation non_finite relative_norm", opposite_ends),
    pointing("along-the-first", "dominant", dominant(1), 0.9),
    pointing("along-the-first-four", "dominant", dominant(4), 0.9),
    pointing("along-both-sides", "dominant", dominant(4, inputs=True), 0.9),
    pointing("along-the-first-over-the-cap", "dominant", dominant(1), 1.1, "relative_norm"),
    pointing("half-along", "dominant", towards(0.5), 0.9),
    pointing("mostly-along", "dominant", towards(0.9), 0.9),
    pointing("minus-alignment", "dominant", against, 0.0),
    pointing("trigger", "undetectable", trigger, 0.3),
    pointing("small-trigger", "undetectable", trigger, 1e-3),
    pointing("first-of-two-colluding", "undetectable", share_of(True), 0.2),
    pointing("second-of-two-colluding", "undetectable", share_of(False), 0.2),
]
