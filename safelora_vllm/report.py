"""What was decided about an adapter, and why. One object for terminal, HTTP, metrics and store."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from safelora_vllm.errors import AdapterRefused, Reason
from safelora_vllm.policy import Policy

Decision = str  # "projected" or "kept"


@dataclass(frozen=True)
class ModuleReport:
    """One module's figures. ``None`` stands where a zero delta leaves nothing to compare.

    Attributes:
        name: of the module, as in the model.
        rank: columns of B.
        similarity: cos(ĈBA, BA); it lies within ``similarity_error`` of this value.
        null_similarity: c₀, what a random B would score.
        retained: ‖B'A'‖_F / ‖BA‖_F after the decision.
        relative_norm: ‖s·BA‖_F / ‖W_aligned‖_F before it.
        decision: ``projected`` or ``kept`` (in report-only mode: what enforcing would have done).
        similarity_error: half the width of an interval that is certain to hold the similarity. 0 where Ĉ or V
            gave it, up to the rounding of the cache's dtype.
        uncertain: it is projected only because that interval does not tell whether the policy selects it. An
            exact cache would tell, and might keep it.
    """

    name: str
    rank: int
    similarity: float | None
    null_similarity: float
    retained: float | None
    relative_norm: float
    decision: Decision
    similarity_error: float = 0.0
    uncertain: bool = False


@dataclass(frozen=True)
class Report:
    """The gate's account of one adapter under one projector cache and one policy.

    Attributes:
        adapter: its name.
        digest: of its content; empty where that could not be read.
        projectors: id of the projector cache.
        policy: by which it was judged.
        accepted: whether it may be served.
        reasons: every reason to refuse it; in report-only mode, what enforcing would have refused it for.
        modules: the figures of each; empty where it was refused before it could be measured.
        total_norm: (Σ ‖s·BA‖² / Σ ‖W_aligned‖²)^½ of the upload, the latter over all modules of the cache.
        signed_by: id of the key whose signature of the upload was verified; empty without one.
    """

    adapter: str
    digest: str
    projectors: str
    policy: Policy
    accepted: bool
    reasons: list[Reason]
    modules: list[ModuleReport]
    total_norm: float = 0.0
    signed_by: str = ""

    @property
    def changes_nothing(self) -> bool:
        """Whether every module's delta is zero, so that the model answers as without the adapter."""
        return bool(self.modules) and all(module.similarity is None for module in self.modules)

    def named(self, adapter: str) -> Report:
        """The same report under the name that the adapter is served by."""
        return dataclasses.replace(self, adapter=adapter)

    def signed(self, key: str) -> Report:
        """The same report of an upload that is signed with a key, of which this is the id."""
        return dataclasses.replace(self, signed_by=key)

    def count(self, decision: Decision) -> int:
        """Number of modules with this decision."""
        return sum(module.decision == decision for module in self.modules)

    @property
    def uncertain(self) -> int:
        """Number of modules that are projected only because their similarity is not known exactly."""
        return sum(module.uncertain for module in self.modules)

    def values(self, field: str) -> list[float]:
        """A column of the module table without its empty places."""
        column = (getattr(module, field) for module in self.modules)
        return [value for value in column if value is not None]

    def to_dict(self) -> dict[str, Any]:
        """The public JSON form; ``reasons`` is a list of ``{"code", "message"}``."""
        return {
            "adapter": self.adapter,
            "digest": self.digest,
            "projectors": self.projectors,
            "policy": self.policy.to_mapping(),
            "accepted": self.accepted,
            "reasons": [dataclasses.asdict(reason) for reason in self.reasons],
            "total_norm": self.total_norm,
            "signed": bool(self.signed_by),
            "signed_by": self.signed_by,
            "modules": [dataclasses.asdict(module) for module in self.modules],
        }

    def to_json(self) -> str:
        """`to_dict` as text, keys in a fixed order."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Report:
        """The inverse of `to_dict`, also of what an older release stored."""
        return cls(
            adapter=data["adapter"],
            digest=data["digest"],
            projectors=data["projectors"],
            policy=Policy.from_stored(data["policy"]),
            accepted=data["accepted"],
            reasons=_reasons(data),
            modules=[ModuleReport(**module) for module in data["modules"]],
            total_norm=data["total_norm"],
            signed_by=data.get("signed_by", ""),
        )

    @classmethod
    def refused(
        cls, adapter: str, digest: str, projectors: str, policy: Policy, error: AdapterRefused
    ) -> Report:
        """A report of an adapter that was refused before it could be measured."""
        return cls(adapter, digest, projectors, policy, False, error.reasons, [])


def _reasons(data: dict[str, Any]) -> list[Reason]:
    """Reports of older releases have the codes in ``reasons`` and the sentences in ``details``."""
    if "details" in data:
        return [Reason(*pair) for pair in zip(data["reasons"], data["details"], strict=True)]
    return [Reason(**reason) for reason in data["reasons"]]
