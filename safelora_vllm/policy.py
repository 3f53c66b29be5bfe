"""What the operator decides: which method, on which modules, how strong, and whether to enforce."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from safelora_vllm.errors import PolicyError

METHOD_NAMES = ("safe-lora", "input-removal", "csulora")
SELECTIONS = ("threshold", "number", "all")
MODES = ("enforce", "audit")
DEFAULT_ENERGY = {"input-removal": 0.2, "safe-lora": 0.2, "csulora": 0.95}
_RANGES = (
    ("threshold", -1.0, 1.0),
    ("energy", 0.0, 1.0),
    ("max_relative_norm", 0.0, sys.float_info.max),
    ("max_total_norm", 0.0, sys.float_info.max),
)
_METHODS_OWN = float("nan")  # stands for the method's default; any other NaN is out of range
CAPS = ("max_relative_norm", "max_total_norm")
# Fields that only mean something together with one of another field's values.
_CONDITIONS = {
    "threshold": ("select", ("threshold",)),
    "number": ("select", ("number",)),
    "energy": ("method", ("input-removal", "csulora")),
}
_MORE = {"threshold": " (safe-lora has it by itself)"}


@dataclass(frozen=True)
class Policy:
    """The rules an adapter is judged by. Field names are those of the command-line options.

    method: ``input-removal`` (A' = A − (A R) Rᵀ, the default), ``safe-lora`` (Hsu et al. 2024, B' = Ĉ B) or
        ``csulora`` (arXiv 2605.30640, damps what is not in both L and R).
    select: ``threshold`` projects modules whose similarity is ≤ ``threshold``; ``number`` the
        ``number`` least similar ones; ``all`` every module. Default: ``threshold`` for safe-lora
        (as in the paper), ``all`` for the others (which need no similarity).
    threshold: the paper's τ, a cosine. 0.35 is the paper's value for Llama-2.
    number: the paper's K.
    energy: the share of ‖V‖_F² whose directions input-removal takes away (R), and csulora keeps (L and R).
        Default: 0.2; for csulora 0.95, as in its paper.
    max_relative_norm: an adapter with ‖s·BA‖_F / ‖W‖_F above it in any module is refused: a bound on
        how far one can be multiplied up so that what the projection leaves is enough.
    max_total_norm: so is one with (Σ ‖s·BA‖² / Σ ‖W‖²)^½ above it, the latter sum over all modules of the
        projector cache. Adapters that were trained alike are alike in it, whatever modules they change.
    mode: ``enforce``, or ``audit``, which serves the adapter unprojected and only reports.
    """

    method: str = "input-removal"
    select: str = ""
    threshold: float = 0.35
    number: int = 10
    energy: float = _METHODS_OWN
    max_relative_norm: float = 1.0
    max_total_norm: float = 1.0
    mode: str = "enforce"

    def __post_init__(self) -> None:
        _one_of("method", self.method, METHOD_NAMES)
        if self.select == "":
            default = "threshold" if self.method == "safe-lora" else "all"
            object.__setattr__(self, "select", default)
        if self.energy is _METHODS_OWN:
            object.__setattr__(self, "energy", DEFAULT_ENERGY[self.method])
        _one_of("select", self.select, SELECTIONS)
        _one_of("mode", self.mode, MODES)
        for field, low, high in _RANGES:
            _in_range(field, getattr(self, field), low, high)
            object.__setattr__(self, field, float(getattr(self, field)) + 0.0)  # 1 and 1.0, 0.0 and -0.0
        if isinstance(self.number, bool) or not isinstance(self.number, int) or self.number < 0:
            raise PolicyError(f"number is {self.number!r:.80}; give a whole number of modules, 0 or more")

    @property
    def enforcing(self) -> bool:
        """Whether adapters are projected, not only reported on."""
        return self.mode == "enforce"

    @property
    def id(self) -> str:
        """A digest of all fields: it is part of a published adapter's address."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Policy:
        """A policy from a configuration's mapping. Unknown keys are an error, not ignored."""
        if not isinstance(values, Mapping):
            raise PolicyError(f'the policy is {values!r:.80}; give an object such as {{"energy": 0.2}}')
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise PolicyError(f"unknown policy keys {unknown}; known are {sorted(known)}")
        return cls(**values)

    def with_values(self, values: Mapping[str, Any]) -> Policy:
        """This policy with some fields replaced.

        Raises:
            PolicyError: unknown fields, or values out of range.
        """
        base = dataclasses.asdict(self)
        if values.get("method", self.method) != self.method:
            base |= {"select": "", "energy": _METHODS_OWN}  # each method has its own defaults
        return Policy.from_mapping({**base, **values})

    def check_effective(self, given: Iterable[str]) -> None:
        """Refuse fields that somebody gave and that change nothing under this policy, or no adapter.

        Raises:
            PolicyError: such as ``number`` without ``select`` being ``number``, or an ``energy`` of 0.
        """
        for field in given:
            if not self.has_effect(field):
                condition, needed = _CONDITIONS[field]
                raise PolicyError(
                    f"{field} has no effect with {condition} {getattr(self, condition)!r}; give {condition} "
                    f"{' or '.join(map(repr, needed))} too{_MORE.get(field, '')}, or leave {field} out"
                )
            # Ĉ has no negative eigenvalues: no similarity is below 0, and 0 only where Ĉ B is.
            idle = (field, self.method) == ("energy", "input-removal") or field in ("number", "threshold")
            if idle and getattr(self, field) <= 0:
                raise PolicyError(
                    f"with {field} {getattr(self, field):g} nothing is projected; if that is meant, choose "
                    "mode 'audit'"
                )

    def has_effect(self, field: str) -> bool:
        """Whether another value of the field could give another answer."""
        condition, needed = _CONDITIONS.get(field, ("", ()))
        return not condition or getattr(self, condition) in needed

    def at_least_as_strict(self, other: Policy) -> bool:
        """Whether this policy serves no adapter more freely than ``other`` does.

        Different methods change different sides of an adapter and cannot be compared: False. Nor can CSULoRA
        at different energies: with more of it more is kept, but what is not is damped more.
        """
        if not other.enforcing:
            return True
        if not self.enforcing or any(getattr(self, cap) > getattr(other, cap) for cap in CAPS):
            return False
        if self.method != other.method:
            return False
        if self.method == "input-removal" and self.energy < other.energy:
            return False
        if self.method == "csulora" and self.energy != other.energy:
            return False
        if self.select == "all":
            return True
        if self.select != other.select:
            return False
        if self.select == "threshold":
            return self.threshold >= other.threshold
        return self.number >= other.number

    def tightened(self, other: Policy) -> Policy:
        """This policy, with what of ``other`` is stricter and has the same meaning here."""
        stricter: dict[str, Any] = {cap: min(getattr(self, cap), getattr(other, cap)) for cap in CAPS}
        if self.method == other.method:
            if self.method == "input-removal":
                stricter["energy"] = max(self.energy, other.energy)
            if self.select != other.select:
                stricter["select"] = "all"  # a number and a threshold may choose other modules
            else:
                stricter["threshold"] = max(self.threshold, other.threshold)
                stricter["number"] = max(self.number, other.number)
        return dataclasses.replace(self, **stricter)

    def selects(self, similarities: Mapping[str, float | None]) -> set[str]:
        """Names of the modules to project (paper, eq. 2 and its released code's ``number``).

        A module whose delta is zero has no similarity (``None``) and is never selected: there is
        nothing to project. Equal similarities are ordered by name, so that the choice is stable.
        """
        known = {name: value for name, value in similarities.items() if value is not None}
        if self.select == "all":
            return set(known)
        if self.select == "threshold":
            return {name for name, value in known.items() if not value > self.threshold}  # NaN too
        return set(sorted(known, key=lambda name: (known[name], name))[: self.number])


def _one_of(field: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise PolicyError(f"{field} is {value!r:.80}; choose one of {', '.join(allowed)}")


def _in_range(field: str, value: object, low: float, high: float) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not low <= value <= high:  # type: ignore[operator]
        above = high == sys.float_info.max
        wanted = f"finite number of {low:g} or more" if above else f"number from {low:g} to {high:g}"
        raise PolicyError(f"{field} is {value!r:.80}; give a {wanted}")
