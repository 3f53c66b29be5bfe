"""Keeping the store small and finding what is wrong with it. Nothing here is needed to serve.

A published copy may go when it can be made again from raw, no name serves its content, and nobody used
it lately. Raw content may go when no version of any name refers to it; while a name's record is
damaged it is not known what it refers to, so that none may go.
"""

from __future__ import annotations

import contextlib
import json
import stat
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from safelora_vllm.errors import GuardError, StoreDamaged
from safelora_vllm.files import (
    STALE_SECONDS,
    is_digest,
    leftovers,
    remove_folder,
    remove_leftovers,
    writing,
)
from safelora_vllm.store.layout import EXAM, FOLDERS, IDS, INCOMING
from safelora_vllm.store.names import REMEDY, AdapterRecord, NameStore
from safelora_vllm.store.published import REPORT, PublishedStore
from safelora_vllm.store.raw import RawStore

_MIN_AGE_SECONDS = 3600.0


@dataclass(frozen=True)
class Collected:
    """What was removed, by key or digest, and the sizes in bytes of what that was and of what is left."""

    removed: tuple[str, ...]
    freed: int
    left: int


@dataclass(frozen=True)
class Problem:
    """Something wrong in the store: where, what, and what to do about it."""

    where: str
    found: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.where}: {self.found}; {self.remedy}"


Check = Callable[[], Problem | None]


def collect(root: str | Path, max_bytes: int, min_age_seconds: float = _MIN_AGE_SECONDS) -> Collected:
    """Remove published copies, least recently used first, until all of them take ``max_bytes``.

    Raises:
        StoreUnavailable: the store cannot be read or written.
    """
    raw, copies = RawStore(root), _copies(root)
    live = {record.live.digest for record in NameStore(root).all().values()}
    left, removed = sum(copy.nbytes for copy in copies), []
    for copy in copies:
        if left <= max_bytes:
            break
        digest = copy.digest()
        if digest is None or digest in live or not raw.has(digest):
            continue
        if copy.remove(min_age_seconds):
            removed.append(copy)
            left -= copy.nbytes
    return Collected(tuple(copy.folder.name for copy in removed), sum(c.nbytes for c in removed), left)


def unreferenced_raw(root: str | Path, min_age_seconds: float = _MIN_AGE_SECONDS) -> list[str]:
    """Digests of raw content that no version of any name refers to, kept longer ago than that.

    Raises:
        StoreDamaged: a name's record cannot be read, so that it is not known what it refers to.
    """
    names, raw, found = NameStore(root), RawStore(root), []
    for path, wrong in sorted(names.damaged().items()):
        raise StoreDamaged(f"{path} may refer to some of it, but is {wrong}; {REMEDY}")
    referenced = _references(names.all())
    for digest in raw.all():
        with contextlib.suppress(FileNotFoundError):
            age = time.time() - raw.path(digest).stat().st_mtime
            if digest not in referenced and age >= min_age_seconds:
                found.append(digest)
    return found


def collect_unreferenced(root: str | Path, min_age_seconds: float = _MIN_AGE_SECONDS) -> Collected:
    """Remove unreferenced raw content and, before it, the published copies that were made of it.

    Raw content of which a copy was used lately stays for now.
    """
    raw, freed = RawStore(root), 0
    removed: list[str] = []
    unreferenced, copies = unreferenced_raw(root, min_age_seconds), defaultdict(list)
    for copy in _copies(root) if unreferenced else []:
        copies[copy.digest()].append(copy)
    for digest in unreferenced:
        of_it = copies[digest]
        gone = [copy for copy in of_it if copy.remove(min_age_seconds)]
        freed += sum(copy.nbytes for copy in gone)
        removed += [copy.folder.name for copy in gone]
        nbytes = raw.nbytes(digest)
        if len(gone) == len(of_it) and raw.remove(digest, min_age_seconds):
            removed.append(digest)
            freed += nbytes
    return Collected(tuple(removed), freed, sum(map(raw.nbytes, raw.all())))


