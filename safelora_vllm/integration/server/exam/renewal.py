"""``--exam-probes FILE`` is read again when it changes.

The aligned model is asked first. From the moment that it has answered, all verdicts by former probes are of
another exam. What is served is judged anew in the background, as after an edit of the keys file, and is
served by its old verdict until then.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from safelora_vllm.errors import UsageError
from safelora_vllm.files import states
from safelora_vllm.integration.server.exam.examiner import Examiner
from safelora_vllm.integration.server.exam.sheets import Sheets

logger = logging.getLogger("vllm.safelora.exam")
Stamp = tuple[object, ...]


class Renewal:
    """The file of one API server process.

    problem: why the file as it is now is not in force; empty where it is.
    """

    def __init__(self, file: Path, read: Callable[[], Sheets], stamp: Stamp) -> None:
        """read: makes sheets of the file as it is now. stamp: of the file when it was read last."""
        self._file, self._read, self._stamp = file, read, stamp
        self._working, self.problem = False, ""

    async def look(self, examiner: Examiner) -> None:
        """Begin to take over the file in the background, if it has changed. For each heartbeat."""
        stamp = await asyncio.to_thread(stamp_of, self._file)
        if stamp != self._stamp and not self._working:
            self._stamp, self._working = stamp, True
            examiner.background.spawn(self._renew(examiner))

    async def _renew(self, examiner: Examiner) -> None:
        try:
            new = await asyncio.to_thread(self._read)
            if new.first.digest != examiner.sheets.first.digest:
                await new.first.reference()
                examiner.sheets = new
                logger.info("exam: %s was read again. All adapters are examined anew", self._file)
            self.problem = ""
        except Exception as error:  # the engine raises what it likes
            if not isinstance(error, UsageError):
                self._stamp = ()  # a moment is to blame: once more at the next look
            problem = f"{self._file}: {type(error).__name__}: {error}. The probes read before stay in force"
            if problem != self.problem:
                logger.error("%s", problem)
            self.problem = problem
        finally:
            self._working = False


def stamp_of(file: Path) -> Stamp:
    """What differs when a file was written, replaced or removed."""
    try:
        return states([file])
    except OSError:
        return ("missing",)
