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
from safelora_vllm.methods import METHODS, Method
from safelora_vllm.methods.selection import Interval, Selection, by_number, by_threshold

SELECTIONS = ("threshold", "number", "all", "none")
MODES = ("enforce", "report-only")
_FORMER_MODES = {"audit": "report-only"}  # the former word → today's
_RANGES = (
    ("threshold", -1.0, 1.0),
    ("energy", 0.0, 1.0),
    ("max_relative_norm", 0.0, sys.float_info.max),
    ("max_total_norm", 0.0, sys.float_info.max),
)
_METHODS_OWN = float("nan")  # stands for the method's default; any other NaN is out of range
CAPS = ("max_relative_norm", "max_total_norm")
NOTHING = "nothing projected"  # for people, of a policy that selects no module
_BESIDE = (*CAPS, "opinion")  # fields that say nothing of what is projected


def chooses(policy: Mapping[str, Any]) -> bool:
    """Whether a mapping of a policy's fields says what is projected, and not only what holds beside that."""
    return bool(set(policy) - set(_BESIDE))


@dataclass(frozen=True)
class Policy:
    """The rules an adapter is judged by. Field names are those of the command-line options.

    A field may have no effect with the others, such as ``number`` where ``select`` is ``all``. The functions
    that take a policy refuse that where the field has another value than its default: see `check_effective`.

    Attributes:
        method: ``input-removal`` (A' = A − (A R) Rᵀ, the default), ``safe-lora`` (Hsu et al. 2024, B' = Ĉ B)
            or ``csulora`` (arXiv 2605.30640, damps what is not in both L and R).
        select: ``threshold`` projects modules whose similarity is ≤ ``threshold``; ``number`` the
            ``number`` least similar ones; ``all`` every module; ``none`` no module, so that the adapter is
            vetted and bounded by the caps, and served as it was uploaded. Default: ``threshold`` for
            safe-lora (as in the paper), ``all`` for the others (which need no similarity).
        threshold: the paper's τ, a cosine. 0.35 is the paper's value for Llama-2.
        number: the paper's K, how many modules are projected.
        energy: the share of ‖V‖_F² whose directions input-removal takes away (R), and csulora keeps (L and
            R). Default: 0.2; for csulora 0.95, as in its paper.
        max_relative_norm: an adapter is refused if ‖s·BA‖_F / ‖W‖_F of any module is larger. Bounds how far
            an adapter can be multiplied up so that what the projection leaves is enough.
        max_total_norm: an adapter is refused if (Σ ‖s·BA‖² / Σ ‖W‖²)^½ is larger, with Σ ‖W‖² over all
            modules of the projector cache. Adapters that were trained alike have similar values, whatever
            modules they change.
        mode: ``enforce``, or ``report-only``, which serves the adapter unprojected and only reports.
        opinion: a second opinion: each request for the adapter is also given to the aligned model, and what
            that refuses the adapter does not answer. Only servers do this. What `project_adapter` writes has
            none, and vLLM's offline ``LLM`` refuses each adapter (reason code ``second_opinion``).

    Raises:
        PolicyError: a value is out of range or of another type.

    Example:
        >>> import safelora_vllm as sl
        >>> sl.Policy().method, sl.Policy().energy
        ('input-removal', 0.2)
        >>> sl.Policy(method="safe-lora").select
        'threshold'
        >>> sl.Policy(energy=2)
        Traceback (most recent call last):
            ...
        safelora_vllm.errors.PolicyError: `energy` is 2: expected a number from 0 to 1
    """

    method: str = "input-removal"
    select: str = ""
    threshold: float = 0.35
    number: int = 10
    energy: float = _METHODS_OWN
    max_relative_norm: float = 1.0
    max_total_norm: float = 1.0
    mode: str = "enforce"
    opinion: bool = False

    def __post_init__(self) -> None:
        _one_of("method", self.method, tuple(METHODS))
        if self.select == "":
            object.__setattr__(self, "select", self._method.select)
        if self.energy is _METHODS_OWN:
            object.__setattr__(self, "energy", self._method.energy)
        _one_of("select", self.select, SELECTIONS)
        if isinstance(self.mode, str) and (word := _FORMER_MODES.get(self.mode)):
            raise PolicyError(f"`mode` {self.mode!r} has another name now: use {word!r}")
        _one_of("mode", self.mode, MODES)
        for field, low, high in _RANGES:
            _in_range(field, getattr(self, field), low, high)
            object.__setattr__(self, field, float(getattr(self, field)) + 0.0)  # 1 and 1.0, 0.0 and -0.0
        if not isinstance(self.opinion, bool):
            raise PolicyError(f"`opinion` is {self.opinion!r:.80}: expected true or false")
        if isinstance(self.number, bool) or not isinstance(self.number, int) or self.number < 0:
            raise PolicyError(f"`number` is {self.number!r:.80}: expected a number of modules, 0 or more")

    @property
    def enforcing(self) -> bool:
        """Whether adapters are projected, not only reported on."""
        return self.mode == "enforce"

    @property
    def id(self) -> str:
        """A digest of all fields: it is part of a published adapter's address."""
        former = {word: old for old, word in _FORMER_MODES.items()}  # so that older addresses stay
        fields = {**self.to_mapping(), "mode": former.get(self.mode, self.mode)}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()

    @property
    def summary(self) -> str:
        """What of it decides which modules are projected how, e.g. ``safe-lora, select threshold 0.35``."""
        opinion = ", second opinion" if self.opinion else ""
        if self.select == "none":
            return NOTHING + opinion
        value = {"threshold": f" {self.threshold:g}", "number": f" {self.number}", "all": ""}[self.select]
        energy = f", energy {self.energy:g}" if self.has_effect("energy") else ""
        return f"{self.method}{energy}, select {self.select}{value}{opinion}"

    @property
    def selects_none(self) -> bool:
        """Whether no module of any adapter is projected, as on the exam's rung ``as-uploaded``."""
        return self.select == "none" or (self.select == "number" and self.number == 0)

    @property
    def applied(self) -> str:
        """The method, or ``none`` where no module of any adapter is projected."""
        return "none" if self.selects_none else self.method

    @property
    def chosen(self) -> list[str]:
        """The fields that differ from their defaults with this method."""
        default = Policy(method=self.method)
        names = (field.name for field in dataclasses.fields(self))
        return [name for name in names if getattr(self, name) != getattr(default, name)]

    @property
    def _method(self) -> Method:
        return METHODS[self.method]

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Policy:
        """A policy from a configuration's mapping. Unknown keys are an error, not ignored."""
        if not isinstance(values, Mapping):
            raise PolicyError(f'the policy is {values!r:.80}: expected an object such as {{"energy": 0.2}}')
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise PolicyError(f"{unknown} are not valid fields of a policy: expected some of {sorted(known)}")
        return cls(**values)

    @classmethod
    def from_stored(cls, values: Mapping[str, Any]) -> Policy:
        """As `from_mapping`, of what this release or an older one wrote."""
        return cls.from_mapping(stored_values(values))

    def to_mapping(self) -> dict[str, Any]:
        """All fields, for JSON. Without `opinion` where there is none, as older releases do not know it."""
        fields = dataclasses.asdict(self)
        return fields if self.opinion else {name: fields[name] for name in fields if name != "opinion"}

    def with_values(self, values: Mapping[str, Any]) -> Policy:
        """This policy with some fields replaced.

        Raises:
            PolicyError: unknown fields, or values out of range.
        """
        base = dataclasses.asdict(self)
        if values.get("method", self.method) != self.method:
            base |= {"select": "", "energy": _METHODS_OWN}  # each method has its own defaults
        elif self.select == "none" and not {"method", "energy"}.isdisjoint(values):
            base["select"] = ""  # who says how to project wants it done
        return Policy.from_mapping({**base, **values})

    def check_effective(self, given: Iterable[str]) -> None:
        """Refuse fields that somebody gave and that change nothing under this policy, or no adapter.

        Raises:
            PolicyError: such as ``number`` without ``select`` being ``number``, or an ``energy`` of 0.
        """
        for field in given:
            condition, needed = self._condition(field)
            if not self.has_effect(field):
                raise PolicyError(
                    f"`{field}` has no effect with `{condition}` {getattr(self, condition)!r}. Set "
                    f"`{condition}` to {' or '.join(map(repr, needed))}{_default_of(field)}, or leave "
                    f"`{field}` out"
                )
            if self.is_idle(field):
                raise PolicyError(
                    f"with `{field}` {getattr(self, field):g} nothing is projected. If that is meant, set "
                    "`select` to 'none', or `mode` to 'report-only' to refuse nothing either"
                )

    def has_effect(self, field: str) -> bool:
        """Whether another value of the field could give another answer."""
        condition, needed = self._condition(field)
        return not needed or getattr(self, condition) in needed

    def _condition(self, field: str) -> tuple[str, tuple[str, ...]]:
        """Where a field only means something together with another's values: that field and those values."""
        if field in ("threshold", "number"):
            return "select", (field,)
        if self.select == "none" and field in ("method", "energy"):
            return "select", SELECTIONS[:-1]
        return "method", tuple(name for name, method in METHODS.items() if field in method.options)

    def is_idle(self, field: str) -> bool:
        """Whether a field that has an effect has a value with which no module is projected."""
        # Ĉ has no negative eigenvalues: no similarity is below 0, and 0 only where Ĉ B is.
        option = self._method.options.get(field)
        may_be = field in ("number", "threshold") or (option is not None and option.more_is_stricter)
        return may_be and bool(getattr(self, field) <= 0)

    def at_least_as_strict(self, other: Policy) -> bool:
        """Whether this policy serves no adapter more freely than ``other`` does.

        Any policy is at least as strict as one that projects nothing. Different methods change different
        sides of an adapter and cannot be compared: False. How two policies of one method compare is said in
        its file.
        """
        if other.opinion and not self.opinion:
            return False
        if not other.enforcing:
            return True
        if not self.enforcing or any(getattr(self, cap) > getattr(other, cap) for cap in CAPS):
            return False
        if other.selects_none:
            return True
        if self.selects_none or self.method != other.method:
            return False
        for field, option in self._method.options.items():
            if not option.at_least_as_strict(getattr(self, field), getattr(other, field)):
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
        stricter["opinion"] = self.opinion or other.opinion
        if self.selects_none:
            for field in ("method", "select", "threshold", "number", "energy"):
                stricter[field] = getattr(other, field)
        elif self.method == other.method and not other.selects_none:
            for field, option in self._method.options.items():
                stricter[field] = option.tightened(getattr(self, field), getattr(other, field))
            if self.select != other.select:
                stricter["select"] = "all"  # a number and a threshold may choose other modules
            else:
                stricter["threshold"] = max(self.threshold, other.threshold)
                stricter["number"] = max(self.number, other.number)
        return dataclasses.replace(self, **stricter)

    def selects(self, similarities: Mapping[str, Interval | None]) -> Selection:
        """The modules to project, and which of them only because their similarity is not known exactly.

        A module whose delta is zero has no similarity (``None``) and is never selected: there is
        nothing to project.
        """
        known = {name: found for name, found in similarities.items() if found is not None}
        if self.select == "all":
            return Selection(frozenset(known))
        if self.select == "none":
            return Selection(frozenset())
        if self.select == "threshold":
            return by_threshold(known, self.threshold)
        return by_number(known, self.number)


def stored_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a policy in today's words, of what this release or an older one wrote."""
    mode = values.get("mode")
    todays = _FORMER_MODES.get(mode) if isinstance(mode, str) else None
    return {**values, "mode": todays} if todays else dict(values)


def _default_of(field: str) -> str:
    """A note on the methods whose ``select`` has this field's name where none is given."""
    names = [name for name, method in METHODS.items() if method.select == field]
    return f" (the default of {' and '.join(names)})" if names else ""


def _one_of(field: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise PolicyError(f"`{field}` is {value!r:.80}: expected one of {', '.join(allowed)}")


def _in_range(field: str, value: object, low: float, high: float) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not low <= value <= high:  # type: ignore[operator]
        above = high == sys.float_info.max
        wanted = f"finite number of {low:g} or more" if above else f"number from {low:g} to {high:g}"
        raise PolicyError(f"`{field}` is {value!r:.80}: expected a {wanted}")