def verify(
    root: str | Path,
    progress: Callable[[list[Check]], Iterable[Check]] = iter,
    stale_seconds: float = STALE_SECONDS,
) -> list[Problem]:
    """Read the whole store and say what is wrong in it. Changes nothing.

    progress: wraps the list of checks, one for each raw and each published folder, as tqdm does.
    """
    names = NameStore(root)
    problems = [Problem(str(path), wrong, REMEDY) for path, wrong in sorted(names.damaged().items())]
    try:
        names.next_id()
    except StoreDamaged as error:
        problems.append(
            Problem(str(Path(root) / IDS), str(error), "uploads and changes answer 503 until then")
        )
    references, raw = _references(names.all()), RawStore(root)
    checks = [_check_raw(raw, digest, references) for digest in sorted({*raw.all(), *references})]
    published = PublishedStore(root)
    checks += [_check_published(published, key) for key in published.all()]
    problems += [problem for check in progress(checks) if (problem := check()) is not None]
    for place in FOLDERS:
        for path in leftovers(Path(root) / place, stale_seconds, place == INCOMING):
            problems.append(Problem(str(path), "a killed process left it behind", "gc removes it"))
    return problems


def clean(root: str | Path, stale_seconds: float = STALE_SECONDS) -> None:
    """Remove what killed processes left behind, in all of the store's folders."""
    for place in FOLDERS:
        remove_leftovers(Path(root) / place, stale_seconds, place == INCOMING)


def check_store(root: str | Path) -> None:
    """Refuse a store to which every user of the machine may write.

    Raises:
        GuardError: with the folder and what to do.
    """
    for folder in (Path(root), *(Path(root) / place for place in (*FOLDERS, EXAM))):
        if folder.exists() and folder.stat().st_mode & stat.S_IWOTH:
            raise GuardError(
                f"every user may write to {folder}, and so decide what is served; take that away with "
                f"'chmod o-w {folder}', look at what lies in it, and start again"
            )


@dataclass(frozen=True)
class _Copy:
    """A published copy."""

    folder: Path
    nbytes: int
    used: float

    def digest(self) -> str | None:
        """Of the raw content that it was made of; None where its report does not say."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found = json.loads((self.folder / REPORT).read_bytes())["report"]["digest"]
            return found if isinstance(found, str) and is_digest(found) else None
        return None

    def remove(self, min_age_seconds: float) -> bool:
        """Remove it, unless it was used since it was listed or lately."""
        with writing(self.folder.parent), contextlib.suppress(FileNotFoundError):
            if time.time() - (self.folder / REPORT).stat().st_mtime < min_age_seconds:
                return False
            remove_folder(self.folder)
        return True


def _copies(root: str | Path) -> list[_Copy]:
    """All published copies, least recently used first. One without a report counts, but never goes."""
    published, found = PublishedStore(root), []
    for key in published.all():
        folder = published.path(key)
        with contextlib.suppress(OSError):  # somebody else removes it
            sizes = {file.name: file.stat() for file in folder.iterdir()}
            used = sizes[REPORT].st_mtime if REPORT in sizes else 0.0
            found.append(_Copy(folder, sum(status.st_size for status in sizes.values()), used))
    return sorted(found, key=lambda copy: copy.used)


def _references(records: dict[str, AdapterRecord]) -> dict[str, list[str]]:
    """Digest → the versions that refer to it, in words."""
    found: dict[str, list[str]] = {}
    for name, record in sorted(records.items()):
        for version in record.versions:
            live = ", which is served" if version.version == record.current else ""
            found.setdefault(version.digest, []).append(f"version {version.version} of {name!r}{live}")
    return found


def _check_raw(raw: RawStore, digest: str, references: dict[str, list[str]]) -> Check:
    def check() -> Problem | None:
        wrong = raw.damaged(digest)
        if wrong is None:
            return None
        where = str(raw.path(digest))
        if digest in references:
            users = "; ".join(references[digest])
            return Problem(where, wrong, f"upload the adapter again ({users})")
        return Problem(where, wrong, "no name refers to it: gc --unreferenced removes it")

    return check


def _check_published(published: PublishedStore, key: str) -> Check:
    def check() -> Problem | None:
        if published.find(key) is not None or not published.path(key).exists():
            return None
        where = str(published.path(key))
        return Problem(where, "the copy is damaged", "delete the folder; the next load makes it again")

    return check
