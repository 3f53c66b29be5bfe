"""What exams found of published copies: ``exam/verdicts/<exam>/<key>.json``.

An exam is named by a digest of all that its scores depend on besides the copy. A score is of the very files
that were examined: where a copy was made again and has other bytes, it is as if it had not been examined.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safelora_vllm.exam.score import Score
from safelora_vllm.files import is_digest, make_folder, replace_file, writing
from safelora_vllm.store.layout import EXAM
from safelora_vllm.store.published import PublishedStore


@dataclass(frozen=True)
class Examined:
    """score: of a copy. seconds: that the exam took. files: name → sha256 of what was examined."""

    score: Score
    seconds: float
    files: dict[str, str]


class Verdicts:
    """Those of one exam. Safe for several processes on one root."""

    def __init__(self, root: str | Path, exam: str, published: PublishedStore) -> None:
        """exam: its digest."""
        if not is_digest(exam):
            raise ValueError(f"{exam!r} is not the digest of an exam")
        self._root, self._published = Path(root), published
        self._folder = self._root / EXAM / "verdicts" / exam
        self._known: dict[str, Examined] = {}

    def get(self, key: str) -> Examined | None:
        """What was found of a copy as it is now; None where it was not examined."""
        found = self._known.get(key) or self._read(key)
        if found is None or found.files != self._published.digests(key):
            self._known.pop(key, None)
            return None
        self._known[key] = found
        return found

    def known(self, key: str) -> Examined | None:
        """What `get` or `put` had last, without looking again."""
        return self._known.get(key)

    def put(self, key: str, found: Examined) -> None:
        """Keep what was found.

        Raises:
            StoreUnavailable: the disk is full or not writable.
        """
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


def _examined(data: Any) -> Examined:
    score = Score(**data["score"])
    figures = (score.drop, score.bound, score.worst, data["seconds"])
    if not all(type(figure) in (int, float) for figure in figures) or type(score.probes) is not int:
        raise TypeError("a score has numbers")
    return Examined(score, data["seconds"], dict(data["files"]))
