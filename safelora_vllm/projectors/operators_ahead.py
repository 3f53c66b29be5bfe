"""Ĉ and V that are not on the device, fetched one module ahead of their use.

Two buffers are on the device: a thread fills one while the other is used. On another device than a CPU the
copy into it is one from pinned memory, on a stream of its own. That part was not run: it needs such a device.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch
from torch import Tensor

Read = Callable[[str, Tensor], Tensor]


class OperatorsAhead:
    """Fetches tensors in the order in which they will be asked for.

    nbytes: of both buffers together. read: of a key and a buffer (n,) uint8 on the CPU, the tensor in host
    memory, which may be in that buffer.
    """

    def __init__(self, nbytes: int, device: torch.device, read: Read) -> None:
        self._device, self._read = device, read
        self._buffers = [torch.empty(nbytes // 2, dtype=torch.uint8, device=device) for _ in range(2)]
        self._copies = None if device.type == "cpu" else _Copies(nbytes // 2, device)
        self._thread = ThreadPoolExecutor(1, "safelora-operators-ahead")
        self._in_use = threading.Lock()
        self._owner: int | None = None
        self._waiting: deque[str] = deque()
        self._fetched: deque[tuple[str, Future[Tensor]]] = deque()
        self._submitted, self._taken = 0, False

    @contextlib.contextmanager
    def following(self, keys: Sequence[str]) -> Iterator[None]:
        """Fetch these while the block takes them. A second block at the same time goes without."""
        if not self._in_use.acquire(blocking=False):
            yield
            return
        try:
            self._owner, self._waiting = threading.get_ident(), deque(keys)
            self._submit()
            self._submit()
            yield
        finally:
            self._owner = None
            wait([future for _, future in self._fetched])
            self._fetched.clear()
            self._submitted, self._taken = 0, False
            self._in_use.release()

    def take(self, key: str, device: torch.device) -> Tensor | None:
        """The tensor, whose memory is used again once another one was taken; None if it is not the next.

        Raises:
            ProjectorCacheError: as `read` does.
        """
        if self._owner != threading.get_ident() or device != self._device:
            return None
        if not self._fetched or self._fetched[0][0] != key:
            return None
        if self._taken:  # the work with the one before has been asked for: its buffer is free
            self._submit()
        self._taken = True
        return self._fetched.popleft()[1].result()

    def _submit(self) -> None:
        if not self._waiting:
            return
        key, buffer = self._waiting.popleft(), self._buffers[self._submitted % 2]
        used = self._copies.mark() if self._copies else None
        self._fetched.append((key, self._thread.submit(self._fetch, key, buffer, used)))
        self._submitted += 1

    def _fetch(self, key: str, buffer: Tensor, used: Any) -> Tensor:
        if self._copies is None:
            return self._read(key, buffer)
        return self._copies.copy(self._read(key, self._copies.bounce), buffer, used)


class _Copies:
    """Copies from pinned memory, beside the work of the device."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self._torch, self._device = torch.get_device_module(device), device
        self._stream = self._torch.Stream(device=device)
        self.bounce = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def mark(self) -> Any:
        """All that the caller has asked the device for so far."""
        event = self._torch.Event()
        event.record(self._torch.current_stream(self._device))
        return event

    def copy(self, tensor: Tensor, buffer: Tensor, used: Any) -> Tensor:
        """The tensor in the buffer, once what was marked is done. Waits for the copy, not the device."""
        target = buffer[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        with self._torch.stream(self._stream):
            self._stream.wait_event(used)
            target.copy_(tensor, non_blocking=True)
        self._stream.synchronize()
        return target
