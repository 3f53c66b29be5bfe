"""The catalogue of a folder of projected adapters: one record for each, written whole or not at all.

``OUT/NAME/`` is a projected adapter, ``OUT/.catalogue/NAME.json`` its record. Both change under one lock, the
record first and last. A killed run leaves the old result, the new one, or a record that says "not done".
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safelora_vllm.adapters.read import CONFIG, WEIGHTS, joined_digest
from safelora_vllm.errors import Reason, UsageError
from safelora_vllm.files import (
    locked,
    make_folder,
    put_folder,
    remove_folder,
    replace_file,
    sha256_of,
)

FOLDER = ".catalogue"
ACCEPTED, REFUSED, FAILED = "accepted", "refused", "failed"
_STARTED = "started"
_FORMAT = 1


@dataclass(frozen=True)
class ProjectionRecord:
    """What became of one adapter of a folder.

    Attributes:
        name: of the adapter, and of the folder with the result.
        answer: ``accepted``; ``refused`` by the gate; or ``failed``, which means not judged, for instance
            since its process died.
        reasons: why it was refused or failed; in report-only mode, what enforcing would have refused it for.
        digest: of the adapter's content; empty where that could not be read.
        ruleset_digest: of the policy, the projectors and all else that the answer depends on.
        output_digest: of the result's two files; empty where there is none.
        modules: how many the adapter changes.
        projected: how many of them were projected.
        uncertain: how many of these only because their similarity is not known exactly; see `ModuleReport`.
        seconds: that reading, judging and writing took.
    """

    name: str
    answer: str
    reasons: tuple[Reason, ...] = ()
    digest: str = ""
    ruleset_digest: str = ""
    output_digest: str = ""
    modules: int = 0
    projected: int = 0
    seconds: float = 0.0
    uncertain: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; ``reasons`` is a list of ``{"code", "message"}``."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ProjectionRecord:
        """The inverse of `to_dict`."""
        return cls(**{**data, "reasons": tuple(Reason(**reason) for reason in data["reasons"])})


class Catalogue:
    """The records of ``out``. Safe for several processes and runs on one folder."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = out / FOLDER

    def create(self) -> None:
        """Make the folders.

        Raises:
            UsageError: they cannot be written.
        """
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            make_folder(self.folder)
        except OSError as error:
            raise unwritable(self.out, error) from error

    def get(self, name: str) -> ProjectionRecord | None:
        """A record; None where there is none, or none that can be read."""
        try:
            data = json.loads(self._file(name).read_bytes())
            if data.pop("format") != _FORMAT:
                return None
            record = ProjectionRecord.from_dict(data)
            return record if record.name == name else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None

    def check_mine(self, name: str) -> None:
        """Refuse to replace a folder that no run made.

        Raises:
            UsageError: there is something at ``OUT/NAME`` without a record.
        """
        if os.path.lexists(self.out / name) and not self._file(name).exists():
            raise UsageError(
                f"{self.out / name} exists and is not in the catalogue: remove it, or give another folder as "
                "`out`"
            )

    def intact(self, record: ProjectionRecord) -> bool:
        """Whether what a record says is there: both files with their bytes, or no folder."""
        folder = self.out / record.name
        if record.answer != ACCEPTED:
            return not os.path.lexists(folder)
        try:
            found = joined_digest(*(sha256_of(folder / file) for file in (CONFIG, WEIGHTS)))
        except OSError:
            return False
        return found == record.output_digest

    def put(self, record: ProjectionRecord, new: Path | None) -> None:
        """Move a result into its place, or remove an older one where there is none; then write its record.

        Raises:
            UsageError: the disk is full or not writable, or the place is somebody else's.
        """
        target = self.out / record.name
        try:
            with locked(self.folder):
                self.check_mine(record.name)
                self._write(dataclasses.replace(record, answer=_STARTED, output_digest=""))
                if new is not None:
                    put_folder(new, target, intact=lambda: False)
                elif os.path.lexists(target):
                    remove_folder(target)
                self._write(record)
        except OSError as error:
            raise unwritable(self.out, error) from error

    def _write(self, record: ProjectionRecord) -> None:
        data = {"format": _FORMAT, **record.to_dict()}
        replace_file(self._file(record.name), json.dumps(data, indent=1).encode())

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.json"


@contextlib.contextmanager
def written_to(out: Path) -> Generator[None]:
    """Name the folder of the results in what the operating system says about a full disk."""
    try:
        yield
    except OSError as error:
        raise unwritable(out, error) from error


def unwritable(out: Path, error: BaseException) -> UsageError:
    """The folder of the results cannot be written."""
    cause = getattr(error, "strerror", None) or error
    return UsageError(f"{out} cannot be written ({cause}): free space, or give another folder as `out`")
