"""What the keys file says of the exams of one tenant's adapters: ``[tenants.NAME.exam]``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from safelora_vllm.errors import KeysError, PolicyError
from safelora_vllm.exam import ladder as ladders
from safelora_vllm.policy import Policy

if TYPE_CHECKING:
    from safelora_vllm.projectors.cache import ProjectorCache

MODES = ("off", "report", "enforce")  # the strictest one last


@dataclass(frozen=True)
class TenantExam:
    """Each field is None where the file has none: then the server's holds.

    mode: one of `MODES`. threshold: the largest bound that passes, nats per token. ladder: as the setting.
    per_minute, per_day: exams that the tenant may cause.
    """

    mode: str | None = None
    threshold: float | None = None
    ladder: str | None = None
    per_minute: int | None = None
    per_day: int | None = None

    @classmethod
    def read(cls, entry: str, table: Mapping[str, Any]) -> TenantExam:
        """The content of a table of the file. entry: its name.

        Raises:
            KeysError: an entry is unknown or has a value that it cannot have.
        """
        if unknown := sorted(set(table) - set(FIELDS)):
            raise KeysError(f"{entry} has unknown entries {unknown!r:.200}; known are {', '.join(FIELDS)}")
        mode, threshold, ladder = (table.get(name) for name in ("mode", "threshold", "ladder"))
        if mode is not None and mode not in MODES:
            raise KeysError(f"{entry}.mode is {mode!r:.40}; give one of {', '.join(MODES)}")
        if threshold is not None and not _is_threshold(threshold):
            raise KeysError(f"{entry}.threshold is {threshold!r:.40}; give a finite number above 0")
        if ladder is not None:
            if not isinstance(ladder, str):
                raise KeysError(
                    f"{entry}.ladder is {ladder!r:.40}; give a text such as input-removal:0.4,safe-lora"
                )
            _rungs(entry, ladder, Policy())
        for name in ("per_minute", "per_day"):
            count = table.get(name)
            if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 0):
                raise KeysError(f"{entry}.{name} is {count!r:.40}; give a whole number, 0 or more")
        return cls(**table)


FIELDS = tuple(field.name for field in fields(TenantExam))
SERVERS_EXAM = TenantExam()


@dataclass(frozen=True)
class ServersExam:
    """The server's settings of the exam.

    policy: the one that it serves by. chosen: the operator gave it. ladder: None is the default.
    """

    mode: str
    threshold: float
    ladder: str | None
    policy: Policy
    chosen: bool
    cache: ProjectorCache

    def check(self, entry: str, exam: TenantExam, less_strict: bool) -> None:
        """Whether this server can examine so.

        Args:
            entry: of the tenant in the keys file, for messages.
            exam: its settings there.
            less_strict: the operator allows that they are less strict than the server's.

        Raises:
            KeysError: the server has no exam, a setting has no effect, a rung cannot be served, or they are
                less strict and the entry does not say so.
        """
        where = f"{entry}.exam"
        if self.mode == "off":
            raise KeysError(
                f"{where} has no effect with --exam off: leave it out, or start the server with "
                "--exam report or --exam enforce"
            )
        mode = exam.mode or self.mode
        threshold = exam.threshold or self.threshold
        if exam.ladder is not None and mode != "enforce":
            raise KeysError(f"{where}.ladder has no effect without mode being enforce: leave it out")
        rungs = _rungs(where, exam.ladder, self.policy) if exam.ladder else []
        servable = ladders.served_by(self.cache, rungs)
        if missing := [ladders.name_of(rung) for rung in rungs if rung not in servable]:
            raise KeysError(f"{where}.ladder: the projector cache has too few directions for {missing}")
        looser = [
            *([f"mode = {mode}"] if MODES.index(mode) < MODES.index(self.mode) else []),
            *([f"threshold = {threshold:g}"] if threshold > self.threshold else []),
            *self._milder(rungs),
        ]
        if looser and not less_strict:
            raise KeysError(
                f"{where} is less strict than the server's exam, or cannot be compared with it: "
                f"{', '.join(looser)}. Make it stricter, or set less_strict = true in [{entry}]"
            )

    def _milder(self, rungs: Sequence[Policy]) -> list[str]:
        """The rungs that are not as strict as any by which the server serves.

        What says ``+opinion`` takes any score: that is compared with what does so on the server, too.
        """
        if not rungs:
            return []
        ladder = ladders.usable(self.cache, self.ladder, self.policy)
        known = [self._with_servers_opinion(rung) for rung in ladder]
        if self.chosen:
            named = self.ladder is not None
            known = [self.policy, *(rung for rung in known if ladders.follows(rung, self.policy, named))]
        open_to_all = [rung for rung in known if ladders.largest_bound(rung, ladder, 0.0) == math.inf]
        return [
            ladders.name_of(mine)
            for mine in rungs
            if not any(
                self._with_servers_opinion(mine).at_least_as_strict(rung)
                for rung in (open_to_all if mine.opinion else known)
            )
        ]

    def _with_servers_opinion(self, rung: Policy) -> Policy:
        """A rung as it serves on this server: a tenant's policy that has another opinion says less_strict."""
        return replace(rung, opinion=rung.opinion or self.policy.opinion)


def _rungs(entry: str, text: str, caps: Policy) -> list[Policy]:
    try:
        return ladders.parse(text, caps)
    except PolicyError as error:
        raise KeysError(f"{entry}.ladder: {error}") from error


def _is_threshold(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
