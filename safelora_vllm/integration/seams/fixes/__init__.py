"""Bugs of vLLM that we mend: one file each, with its upstream thread and what it needs of vLLM.

A fix is removed by deleting its file and its name here. docs/compatibility.md shows them all; a test
compares the two.
"""

from __future__ import annotations

import functools
import logging
import multiprocessing
import os

from safelora_vllm.errors import GuardError
from safelora_vllm.integration.seams.fixes.base_rows import BASE_ROWS
from safelora_vllm.integration.seams.fixes.clean_blocks import CLEAN_BLOCKS
from safelora_vllm.integration.seams.fixes.fix import Fix
from safelora_vllm.integration.seams.fixes.head import HEAD
from safelora_vllm.integration.seams.fixes.mixes import MIXES
from safelora_vllm.integration.seams.fixes.prefix_cache import PREFIX_CACHE
from safelora_vllm.integration.seams.fixes.ranks import RANKS
from safelora_vllm.integration.seams.fixes.unmapped import UNMAPPED
from safelora_vllm.integration.seams.fixes.versions import VERSIONS

logger = logging.getLogger("vllm.safelora.fixes")

SWITCH = "SAFELORA_VLLM_FIXES"
FIXES = (BASE_ROWS, CLEAN_BLOCKS, PREFIX_CACHE, UNMAPPED, RANKS, VERSIONS, HEAD, MIXES)


def chosen(version: tuple[int, int]) -> tuple[Fix, ...]:
    """The fixes that a version of vLLM gets.

    Args:
        version: major and minor version of vLLM.

    Returns:
        Those that it needs; with ``SAFELORA_VLLM_FIXES=0`` only those that safety depends on.

    Raises:
        GuardError: the variable has another value than 0 or 1.
    """
    off = _switched_off()
    return tuple(fix for fix in FIXES if _needed(fix, version) and (fix.safety or not off))


@functools.cache
def apply(version: tuple[int, int]) -> None:
    """Mend the vLLM of this process; a second call does nothing.

    Args:
        version: major and minor version of vLLM.

    Raises:
        GuardError: as in `chosen`.
    """
    applied = chosen(version)
    for fix in applied:
        fix.apply()
    left = [fix.name for fix in FIXES if _needed(fix, version) and fix not in applied]
    if left and multiprocessing.parent_process() is None:  # once for all processes of a server
        logger.warning("%s=0: these bugs of vLLM are not mended: %s", SWITCH, ", ".join(left))


def _needed(fix: Fix, version: tuple[int, int]) -> bool:
    return fix.fixed_in is None or version < fix.fixed_in


def _switched_off() -> bool:
    value = os.environ.get(SWITCH)
    if value not in (None, "0", "1"):
        raise GuardError(
            f"{SWITCH}={value!r} is not a valid switch: expected 0 or 1. Unset it, or set it to 0 to leave "
            f"those bugs of vLLM as they are that safety does not depend on"
        )
    return value == "0"
