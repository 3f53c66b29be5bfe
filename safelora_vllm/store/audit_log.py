"""Who did what to which adapter, and when: JSON lines in ``audit.jsonl`` under one folder.

A file that is full becomes ``audit-<UTC time>.jsonl``; nothing is ever deleted. Several processes may
write at once. A record is in the file when `AuditLog.record` returns, but is not synced to disk.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

from safelora_vllm import __version__
from safelora_vllm.errors import StoreUnavailable, codes_of
from safelora_vllm.files import replace_file
from safelora_vllm.report import Report
from safelora_vllm.store.name_record import tenant_of

logger = logging.getLogger("vllm.safelora.audit")
SERVER = "server"  # the actor of decisions that no caller asked for
OPERATOR = "operator"  # of ``safelora-vllm store`` on the machine
REJUDGE, DELETE_VERSION, EXAM = "rejudge", "delete-version", "exam"
ACTIONS = ("upload", "load", "rollback", "policy", "delete", "unload", DELETE_VERSION, REJUDGE, EXAM)
# unchanged: a replacement by what is served. unknown: the change was interrupted, with a bucket.
DECISIONS = ("accepted", "refused", "removed", "unchanged", "unknown")
SEARCHED = 8 * 1024 * 1024  # bytes of the log's end in which `AuditLog.newest` looks
_ROTATED = re.compile(r"audit-(\d{8}T\d{6}\.\d{6}Z)\.jsonl")
_TIME = "%Y%m%dT%H%M%S.%fZ"
_REFUSED, _REMEMBERED = "refused", 20  # a folder with each tenant's newest refusals
_FOUND = "found.json"  # see `AuditLog.record`, once
_TOLD = ("time", "action", "adapter", "reasons")  # to a tenant


class AuditLog:
    """The log in ``folder``, which appears with the first record.

    max_bytes: of one file. echo: is told each record that was written.
    """

    def __init__(
        self,
        folder: Path,
        max_bytes: int = 64 * 1024 * 1024,
        echo: Callable[[dict[str, Any]], None] = lambda _: None,
    ) -> None:
        self.folder = folder
        self._echo = echo
        self._file = folder / "audit.jsonl"
        self._max_bytes = max_bytes

    def record(self, actor: str, action: str, adapter: str, *, once: str = "", **details: Any) -> None:
        """Append one record; ``details`` are JSON values.

        Args:
            once: what was found. Where it is what the adapter's last record with a ``once`` was made for,
                there is none: several servers, and each start, may say the same.

        Raises:
            StoreUnavailable: the disk is full or not writable; the record is not in the log.
            TypeError, ValueError: a detail that JSON does not have; the caller's mistake.
        """
        record = {"time": "", "actor": actor, "action": action, "adapter": adapter, **details}
        try:
            with self._locked():
                if once and self._found().get(adapter) == once:
                    return
                now = datetime.now(UTC)  # under the lock, so that lines stand in the order of their times
                record["time"] = now.isoformat(timespec="microseconds")
                self._append(json.dumps(record, allow_nan=False).encode() + b"\n", now)
                if record.get("decision") == "refused" and (tenant := tenant_of(adapter)):
                    self._remember(tenant, record)
                if once:
                    replace_file(self.folder / _FOUND, json.dumps({**self._found(), adapter: once}).encode())
        except OSError as error:
            raise StoreUnavailable(
                f"the audit log {self.folder} cannot be written ({error.strerror}); free space or fix "
                "its permissions, then repeat the call"
            ) from error
        with contextlib.suppress(OSError, ValueError):  # after the lock: its reader may be slow, or gone
            self._echo(record)

    def read(self, since: datetime | None = None, until: datetime | None = None) -> Iterator[dict[str, Any]]:
        """Records with since ≤ time < until, oldest first. Both are aware of their time zone.

        What a crash left of a line is passed over; at the end one warning says how often.
        """
        damaged = 0
        for line in self._lines(since):
            try:
                record = json.loads(line)
                time = datetime.fromisoformat(record["time"])
                wanted = (since is None or since <= time) and (until is None or time < until)
            except (ValueError, KeyError, TypeError):
                damaged += 1
                continue
            if wanted:
                yield record
        if damaged:
            logger.warning("audit log %s: passed over %d damaged lines", self.folder, damaged)

    def refusals(self, tenant: str) -> list[dict[str, Any]]:
        """The newest refusals of adapters that a tenant owns, oldest first: at most 20.

        The time that this takes does not depend on what others did.
        """
        try:
            found = json.loads(self._refused(tenant).read_bytes())
            return [record for record in found if isinstance(record, dict)]
        except (OSError, ValueError, TypeError):
            return []

    def newest(
        self, wanted: Callable[[dict[str, Any]], bool], most: int, **fields: str | None
    ) -> tuple[list[dict[str, Any]], bool]:
        """The newest records that are wanted, newest first, in the last ``SEARCHED`` bytes of the log.

        Args:
            wanted: whether a record is.
            most: records that are given.
            fields: with what the value of a field begins in all wanted records. The other lines are not
                parsed, which takes most of the time.

        Returns:
            The records, and whether there are no older ones.
        """
        found: list[dict[str, Any]] = []
        parts = [f'"{name}": {json.dumps(v)[:-1]}'.encode() for name, v in fields.items() if v is not None]
        left = SEARCHED
        for path in (self._file, *(path for path, _ in reversed(self._rotated()))):
            lines, left, whole = _last_lines(path, left)
            for line in reversed(lines):
                if not all(part in line for part in parts):
                    continue
                try:
                    record = json.loads(line)
                except ValueError:
                    continue  # what a crash left
                if isinstance(record, dict) and wanted(record):
                    if len(found) == most:
                        return found, False
                    found.append(record)
            if not whole:
                return found, False
        return found, True

    def _found(self) -> dict[str, str]:
        """Adapter → what its last record with a ``once`` was made for."""
        with contextlib.suppress(OSError, ValueError, TypeError):
            return dict(json.loads((self.folder / _FOUND).read_bytes()))
        return {}

    def _remember(self, tenant: str, record: dict[str, Any]) -> None:
        """Keep a refusal for its tenant. The log has it already: nothing is lost if this fails."""
        kept = [*self.refusals(tenant), {name: record.get(name, []) for name in _TOLD}][-_REMEMBERED:]
        file = self._refused(tenant)
        with contextlib.suppress(OSError):
            file.parent.mkdir(mode=0o700, exist_ok=True)
            replace_file(file, json.dumps(kept).encode())

    def _refused(self, tenant: str) -> Path:
        return self.folder / _REFUSED / f"{quote(tenant, safe='')}.json"

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Make the folder if need be, and keep all other writers out."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(lock, fcntl.LOCK_UN)  # closing is not enough if a child was forked meanwhile
        finally:
            os.close(lock)

    def _append(self, line: bytes, now: datetime) -> None:
        """One write at the end of the file, or of a new one when this is full."""
        size = self._file.stat().st_size if self._file.exists() else 0
        if size and size + len(line) > self._max_bytes:
            self._file.rename(self._name_for_rotated(now))
        file = os.open(self._file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            size = os.fstat(file).st_size
            if size and os.pread(file, 1, size - 1) != b"\n":
                line = b"\n" + line  # its writer was killed midway
            if os.write(file, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(file)

    def _name_for_rotated(self, now: datetime) -> Path:
        """A name that sorts behind all others, even if the clock was set back."""
        for _, last in self._rotated()[-1:]:
            now = max(now, last + timedelta(microseconds=1))
        return self.folder / f"audit-{now.strftime(_TIME)}.jsonl"

    def _rotated(self) -> list[tuple[Path, datetime]]:
        """Full files with the time when they were closed, oldest first."""
        if not self.folder.exists():
            return []
        found = [
            (path, match[1]) for path in self.folder.iterdir() if (match := _ROTATED.fullmatch(path.name))
        ]
        return [(path, datetime.strptime(t, _TIME).replace(tzinfo=UTC)) for path, t in sorted(found)]

    def _lines(self, since: datetime | None) -> Iterator[bytes]:
        """The lines of all files that were not closed before ``since``."""
        while True:
            rotated = self._rotated()
            with self._open_current() as current:
                if rotated != self._rotated():
                    continue  # a file that was rotated in between would be in neither
                for path, closed in rotated:
                    if since is None or since <= closed:
                        with path.open("rb") as stream:
                            yield from stream
                yield from current
                return

    def _open_current(self) -> BinaryIO:
        try:
            return self._file.open("rb")
        except FileNotFoundError:
            return io.BytesIO()


def _last_lines(path: Path, most: int) -> tuple[list[bytes], int, bool]:
    """Whole lines in a file's last ``most`` bytes, what is left of ``most``, and whether they are all."""
    try:
        with path.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            begin = max(0, size - most)
            stream.seek(begin)
            lines = stream.read(size - begin).splitlines()
    except FileNotFoundError:
        return [], most, True  # none yet, or it was rotated meanwhile
    return lines[1:] if begin else lines, most - (size - begin), not begin


def audit_fields(report: Report, decision: str) -> dict[str, Any]:
    """What a record says of a report. decision: one of `DECISIONS`."""
    return {
        "decision": decision,
        "digest": report.digest,
        "projectors": report.projectors,
        "policy": report.to_dict()["policy"],
        "reasons": codes_of(report.reasons),
        "release": __version__,
        **({"signed_by": report.signed_by} if report.signed_by else {}),
    }
