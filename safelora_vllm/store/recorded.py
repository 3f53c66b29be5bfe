"""Changes of names together with their lines in the audit log: a process that is killed loses no line.

Before a record is written, what will be said of it is put into a file of ``audit/unfinished/``. The file
goes when the log has the line. One that is left tells the next change of the name, and the next start, what
is missing. All of that happens under the lock of the names.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safelora_vllm.errors import StoreUnavailable
from safelora_vllm.files import locked, make_folder, replace_file, writing
from safelora_vllm.remote.bucket import Conflict
from safelora_vllm.store.audit_log import AuditLog
from safelora_vllm.store.name_record import AdapterRecord, file_of, to_json
from safelora_vllm.store.names import NameStore

logger = logging.getLogger("vllm.safelora.management")
UNFINISHED = "unfinished"


@dataclass(frozen=True)
class Line:
    """What the audit log says of a change. details: of the record that it makes; none where it goes."""

    actor: str
    action: str
    details: Callable[[AdapterRecord | None], dict[str, Any]]


@dataclass(frozen=True)
class _Intent:
    """A line that is to be written.

    before, after: digests of the name's file; '' where there is none, None where an older release wrote this.
    begun: an ISO time. change: an id.
    """

    actor: str
    action: str
    adapter: str
    details: dict[str, Any]
    before: str
    begun: str
    change: str = field(default_factory=lambda: secrets.token_hex(8))
    after: str | None = None


class RecordedNames:
    """The store's names, and the audit log of their changes."""

    def __init__(self, names: NameStore, audit: AuditLog) -> None:
        self._names, self._audit = names, audit

    def update(
        self, name: str, change: Callable[[AdapterRecord | None], AdapterRecord | None], line: Line
    ) -> AdapterRecord | None:
        """`NameStore.update`, with a line in the log where it changes something.

        A log that cannot be written undoes nothing: the line is added later.

        Raises:
            UsageError, StoreDamaged, StoreUnavailable: see there.
        """

        @contextmanager
        def around(before: str, after: AdapterRecord | None) -> Iterator[None]:
            self._settle(name, before)
            begun = datetime.now(UTC).isoformat(timespec="microseconds")
            made = hashlib.sha256(to_json(after, file_of(name))).hexdigest() if after else ""
            intent = _Intent(line.actor, line.action, name, line.details(after), before, begun, after=made)
            self._intend(intent)
            try:
                yield
            except Conflict:  # another server was first: the change is not made
                self._path(intent).unlink(missing_ok=True)
                raise
            try:
                self._write(intent)
            except StoreUnavailable as error:  # the change itself is made: say so loudly
                what = "%s of %r by %s is not in the audit log: %s"
                logger.error(what, line.action, name, line.actor, error, extra=_about(intent))

        return self._names.update(name, change, around)

    def settle(self) -> None:
        """Add the lines that killed processes have not written.

        Raises:
            StoreUnavailable: the log or the names cannot be written.
        """
        adapters = {intent.adapter for intent in map(_read, self._files()) if intent}
        for name in sorted(adapters):
            with writing(self._names.root):
                make_folder(self._names.folder)
                with locked(self._names.folder):
                    self._settle(name, self._names.file_digest(name))

    def _settle(self, name: str, now: str) -> None:
        """For one name, under the lock of the names. now: digest of its file.

        In a bucket, another server may have changed the name since. Then nobody knows whether this change was
        made, unless a later one of this server began from it: the line has the decision "unknown".
        """
        found = [(path, intent) for path in self._files(name) if (intent := _read(path))]
        for position, (path, intent) in enumerate(found):
            if intent.adapter != name:
                continue
            if intent.before == now:  # the change was not made
                path.unlink(missing_ok=True)
                continue
            try:
                if not self._has(intent):
                    states = {now, None, *(later.before for _, later in found[position + 1 :])}
                    known = intent.after in states or not self._names.is_mirror
                    self._write(intent if known else _unknown(intent), completed=True)
            except StoreUnavailable as error:
                logger.error("the audit log lacks a line for %r: %s", name, error, extra=_about(intent))
            else:
                path.unlink(missing_ok=True)

    def _intend(self, intent: _Intent) -> None:
        """Without the file the change is made all the same: the line is written unless we are killed."""
        with contextlib.suppress(OSError):
            make_folder(self._folder)
            replace_file(self._path(intent), json.dumps(asdict(intent)).encode())

    def _write(self, intent: _Intent, completed: bool = False) -> None:
        """The line; then the file goes. completed: the log says when the change was begun."""
        more = {"begun": intent.begun} if completed else {}
        details = {**intent.details, "change": intent.change, **more}
        self._audit.record(intent.actor, intent.action, intent.adapter, **details)
        self._path(intent).unlink(missing_ok=True)

    def _has(self, intent: _Intent) -> bool:
        """Whether the log has it: the process may have been killed after that."""
        since = datetime.fromisoformat(intent.begun)
        return any(record.get("change") == intent.change for record in self._audit.read(since))

    @property
    def _folder(self) -> Path:
        return self._audit.folder / UNFINISHED

    def _path(self, intent: _Intent) -> Path:
        return self._folder / f"{_start(intent.adapter)}{intent.change}.json"

    def _files(self, name: str | None = None) -> list[Path]:
        """Oldest first; of one name, or of all."""
        found = []
        with contextlib.suppress(FileNotFoundError):
            for path in self._folder.glob(f"{_start(name) if name else ''}*.json"):
                with contextlib.suppress(FileNotFoundError):
                    found.append((path.stat().st_mtime_ns, path))
        return [path for _, path in sorted(found)]


def _about(intent: _Intent) -> dict[str, Any]:
    """What a line of the server's log says of the adapter."""
    return {"adapter": intent.adapter, "version": intent.details.get("version")}


def _unknown(intent: _Intent) -> _Intent:
    return replace(intent, details={**intent.details, "decision": "unknown"})


def _start(name: str) -> str:
    """With which the files of a name begin."""
    return hashlib.sha256(name.encode()).hexdigest()[:16] + "-"


def _read(path: Path) -> _Intent | None:
    try:
        return _Intent(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
