"""Adapters read beside the engine's steps, before the engine is asked to put them into its pool.

vLLM reads and pins an adapter between two steps, the guard checks it there, and every stream waits meanwhile:
a quarter of a second for an adapter of 80 MB. Here a thread does that first. A load takes what was read, and
waits for the thread no longer than a small adapter takes: a store that hangs must not stop the engine.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform

from safelora_vllm.errors import StoreUnavailable

logger = logging.getLogger("vllm.safelora.worker")
_KEPT = 4  # adapters that are being read or wait to be taken; each takes its size in memory
_FORGOTTEN_SECONDS = 10.0  # since somebody asked: whoever wants an adapter asks many times a second

Identity = tuple[int, str]  # vLLM's id and the path, which names the published copy


class NotReadYet(StoreUnavailable):
    """An adapter is still being read, and the engine's steps do not wait for it."""


class ReadAhead:
    """What one worker has read, or is reading. Its methods return at once.

    read: what the engine would do, with all its checks. device: of the worker; pinned memory belongs to it.
    """

    def __init__(self, read: Callable[[LoRARequest], LoRAModel], device: torch.device) -> None:
        self._read = read
        self._lock = threading.Lock()
        self._reads: dict[Identity, Future[LoRAModel]] = {}
        self._asked: dict[Identity, float] = {}
        self._thread = ThreadPoolExecutor(1, "safelora-read", _use_device, (device,))

    def begin(self, request: LoRARequest) -> bool:
        """Begin to read an adapter, once, when there is room. Whether that has ended, well or not.

        Those that somebody still asks for are not dropped for others: they would be read again and again.
        """
        with self._lock:
            place, now = _identity(request), time.monotonic()
            self._forget_old(now)
            if place not in self._reads:
                if len(self._reads) >= _KEPT:
                    return False
                self._reads[place] = self._thread.submit(self._read, request)
            self._asked[place] = now
            return self._reads[place].done()

    def forget_old(self) -> None:
        """Drop what nobody asks for any more: it may be gigabytes."""
        with self._lock:
            self._forget_old(time.monotonic())

    def _forget_old(self, now: float) -> None:
        for other in [place for place, asked in self._asked.items() if now - asked > _FORGOTTEN_SECONDS]:
            self._drop(other)

    def _drop(self, place: Identity) -> Future[LoRAModel] | None:
        self._asked.pop(place, None)
        if (reading := self._reads.pop(place, None)) is not None:
            reading.cancel()
        return reading

    def read(self, request: LoRARequest, seconds: float) -> LoRAModel:
        """What was read, once, or is read within some seconds.

        Raises:
            NotReadYet: it is not read by then. It goes on being read.
            Exception: whatever reading raised.
        """
        self.begin(request)
        with self._lock:
            reading = self._reads.get(_identity(request))
        if reading is None or not wait([reading], seconds).done:
            raise NotReadYet(f"{request.lora_name} has not been read yet; load it again")
        with self._lock:
            self._drop(_identity(request))
        return reading.result()

    def take(self, request: LoRARequest) -> LoRAModel | None:
        """What was read, once; None where it is not there: then the engine reads, and says what is wrong."""
        with self._lock:
            reading = self._drop(_identity(request))
        if reading is None or reading.cancelled() or not reading.done():
            return None
        if error := reading.exception():
            found = "adapter %r could not be read ahead (%s)"
            logger.info(found, request.lora_name, error, extra=about(request))
            return None
        return reading.result()


def about(request: Any) -> dict[str, object]:
    """What a line of the log says of the adapter. A worker does not know its version, but the copy."""
    return {"adapter": request.lora_name, "copy": request.lora_path}


def _use_device(device: torch.device) -> None:
    if device.type != "cpu":
        current_platform.set_device(device)


def _identity(request: Any) -> Identity:
    return request.lora_int_id, request.lora_path
