"""Projection methods: weights and cache in, new A and B out. One file each.

A method is a function ``project(delta, policy) -> (A', B')``. Adding one: a file here, a line in
`METHODS`, and its name in `safelora_vllm.policy.METHOD_NAMES`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from safelora_vllm.methods import csulora, input_removal, safe_lora
from safelora_vllm.methods.delta import ModuleDelta, Served
from safelora_vllm.policy import Policy

Method = Callable[[ModuleDelta, Policy], tuple[Tensor, Tensor]]

METHODS: dict[str, Method] = {
    "safe-lora": safe_lora.project,
    "input-removal": input_removal.project,
    "csulora": csulora.project,
}
# Those that read the projectors' output bases, which take memory that the others do not need.
READ_OUTPUT_BASES = {"csulora"}

__all__ = ["METHODS", "READ_OUTPUT_BASES", "Method", "ModuleDelta", "Served"]
