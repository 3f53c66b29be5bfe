"""What became of the requests for each adapter: counters in memory that all API servers of a host share.

Each API server process writes a file of its own, in the private folder of its vLLM instance, and reads those
of the others: a scrape of any of them has the sums. The file is mapped into memory, so that counting writes
nothing to disk, and it ends with the server. Every adapter has one row. Rows are bounded: `MAX_ROWS`
adapters have their own, all others share the row `OTHERS`. The row of an adapter ends when the adapter is
removed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from safelora_vllm.gate.socket_folder import TRAFFIC as FILES

MAX_ROWS, OTHERS, BASE = 500, "(others)", ""  # the last: requests for the model itself
OUTCOMES = ("stop", "length", "abort", "error", "unavailable")
TTFT_BUCKETS = (0.1, 0.3, 1.0, 3.0, 10.0)  # seconds
TPOT_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1.0)
_NAME_BYTES, _BINS, _BIN_SECONDS = 320, 12, 300
_COUNTED = (
    *OUTCOMES, "prompt_tokens", "generation_tokens", "running", "waiting", "opinion_refused",
    *(f"ttft_{n}" for n in range(len(TTFT_BUCKETS) + 1)), "ttft_sum",
    *(f"tpot_{n}" for n in range(len(TPOT_BUCKETS) + 1)), "tpot_sum",
    *(f"hour_requests_{n}" for n in range(_BINS)), *(f"hour_tokens_{n}" for n in range(_BINS)),
)  # fmt: skip
_AT = {name: at for at, name in enumerate((*_COUNTED, "last_use", *(f"hour_{n}" for n in range(_BINS))))}
_TTFT, _TPOT = _AT["ttft_0"], _AT["tpot_0"]
_ROW = np.dtype([("name", f"S{_NAME_BYTES}"), ("values", "f8", (len(_AT),))])
Row = NDArray[np.float64]
logger = logging.getLogger("vllm.safelora.metrics")


@dataclass(frozen=True)
class Timings:
    """A histogram. counts: of each bucket by itself, the last without a bound. seconds: their sum."""

    bounds: tuple[float, ...]
    counts: tuple[float, ...]
    seconds: float

    @property
    def mean(self) -> float | None:
        """Seconds of one, None where there is none."""
        return self.seconds / sum(self.counts) if sum(self.counts) else None


@dataclass(frozen=True)
class Traffic:
    """The requests for one adapter, since the server started.

    Attributes:
        requests: outcome → how many have ended so.
        prompt_tokens, generation_tokens: of requests that have begun.
        running, waiting: requests now.
        opinion_refused: requests that the aligned model refused in the adapter's place.
        last_use: when a request last began or ended, in seconds since 1970; 0 for never.
        first_token: seconds from a request's arrival to its first token.
        each_token: seconds for each token after the first, one mean for each request.
        hour_requests, hour_tokens: requests that ended, and tokens that they generated, in the last 55 to 60
            minutes.
    """

    requests: Mapping[str, int]
    prompt_tokens: int
    generation_tokens: int
    running: int
    waiting: int
    opinion_refused: int
    last_use: float
    first_token: Timings
    each_token: Timings
    hour_requests: int
    hour_tokens: int


class TrafficTable:
    """The counters of one API server process. All methods but `snapshot` and `of` belong to its event loop.

    folder: where the files of all API servers of this vLLM instance are. max_rows: adapters with their own.
    """

    def __init__(self, folder: Path, max_rows: int = MAX_ROWS) -> None:
        self._folder = folder
        self.path = folder / f"{FILES[:-1]}{os.getpid()}-{secrets.token_hex(4)}"
        self._rows = _mapped(self.path, max_rows + 2)
        self._at = {OTHERS: 0, BASE: 1}
        self._rows["name"][0] = OTHERS
        self._free = list(range(max_rows + 1, 1, -1))
        self._opened: dict[Path, np.memmap] = {}
        self._opening = threading.Lock()

    def began(self, name: str) -> None:
        """A request for an adapter was given to the engine. It has a row from now on, if one is left."""
        self.serve(name)
        self._row(name)[_AT["last_use"]] = time.time()

    def prompt(self, name: str, tokens: int) -> None:
        """The tokens of its prompt are known."""
        self._row(name)[_AT["prompt_tokens"]] += tokens

    def ended(self, name: str, outcome: str, tokens: int = 0, now: float | None = None) -> None:
        """A request has ended. tokens: generated. now: seconds since 1970."""
        row, now = self._row(name), time.time() if now is None else now
        row[_AT[outcome]] += 1
        row[_AT["generation_tokens"]] += tokens
        row[_AT["last_use"]] = now
        number = int(now // _BIN_SECONDS)
        position = number % _BINS
        if row[_AT["hour_0"] + position] != number:
            row[_AT["hour_0"] + position] = number
            row[_AT["hour_requests_0"] + position] = row[_AT["hour_tokens_0"] + position] = 0
        row[_AT["hour_requests_0"] + position] += 1
        row[_AT["hour_tokens_0"] + position] += tokens

    def refused(self, name: str) -> None:
        """The aligned model refused in the adapter's place."""
        self._row(name)[_AT["opinion_refused"]] += 1

    def timed(self, name: str, first_token: float, each_token: float | None) -> None:
        """Seconds to a request's first token, and for each later one where there was one."""
        row = self._row(name)
        _observe(row, _TTFT, TTFT_BUCKETS, first_token)
        if each_token is not None:
            _observe(row, _TPOT, TPOT_BUCKETS, each_token)

    def in_flight(self, running: Mapping[str, int], waiting: Mapping[str, int]) -> None:
        """How many requests of this process there are now, by adapter."""
        values = self._rows["values"]
        values[:, _AT["running"]] = values[:, _AT["waiting"]] = 0
        for column, found in (("running", running), ("waiting", waiting)):
            for name, count in found.items():
                self._row(name)[_AT[column]] += count

    def keep_only(self, names: Collection[str]) -> None:
        """End the rows of adapters that are not among these. What still runs for one is for the others."""
        for name in [n for n in self._at if n not in names and n not in (OTHERS, BASE)]:
            at = self._at.pop(name)
            self._rows["name"][at] = b""
            self._rows["values"][at] = 0
            self._free.append(at)

    def serve(self, name: str) -> None:
        """Give an adapter a row, if there is one left."""
        encoded = name.encode()
        if name not in self._at and self._free and len(encoded) <= _NAME_BYTES:
            self._at[name] = at = self._free.pop()
            self._rows["name"][at] = encoded

    def snapshot(self) -> dict[str, Traffic]:
        """What all API servers of the host counted, by adapter. `BASE` is the model, `OTHERS` the rest.

        Safe in a thread. Figures of other processes that are written meanwhile may be in part.
        """
        return {name: _traffic(row.tolist()) for name, row in self._sums(None).items()}

    def of(self, name: str) -> Traffic | None:
        """Of one adapter, as `snapshot` has it; None where it has no row. Safe in a thread, too."""
        row = self._sums(name).get(name)
        return None if row is None else _traffic(row.tolist())

    def _sums(self, only: str | None) -> dict[str, Row]:
        """Rows by adapter, each the sum over all API servers. only: the one adapter that is wanted."""
        number = int(time.time() // _BIN_SECONDS)
        sums: dict[str, Row] = {}
        for rows in self._all_rows():
            names, values = rows["name"], rows["values"]
            if only is not None:
                chosen = np.flatnonzero(names == only.encode())
                names, values = names[chosen], values[chosen]
            names, values = names.copy(), np.array(values)
            bins = values[:, _AT["hour_0"] :]
            old = (bins <= number - _BINS) | (bins > number)
            for column in ("hour_requests_0", "hour_tokens_0"):
                values[:, _AT[column] : _AT[column] + _BINS][old] = 0
            model = () if only is not None else (1,)
            for at in (*model, *np.flatnonzero(names != b"")):
                name, row = names[at].decode(errors="replace"), values[at]
                if name in sums:
                    sums[name][: len(_COUNTED)] += row[: len(_COUNTED)]
                    sums[name][_AT["last_use"]] = max(sums[name][_AT["last_use"]], row[_AT["last_use"]])
                else:
                    sums[name] = row
        return sums

    def close(self) -> None:
        """Remove the file."""
        self.path.unlink(missing_ok=True)

    def _row(self, name: str) -> Row:
        row: Row = self._rows["values"][self._at.get(name, 0)]
        return row

    def _all_rows(self) -> Iterator[NDArray[np.void]]:
        """Of this process, and of each other one whose file is whole."""
        yield self._rows
        with self._opening:  # a scrape and a call may look at once
            found = set(self._folder.glob(FILES)) - {self.path}
            for gone in self._opened.keys() - found:
                del self._opened[gone]
            for path in found - self._opened.keys():
                with contextlib.suppress(OSError, ValueError):  # it is being made, or removed
                    self._opened[path] = np.memmap(path, _ROW, "r")
            others = [rows for _, rows in sorted(self._opened.items(), key=lambda item: item[0])]
        yield from (rows for rows in others if len(rows) > 1)


def _mapped(path: Path, rows: int) -> np.memmap | NDArray[np.void]:
    """Zeros in a new file, or in this process's own memory where there is no room for a file.

    The file's blocks are taken at once: writing to a page without room on the disk would end the process.
    """
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.posix_fallocate(file, 0, rows * _ROW.itemsize)
        finally:
            os.close(file)
        return np.memmap(path, _ROW, "r+", shape=(rows,))
    except OSError as error:
        logger.warning("requests are not counted for other API servers: %s cannot be made (%s)", path, error)
        path.unlink(missing_ok=True)
        return np.zeros(rows, _ROW)


def _observe(row: Row, first: int, bounds: tuple[float, ...], seconds: float) -> None:
    row[first + sum(seconds > bound for bound in bounds)] += 1
    row[first + len(bounds) + 1] += seconds


def _traffic(row: list[float]) -> Traffic:
    def timings(first: int, bounds: tuple[float, ...]) -> Timings:
        end = first + len(bounds) + 1
        return Timings(bounds, tuple(row[first:end]), row[end])

    def hour(column: str) -> int:
        return int(sum(row[_AT[column] : _AT[column] + _BINS]))

    return Traffic(
        requests={outcome: int(row[_AT[outcome]]) for outcome in OUTCOMES},
        prompt_tokens=int(row[_AT["prompt_tokens"]]),
        generation_tokens=int(row[_AT["generation_tokens"]]),
        running=int(row[_AT["running"]]),
        waiting=int(row[_AT["waiting"]]),
        opinion_refused=int(row[_AT["opinion_refused"]]),
        last_use=row[_AT["last_use"]],
        first_token=timings(_TTFT, TTFT_BUCKETS),
        each_token=timings(_TPOT, TPOT_BUCKETS),
        hour_requests=hour("hour_requests_0"),
        hour_tokens=hour("hour_tokens_0"),
    )
