"""The registry of projection methods. One file each, which says all that has to be known of it.

To add one, write its file, with a `Method` at its end, and name it in `METHODS`.
"""

from __future__ import annotations

from safelora_vllm.methods import csulora, input_removal, safe_lora
from safelora_vllm.methods.method import Method

METHODS: dict[str, Method] = {
    method.name: method for method in (safe_lora.METHOD, input_removal.METHOD, csulora.METHOD)
}

__all__ = ["METHODS", "Method"]
