"""Compares the vLLM of this process with `table` and `fixes`, before the guard touches anything.

Imports no vllm by itself: what is missing there shall be said as a seam that changed.
"""

from __future__ import annotations

import dis
import inspect
import logging
import os
from collections.abc import Iterator
from importlib import import_module
from types import CodeType
from typing import Any

from safelora_vllm.errors import GuardError
from safelora_vllm.integration.seams import fixes
from safelora_vllm.integration.seams.table import SEAMS, Requirement, Seam, Side

logger = logging.getLogger("vllm.safelora.seams")
OLDEST, NEWEST = (0, 28), (0, 32)
ALLOW_UNTESTED = "SAFELORA_ALLOW_UNTESTED_VLLM"


def check(side: Side) -> None:
    """`check_version` and `check_seams` for the vLLM of this process.

    Raises:
        GuardError: it is not one that this release guards.
    """
    check_version(_version())
    check_seams(side)


def check_version(version: str) -> None:
    """Refuse a vLLM that this release was not written for.

    Raises:
        GuardError: outside of the range, and ``SAFELORA_ALLOW_UNTESTED_VLLM`` is not 1.
    """
    if OLDEST <= _release(version) <= NEWEST:
        return
    oldest, newest = (".".join(map(str, bound)) for bound in (OLDEST, NEWEST))
    if os.environ.get(ALLOW_UNTESTED) != "1":
        raise GuardError(
            f"vLLM {version} is outside of the range {oldest} to {newest} that this release of "
            f"safelora-vllm guards. Install one of those, or set {ALLOW_UNTESTED}=1 to try"
        )
    logger.warning(
        "vLLM %s is outside of the range %s to %s and was not run with this release of safelora-vllm. %s=1 "
        "allows it; its internals are still compared", version, oldest, newest, ALLOW_UNTESTED,
    )  # fmt: skip


def check_seams(side: Side) -> None:
    """Compare what is here with what the guard needs on this side.

    Raises:
        GuardError: names every seam that changed.
    """
    changed = [f"seam {seam.name!r}: {problem}" for seam in seams(side) for problem in problems(seam)]
    if changed:
        raise GuardError(
            f"vLLM {_version()} is not what safelora-vllm was written for, so it is not guarded and "
            f"nothing is served: {'; '.join(changed)}. Install a vLLM that docs/compatibility.md lists, "
            "without plugins that replace these"
        )


def seams(side: Side) -> tuple[Seam, ...]:
    """What one side needs of the vLLM that is here: the guard's seams, and the fixes that it gets.

    Raises:
        GuardError: the switch of the fixes has a wrong value.
    """
    guarding = tuple(seam for seam in SEAMS if seam.side == side)
    return (*guarding, *(fix for fix in fixes.chosen(release()) if fix.side == side))


def problems(seam: Seam) -> Iterator[str]:
    """What is not as the seam needs it."""
    for requirement in seam.requirements:
        problem = _problem(requirement)
        if problem and requirement.formerly and not _problem(requirement.formerly):
            continue
        if problem:
            yield f"{requirement.module}.{requirement.target} {problem}"


def _problem(requirement: Requirement) -> str | None:
    try:
        found: Any = import_module(requirement.module)
        for part in requirement.target.split("."):
            found = getattr(found, part)
    except ImportError as error:
        return f"is not there ({error})"
    except AttributeError:
        return "is not there"
    if requirement.parameters is not None:
        parameters = tuple(inspect.signature(found).parameters)
        expected = requirement.parameters
        if expected[-1:] == ("...",):
            expected = expected[:-1]
            parameters = parameters[: len(expected)]
        if parameters != expected:
            return f"takes {', '.join(parameters)} instead of {', '.join(expected)}"
    if missing := set(requirement.assigns) - _names(found, "STORE_ATTR"):
        return f"does not set {', '.join(sorted(missing))}"
    if missing := set(requirement.references) - _names(found, None):
        return f"does not use {', '.join(sorted(missing))}"
    if requirement.annotations and (missing := set(requirement.annotations) - _fields(found)):
        return f"has no {', '.join(sorted(missing))}"
    if own := set(requirement.inherits) & set(vars(found)) if requirement.inherits else set():
        return f"has its own {', '.join(sorted(own))}"
    return None


def _names(function: Any, operation: str | None) -> set[str]:
    """Names in a function's code, in those of ``operation`` only or in all; none of what has no code."""
    waiting = [getattr(inspect.unwrap(function), "__code__", None)]
    found: set[str] = set()
    while waiting:
        code = waiting.pop()
        if not isinstance(code, CodeType):
            continue
        if operation is None:
            found |= {*code.co_names, *code.co_varnames}
        else:
            found |= {str(i.argval) for i in dis.get_instructions(code) if i.opname == operation}
        waiting += code.co_consts
    return found


def _fields(cls: Any) -> set[str]:
    return {name for base in cls.__mro__ for name in inspect.get_annotations(base)}


def release() -> tuple[int, int]:
    """Major and minor version of the vLLM that is here; (0, 0) where its name does not say."""
    return _release(_version())


def _release(version: str) -> tuple[int, int]:
    try:
        major, minor = version.split(".")[:2]
        return int(major), int(minor)
    except ValueError:
        return 0, 0


def _version() -> str:
    return str(import_module("vllm").__version__)
