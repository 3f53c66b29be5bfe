"""What exams found of published copies: ``exam/verdicts/<exam>/<key>.json``.

An exam is named by a digest of all that its scores depend on besides the copy. A score is of the very files
that were examined: where a copy was made again and has other bytes, it is as if it had not been examined.
Another copy with the same files has the same score.
The first half of the probes and the held-out half are two exams.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safelora_vllm.errors import StoreUnavailable
from safelora_vllm.exam.score import Score
from safelora_vllm.files import is_digest, make_folder, replace_file, settled, writing
from safelora_vllm.store.layout import EXAM
from safelora_vllm.store.published import PublishedStore
from safelora_vllm.store.verdict_pruning import VERDICTS


@dataclass(frozen=True)
class Examined:
    """score: of a copy. seconds: that the exam took. files: name → sha256 of what was examined.

    at: when it ended, seconds since 1970. over_refusal: the share of harmless prompts that the copy refuses
    and the aligned model does not; None where nobody asked.
    """

    score: Score
    seconds: float
    files: dict[str, str]
    at: float = 0.0
    over_refusal: float | None = None


class Verdicts:
    """Those of one exam. Safe for several processes on one root."""

    def __init__(self, root: str | Path, exam: str, published: PublishedStore) -> None:
        """exam: its digest."""
        if not is_digest(exam):
            raise ValueError(f"{exam!r} is not the digest of an exam")
        self._root, self._published = Path(root), published
        self._folder = self._root / EXAM / VERDICTS / exam
        self._known: dict[str, Examined] = {}
        self._stamp, self._stamps = -1, dict[str, int]()
        self._seen: dict[str, tuple[int, Examined | None]] = {}  # key → its file's time, what that has

    def get(self, key: str) -> Examined | None:
        """What was found of a copy as it is now; None where it was not examined."""
        known = self._known.get(key)
        return self._checked(key, known if known and known.score.is_whole else self._read(key))

    def of_same_files(self, key: str) -> Examined | None:
        """`get`; or what was found of another copy with the same files, which counts for this one then.

        Two policies may publish the same bytes. Of several scores of the same bytes, the worst one counts,
        and one of all probes before one that ended early.

        Raises:
            StoreUnavailable: the verdicts cannot be read, or the disk is full or not writable.
        """
        known = self.get(key)
        if (known and known.score.is_whole) or not (files := self._published.digests(key)):
            return known
        same = [found for found in self._all() if found.files == files]
        if not same:
            return None
        found = max(same, key=_weight)
        if found != known:
            self.put(key, found)
        return found

    def share(self, keys: Collection[str]) -> None:
        """`of_same_files` of many copies, in one look.

        Raises:
            StoreUnavailable: the verdicts cannot be read, or the disk is full or not writable.
        """
        worst: dict[frozenset[tuple[str, str]], Examined] = {}
        for found in sorted(self._all(), key=_weight):
            worst[frozenset(found.files.items())] = found
        for key in keys:
            known = self.get(key)
            if (known and known.score.is_whole) or not (files := self._published.digests(key)):
                continue
            same = worst.get(frozenset(files.items()))
            if same is not None and same != known:
                self.put(key, same)

    def _all(self) -> list[Examined]:
        """Every verdict of the exam. Reads the files that have changed since the last call.

        Raises:
            StoreUnavailable: they cannot be seen.
        """
        seen: dict[str, tuple[int, Examined | None]] = {}
        try:
            with contextlib.suppress(FileNotFoundError), os.scandir(self._folder) as files:
                for file in files:
                    key = file.name.removesuffix(".json")
                    if not is_digest(key):  # one that is being written
                        continue
                    with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                        stamp = file.stat().st_mtime_ns
                        before = self._seen.get(key)
                        seen[key] = before if before and before[0] == stamp else (stamp, self._read(key))
        except OSError as error:
            raise StoreUnavailable(f"{self._folder} cannot be read ({error.strerror}): try again") from error
        self._seen = seen
        return [found for _, found in seen.values() if found]

    def _checked(self, key: str, found: Examined | None) -> Examined | None:
        if found is None or found.files != self._published.digests(key):
            self._known.pop(key, None)
            return None
        self._known[key] = found
        return found

    def known(self, key: str) -> Examined | None:
        """What `get` or `put` had last, without looking again."""
        return self._known.get(key)

    def read_changed(self, keys: Collection[str]) -> bool:
        """Read again what any process has written since the last look. Cheap where none did.

        Returns:
            Whether there was something new of these keys.
        """
        try:
            stamp = self._folder.stat().st_mtime_ns
            if stamp == self._stamp:
                return False
            with os.scandir(self._folder) as files:
                stamps = {file.name.removesuffix(".json"): file.stat().st_mtime_ns for file in files}
        except OSError:  # nothing was examined yet, or a file has gone: the next look sees it
            return False
        changed = {key for key in {*keys, *self._known} if stamps.get(key) != self._stamps.get(key)}
        for key in changed:
            self._checked(key, self._read(key))
        self._stamp, self._stamps = settled(stamp), stamps
        return not changed.isdisjoint(keys)

    def put(self, key: str, found: Examined) -> None:
        """Keep what was found, but no part in the place of the whole, which another server may have found.

        Raises:
            StoreUnavailable: the disk is full or not writable.
        """
        before = None if found.score.is_whole else self._read(key)
        if before and before.score.is_whole and before.files == found.files:
            self._known[key] = before
            return
        with writing(self._root):
            make_folder(self._folder)
            replace_file(self._file(key), json.dumps(dataclasses.asdict(found), allow_nan=False).encode())
        self._known[key] = found

    def _file(self, key: str) -> Path:
        if not is_digest(key):
            raise ValueError(f"{key!r} is not a key of a published adapter")
        return self._folder / f"{key}.json"

    def _read(self, key: str) -> Examined | None:
        try:
            return _examined(json.loads(self._file(key).read_bytes()))
        except (OSError, ValueError, KeyError, TypeError):
            return None  # it is examined again


def _weight(found: Examined) -> tuple[bool, float]:
    """By which of several scores of the same files one counts: that of all probes, then the worst."""
    return found.score.is_whole, found.score.bound


def _examined(data: Any) -> Examined:
    score = Score(**data["score"])
    seconds, at = data["seconds"], data.get("at", 0.0)
    over_refusal = data.get("over_refusal")
    figures = (score.drop, score.bound, score.worst, seconds, at, over_refusal or 0.0)
    counts = (score.probes, score.left)
    if not all(type(figure) in (int, float) for figure in figures) or not all(type(n) is int for n in counts):
        raise TypeError("a score has numbers")
    return Examined(score, seconds, dict(data["files"]), at, over_refusal)
