"""Words for adapters, treatments and figures in RESULTS.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from adapters import KINDS
from exam import OPINION, REFUSED

Table = Mapping[str, Any]
PAIRS = {"smollm2": "(a) SmolLM2", "gemma3": "(b) Gemma", "smollm2-lora": "(c) SmolLM2, alignment of rank 16"}
_METHODS = {
    "both": "input removal 0.1, then Safe LoRA",
    "centred-removal": "centred oblique removal",
    "csulora": "CSULoRA",
    "early-values": "input removal, v_proj of the first two thirds of the layers,",
    "guided-removal": "input removal by groups of modules, loyalty drop ≤",
    "input-removal": "input removal",
    "mean-removal": "mean-input removal",
    "random-removal": "random removal",
    "safe-lora": "Safe LoRA",
    "scaling": "scaled by",
    "selective-removal": "input removal 0.4, least similar",
    "threshold": "Safe LoRA, τ =",
}


def title(adapter: str) -> str:
    """An adapter in words."""
    kind, _, shape = adapter.rpartition("-")
    return f"{KINDS[kind].title}, {'q and v, r = 8' if shape == 'qv' else 'all linear, r = 16'}"


def words(treatment: str) -> str:
    """A treatment in words."""
    method, _, strength = treatment.rpartition("-")
    if treatment == "raw-0":
        return "as uploaded"
    if treatment in (REFUSED, OPINION):
        return treatment
    if method == "opinion":
        return f"second opinion, {strength} tokens"
    if treatment == "mean-removal-1":
        return _METHODS[method]
    if treatment == "safe-lora-1":
        return "Safe LoRA, all modules"
    if method in ("safe-lora", "selective-removal", "both"):
        return f"{_METHODS[method]}, {float(strength):.0%} of modules".replace("%", " %")
    return f"{_METHODS[method]} {1.0 - float(strength) if method == 'scaling' else float(strength):g}"


def cell(figure: Table) -> str:
    """A mean with its interval."""
    mean, low, high = (number(figure[end]) for end in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def number(value: float) -> str:
    """Hundredths with a true minus sign; no minus before a rounded zero."""
    text = f"{value:.2f}"
    return text.removeprefix("-") if not float(text) else text.replace("-", "−")


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
