"""The exceptions of this package.

    SafeLoRAError
    ├── UsageError            wrong option, or an input that is not there (exit code 2)
    │   ├── AdapterNotFound       no folder where the adapter should be
    │   ├── PolicyError       a policy that contradicts itself or its projector cache
    │   ├── CheckpointError   a model folder that cannot be read or does not fit its pair
    │   └── KeysError         a keys file that cannot be read or used
    ├── ProjectorCacheError   a cache that is missing, damaged or made for another model
    ├── AdapterRefused        the gate's answer to an adapter (exit code 3)
    ├── QuotaExceeded         the tenant has reached one of its limits
    ├── StoreDamaged          a record in the adapter store that cannot be read
    ├── GateUnavailable       the gate process does not answer; try again later
    └── GuardError            vLLM is not guarded: seam changed, worker unattached, no settings

Every message says what was found, what was expected and what to do.
"""

from __future__ import annotations

from dataclasses import dataclass


class SafeLoRAError(Exception):
    """Root of all errors that this package raises on purpose."""


class UsageError(SafeLoRAError):
    """A wrong option, or an input that does not exist."""


class AdapterNotFound(UsageError):
    """There is no adapter folder at the given path."""


class PolicyError(UsageError):
    """A policy with a value out of range, or one that the projector cache cannot serve."""


class CheckpointError(UsageError):
    """A model folder that cannot be read, or two models that are not a pair."""


class KeysError(UsageError):
    """A keys file that cannot be read, that others can read, or with a wrong entry."""


class ProjectorCacheError(SafeLoRAError):
    """A projector cache that is missing, damaged, or made for another model."""


class QuotaExceeded(SafeLoRAError):
    """An adapter would take its tenant over one of its limits. Nothing was loaded."""


class StoreDamaged(SafeLoRAError):
    """A record in the adapter store that is damaged, or that something else put there."""


class GateUnavailable(SafeLoRAError):
    """The gate process cannot answer now. Nothing was loaded; the call may be repeated."""


class GuardError(SafeLoRAError):
    """vLLM cannot be guarded, so no adapter may be served."""


@dataclass(frozen=True)
class Reason:
    """One reason to refuse an adapter: a stable machine-readable code and a sentence."""

    code: str
    detail: str


class AdapterRefused(SafeLoRAError):
    """The adapter may not be served. ``reasons`` holds every cause found, not only the first."""

    def __init__(self, reasons: list[Reason]) -> None:
        if not reasons:
            raise ValueError("a refusal needs at least one reason")
        self.reasons = reasons
        super().__init__("; ".join(f"[{reason.code}] {reason.detail}" for reason in reasons))

    @property
    def codes(self) -> list[str]:
        """The reason codes without repeats, in the order in which they were found."""
        return list(dict.fromkeys(reason.code for reason in self.reasons))


def refuse(code: str, detail: str) -> AdapterRefused:
    """Shorthand for a refusal with one reason."""
    return AdapterRefused([Reason(code, detail)])
