"""The exceptions of this package.

    SafeLoRAError
    ├── UsageError            wrong option, or an input that is not there (exit code 2)
    │   ├── AdapterNotFound       no folder or archive where the adapter should be
    │   ├── PolicyError       a policy that contradicts itself or its projector cache
    │   ├── CheckpointError   a model folder that cannot be read or does not fit its pair
    │   └── KeysError         a keys file that cannot be read or used
    ├── ProjectorCacheError   a cache that is missing, damaged or made for another model
    ├── AdapterRefused        the gate's answer to an adapter (exit code 3)
    ├── UnknownAdapter, UnknownRoute        there is nothing of that name
    ├── AlreadyLoaded, ChangedMeanwhile     the name is another's, or was changed by others
    ├── Unauthorized, Forbidden             who the caller is, and what they may not do
    ├── QuotaExceeded         the tenant has reached one of its limits
    ├── StoreDamaged          a record in the adapter store that cannot be read
    ├── Unavailable           a part of the server is out of order; try again later
    │   ├── GateUnavailable       the gate process does not answer
    │   │   └── MalformedMessage      a call or an answer that is not one
    │   ├── StoreUnavailable      the adapter store cannot be read or written, or lost a copy
    │   ├── EngineUnavailable     vLLM's engine has ended
    │   └── ExamUnavailable       an exam gave no score
    └── GuardError            vLLM is not guarded: seam changed, worker unattached, no settings, open store

Every message says what was found, what was expected and what to do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

_MAX_MESSAGE = 500  # characters
_MAX_OF_A_CODE = 20
_MAX_REASONS = 100
_MAX_IN_MESSAGE = 20
_NAMED = 3  # names that a sentence about many shows
_MAX_NAME = 90  # characters of each


class SafeLoRAError(Exception):
    """Root of all errors that this package raises on purpose."""


class UsageError(SafeLoRAError):
    """A wrong option, or an input that does not exist."""


class AdapterNotFound(UsageError):
    """There is no adapter folder or archive at the given path."""


class PolicyError(UsageError):
    """A policy with a value out of range, or one that the projector cache cannot serve."""


class CheckpointError(UsageError):
    """A model folder that cannot be read, or two models that are not a pair."""


class KeysError(UsageError):
    """A keys file that cannot be read, that others can read, or with a wrong entry."""


class ProjectorCacheError(SafeLoRAError):
    """A projector cache that is missing, damaged, or made for another model."""


class UnknownAdapter(SafeLoRAError):
    """No adapter is known under this name."""


class AlreadyLoaded(SafeLoRAError):
    """Another adapter is served under this name."""


class ChangedMeanwhile(SafeLoRAError):
    """Somebody else changed the adapter while this change was judged."""


class Unauthorized(SafeLoRAError):
    """The key is missing or wrong, or was taken out meanwhile."""


class Forbidden(SafeLoRAError):
    """The key is known, but may not do this."""


class UnknownRoute(SafeLoRAError):
    """The server has no route for this method and path."""


class QuotaExceeded(SafeLoRAError):
    """An adapter would take its tenant over one of its limits. Nothing was loaded."""


class StoreDamaged(SafeLoRAError):
    """A record in the adapter store that is damaged, or that something else put there."""


class Unavailable(SafeLoRAError):
    """A part of the server is out of order. Nothing was loaded; the call may be repeated."""


class GateUnavailable(Unavailable):
    """The gate process does not answer now."""


class MalformedMessage(GateUnavailable):
    """A message between the gate and its callers that cannot be read, or that nobody asked for."""


class StoreUnavailable(Unavailable):
    """The adapter store cannot be read or written now, or a copy in it is missing or damaged."""


class EngineUnavailable(Unavailable):
    """vLLM's engine has ended."""


class ExamUnavailable(Unavailable):
    """An exam gave no score: the engine is busy, failed, or gave figures that are none."""

    @property
    def seconds(self) -> int:
        """After how many the call may be repeated."""
        return 30


