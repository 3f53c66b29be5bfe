"""``VLLM_ALLOW_RUNTIME_LORA_UPDATING``: platforms set it; it is switched off before vLLM acts on it.

The variable opens ways in that no gate's manager sees: vLLM's own loading routes, SageMaker's ``/adapters``
without a key, and resolvers. This package has the loading routes without it. Imports no vllm.
"""

from __future__ import annotations

import logging
import multiprocessing
import os

from safelora_vllm.errors import GuardError

VARIABLE = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"
logger = logging.getLogger("vllm.safelora.plugin")


def is_on() -> bool:
    """As vLLM reads it (``vllm/envs.py``)."""
    return os.environ.get(VARIABLE, "").strip().lower() in ("1", "true")


def switch_off() -> None:
    """Switch the variable off for this process and those that it will start.

    A process that multiprocessing started keeps it: its parent has it too, so the parent runs without the
    plugin and may have opened vLLM's routes. `check_off` refuses there.
    """
    if is_on() and multiprocessing.parent_process() is None:
        os.environ[VARIABLE] = "0"
        logger.info(
            "%s is switched off: load_lora_adapter and unload_lora_adapter work without it, and vLLM's other "
            "ways to load adapters stay closed",
            VARIABLE,
        )


def check_off() -> None:
    """Before a worker or a front end is guarded.

    Raises:
        GuardError: the variable is on, so a front end may have loading routes that are not guarded.
    """
    if is_on():
        raise GuardError(
            f"{VARIABLE} is on, and the process that started this one has not loaded safelora: it may have "
            f"loading routes without a key. Set VLLM_PLUGINS=safelora where the server starts, or unset "
            f"{VARIABLE}"
        )
