"""The adapters of a folder: its folders and archives, each with the name that its result gets."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from safelora_vllm.errors import UsageError

_ARCHIVES = (".tar.gz", ".tgz", ".tar", ".zip")
_LONGEST = 250  # bytes of a name, so that its record's name fits into 255


@dataclass(frozen=True)
class AdapterInput:
    """One adapter to project. problem: why it must not be read, if so."""

    name: str
    path: str
    problem: str = ""


def find_inputs(folder: Path) -> tuple[list[AdapterInput], list[str]]:
    """The adapters in a folder by name, and the names of the files that are none.

    Every folder in it counts as an adapter, and every file with an archive's suffix. Names that begin with a
    dot are left out.

    Raises:
        UsageError: the folder cannot be read, has no adapters, or two of them have one name.
    """
    try:
        with os.scandir(folder) as entries:
            found = sorted(entry.name for entry in entries if entry.name[0] != ".")
    except OSError as error:
        raise UsageError(
            f"{folder} cannot be read ({error.strerror}): expected a folder of adapters and archives"
        ) from error
    inputs, others = [], []
    for file in found:
        path = folder / file
        suffix = next((s for s in _ARCHIVES if file.lower().endswith(s) and len(file) > len(s)), "")
        if path.is_dir():
            suffix = ""
        elif not suffix and not (path.is_symlink() and not path.exists()):
            others.append(file)
            continue
        inputs.append(AdapterInput(file[: len(file) - len(suffix)], str(path), _problem(path, folder)))
    if not inputs:
        raise UsageError(f"{folder} has no adapters: expected folders, or {', '.join(_ARCHIVES)} files")
    _check_names(inputs, folder)
    return inputs, others


def _problem(path: Path, folder: Path) -> str:
    """Links may lead to other adapters of the folder, and nowhere else."""
    if not path.is_symlink():
        return ""
    try:
        inside = path.resolve(strict=True).is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # it leads nowhere, or in a circle
        return "it is a link that leads nowhere; remove it, or copy what it should lead to"
    return "" if inside else f"it is a link that leaves {folder}; copy what it leads to"


def _check_names(inputs: list[AdapterInput], folder: Path) -> None:
    counts = Counter(found.name for found in inputs)
    if twice := [name for name, count in counts.items() if count > 1]:
        files = [Path(found.path).name for found in inputs if found.name == twice[0]]
        more = f" and {len(twice) - 1} more names" if len(twice) > 1 else ""
        raise UsageError(
            f"{' and '.join(files)} in {folder} would both be {twice[0]!r}{more}: rename or remove one of "
            "them"
        )
    for name in counts:
        if len(os.fsencode(name)) > _LONGEST:
            raise UsageError(f"{name!r:.100} in {folder} is too long: expected at most {_LONGEST} bytes")