class GuardError(SafeLoRAError):
    """vLLM cannot be guarded, so no adapter may be served."""


@dataclass(frozen=True)
class Reason:
    """One reason to refuse an adapter: a stable machine-readable code and a sentence.

    The message may quote what a tenant wrote and goes into logs, terminals and answers: whatever is
    not printable in it is escaped, and what is over 500 characters is cut.

    Attributes:
        code: machine-readable; it stays the same from release to release.
        message: what was found, what was expected and what to do.
    """

    code: str
    message: str

    def __post_init__(self) -> None:
        message = self.message[: _MAX_MESSAGE + 1]
        if not message.isprintable():
            message = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
        if len(message) > _MAX_MESSAGE:
            message = message[: _MAX_MESSAGE - 1] + "…"
        object.__setattr__(self, "message", message)


class AdapterRefused(SafeLoRAError):
    """The adapter may not be served. ``reasons`` holds every cause found, not only the first.

    Repeats are left out, and so is what is over 20 of one code or over 100 in all. Every code stays. The
    message shows the first 20. ``for_admins``: what else their answers have.
    """

    def __init__(self, reasons: list[Reason], for_admins: Mapping[str, Any] | None = None) -> None:
        if not reasons:
            raise ValueError("a refusal needs at least one reason")
        self.reasons, self.for_admins = _bounded(reasons), dict(for_admins or {})
        shown = [f"[{reason.code}] {reason.message}" for reason in self.reasons[:_MAX_IN_MESSAGE]]
        if more := len(self.reasons) - len(shown):
            shown.append(f"and {more} more")
        super().__init__("; ".join(shown))

    @property
    def codes(self) -> list[str]:
        """The reason codes without repeats, in the order in which they were found."""
        return codes_of(self.reasons)


def codes_of(reasons: Iterable[Reason]) -> list[str]:
    """Their codes without repeats, in the order of the reasons."""
    return list(dict.fromkeys(reason.code for reason in reasons))


def fresh_copy(error: SafeLoRAError) -> SafeLoRAError:
    """A new exception that says the same. One and the same raised again and again would keep the frames of
    every request that it ended."""
    copy = type(error).__new__(type(error), *error.args)
    vars(copy).update(vars(error))
    return copy


def refuse(code: str, message: str) -> AdapterRefused:
    """Shorthand for a refusal with one reason."""
    return AdapterRefused([Reason(code, message)])


class Fault(NamedTuple):
    """One of many modules or tensors with something wrong: the reason's code, its name, and what is wrong."""

    code: str
    name: str
    cause: str


def by_cause(faults: Iterable[Fault]) -> list[Reason]:
    """One reason for each cause, whatever the number of modules or tensors that have it.

    Args:
        faults: of modules or tensors.

    Returns:
        In the order in which the causes were found, e.g. ``q_proj, k_proj, v_proj and 4 more: no projector``.
    """
    names: dict[tuple[str, str], list[str]] = {}
    for code, name, cause in faults:
        names.setdefault((code, cause), []).append(name)
    return [Reason(code, f"{named(found)}: {cause}") for (code, cause), found in names.items()]


def named(names: Sequence[str]) -> str:
    """The first three names, and how many more there are."""
    shown = ", ".join(name[:_MAX_NAME] for name in names[:_NAMED])
    more = len(names) - _NAMED
    return f"{shown} and {more:,} more" if more > 0 else shown


def _bounded(reasons: list[Reason]) -> list[Reason]:
    seen: Counter[str] = Counter()
    kept: list[Reason] = []
    for reason in dict.fromkeys(reasons):
        seen[reason.code] += 1
        few = seen[reason.code] <= _MAX_OF_A_CODE and len(kept) < _MAX_REASONS
        if few or seen[reason.code] == 1:
            kept.append(reason)
    return kept
