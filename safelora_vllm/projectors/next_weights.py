"""Weights of linear layers in a known order, the next of which is read while the present one is used."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol

from torch import Tensor

from safelora_vllm.projectors.checkpoint import Checkpoint


class Weights(Protocol):
    """A `Checkpoint`, or what reads one ahead."""

    def linear(self, module: str) -> Tensor:
        """See `Checkpoint.linear`."""


class NextWeights:
    """`Checkpoint.linear` in the order of ``names``: at most one tensor is held that nobody asked for yet."""

    def __init__(self, checkpoint: Checkpoint, names: Sequence[str], thread: ThreadPoolExecutor) -> None:
        self._checkpoint, self._thread = checkpoint, thread
        self._following = dict(itertools.pairwise(names))
        self._waiting: dict[str, Future[Tensor]] = {}

    def linear(self, module: str) -> Tensor:
        """A weight, while the reading of the next one begins; see `Checkpoint.linear` for what it raises."""
        future = self._waiting.pop(module, None)
        tensor = future.result() if future else self._checkpoint.linear(module)
        if (following := self._following.get(module)) is not None:
            self._waiting[following] = self._thread.submit(self._checkpoint.linear, following)
        return tensor


@contextmanager
def weights_ahead(checkpoints: Sequence[Checkpoint], names: Sequence[str]) -> Iterator[list[NextWeights]]:
    """Readers of the same modules of several checkpoints."""
    thread = ThreadPoolExecutor(len(checkpoints), thread_name_prefix="next-weights")
    try:
        yield [NextWeights(checkpoint, names, thread) for checkpoint in checkpoints]
    finally:
        thread.shutdown(cancel_futures=True)
