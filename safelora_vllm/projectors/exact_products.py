"""Products of float32 matrices in full precision, whatever the process or its image has set."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

_PRODUCTS = threading.RLock()
_PRECISION = "fp32_precision"  # since torch 2.9


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Products of float32 without TF32, sums of 16 bits in float32, whatever the process or image has set.

    TF32 has 10 bits: of what input removal takes out, a thousand times as much would stay. The settings are
    the process's: one caller at a time, and what was set is set again.
    """
    matmul = torch.backends.cuda.matmul
    sums = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    with _PRODUCTS:
        kept = {name: getattr(matmul, name) for name in sums}
        restore = _exact_float32()
        try:
            for name in sums:
                setattr(matmul, name, False)
            yield
        finally:
            restore()
            for name, value in kept.items():
                setattr(matmul, name, value)


def _exact_float32() -> Callable[[], None]:
    """Sets the precision; what sets it back. By the interface of torch that the process itself has used."""
    backends: tuple[Any, Any] = torch.backends.cuda, torch.backends.mkldnn
    products = [getattr(backend, "matmul", None) for backend in backends]
    places = [place for place in products if hasattr(place, _PRECISION)]
    values = [getattr(place, _PRECISION) for place in places]
    try:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
    except RuntimeError:  # the newer one, which does not mix with the other
        before = ""
        for place in places:
            setattr(place, _PRECISION, "ieee")

    def restore() -> None:
        if before:
            torch.set_float32_matmul_precision(before)
        for place, value in zip(places, values, strict=True):
            setattr(place, _PRECISION, value)

    return restore
