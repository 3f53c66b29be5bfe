"""Bounded reading of a PEFT adapter, a folder or one archive: regular files only, each read once.

What is judged and what is published come from the same bytes, so a file that is swapped afterwards
changes nothing.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from safelora_vllm.adapters.archive import read_archive
from safelora_vllm.adapters.beside import BESIDE_BYTES, SIGNATURE, Beside, BesideFiles
from safelora_vllm.errors import AdapterNotFound, AdapterRefused, Reason, refuse
from safelora_vllm.safetensors_header import LONGEST_SIGN, Header, other_format, plain_json, read_header

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_LARGE_WEIGHTS = (
    ". Was an embedding or a head saved too (modules_to_save, save_embedding_layers)? If not, a server's "
    "--max-lora-rank and --max-adapter-bytes set the limit"
)
_UNSAFE_WEIGHTS = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")


@dataclass(frozen=True)
class Limits:
    """Bounds of what is read and accepted. Sizes in bytes.

    target_modules: last parts of the names of modules that an adapter may change; empty: any.
    """

    config_bytes: int = 1024 * 1024
    weights_bytes: int = 2 * 1024**3
    header_bytes: int = 8 * 1024 * 1024
    max_rank: int = 512
    target_modules: tuple[str, ...] = ()


@dataclass(frozen=True)
class RawAdapter:
    """An adapter's bytes. ``digest`` names this content: equal bytes, equal digest.

    beside: the upload's other files, where they were asked for.
    """

    config: dict[str, Any]
    header: Header
    config_bytes: bytes = field(repr=False)
    weights: bytes = field(repr=False)
    digest: str
    beside: Beside | None = None

    @property
    def files(self) -> dict[str, bytes]:
        """Both files as they were read, under PEFT's names."""
        return {CONFIG: self.config_bytes, WEIGHTS: self.weights}


def content_digest(config: bytes, weights: bytes) -> str:
    """The name of an adapter's content: sha256(sha256(config) + sha256(weights)), hexadecimal."""
    return joined_digest(hashlib.sha256(config).digest(), hashlib.sha256(weights).digest())


def joined_digest(config: bytes, weights: bytes) -> str:
    """`content_digest` from the sha256 of each."""
    return hashlib.sha256(config + weights).hexdigest()


def read_adapter(path: str | Path, limits: Limits, beside: bool = False) -> RawAdapter:
    """Read ``adapter_config.json`` and ``adapter_model.safetensors`` of a PEFT folder.

    The folder may also come as one .tar, .tar.gz or .zip, known by its first bytes. A weights file is
    read only when its header fits its size. ``beside`` reads all other files too, for a signature.

    Raises:
        AdapterNotFound: there is nothing at the path, or one of the two files alone.
        AdapterRefused: a file or the archive is missing, too large, not regular, not readable, or
            malformed; or the archive is ambiguous or unsafe.
    """
    path = Path(path)
    try:
        folder = path.is_dir()
        there = folder or (path.exists() and path.name not in (CONFIG, WEIGHTS))
    except (OSError, ValueError):  # a name too long for the file system, or with a zero byte
        raise _not_found(path) from None
    if not there:
        raise _not_found(path)
    others = BesideFiles() if beside else None
    config_bytes, weights, header = (_read_folder if folder else _read_archive)(path, limits, others)
    return RawAdapter(
        config=_parse_config(config_bytes),
        header=header,
        config_bytes=config_bytes,
        weights=weights,
        digest=content_digest(config_bytes, weights),
        beside=others.found() if others else None,
    )


def _not_found(path: Path) -> AdapterNotFound:
    return AdapterNotFound(
        f"there is no adapter folder {str(path)!r:.300}; give a folder that PEFT saved, "
        "or a .tar or .zip of one"
    )


def _read_folder(folder: Path, limits: Limits, beside: BesideFiles | None) -> tuple[bytes, bytes, Header]:
    try:
        with _opened(folder / CONFIG, CONFIG, limits.config_bytes) as (file, size):
            config = _all_of(file, size, CONFIG)
        with _opened(folder / WEIGHTS, WEIGHTS, limits.weights_bytes) as (file, size):
            beginning, header = read_header(file, size, limits.header_bytes)
            file.seek(0)
            weights = _all_of(file, size, WEIGHTS, beginning)
    except FileNotFoundError as error:
        reason = _missing(Path(error.filename).name, lambda other: (folder / other).exists())
        raise AdapterRefused([reason]) from None
    if beside is not None and os.path.lexists(folder / SIGNATURE):
        _read_beside(folder, beside)
    return config, weights, header


def _read_beside(folder: Path, beside: BesideFiles) -> None:
    """All regular files in a folder and below it but the adapter's own two, the signature first."""
    _add_beside(folder, SIGNATURE, beside)
    for parent, folders, names in os.walk(folder, onerror=_raise):
        folders.sort()
        linked = [name for name in folders if os.path.islink(os.path.join(parent, name))]  # noqa: PTH114, PTH118
        for name in sorted([*names, *linked]):
            if beside.fault:
                return
            shown = (Path(parent) / name).relative_to(folder).as_posix()
            if shown not in (CONFIG, WEIGHTS, SIGNATURE):
                _add_beside(folder, shown, beside)


def _add_beside(folder: Path, name: str, beside: BesideFiles) -> None:
    try:
        with _opened(folder / name, name, BESIDE_BYTES) as (file, _):
            beside.add(name, iter(partial(file.read, 1024 * 1024), b""))
    except FileNotFoundError:
        raise refuse("unreadable_file", f"{name} went away while it was read; load it again") from None


def _raise(error: OSError) -> None:
    raise refuse("unreadable_file", f"{error.filename!r:.200} cannot be read: {error.strerror}") from error


def _read_archive(path: Path, limits: Limits, beside: BesideFiles | None) -> tuple[bytes, bytes, Header]:
    allowed = limits.config_bytes + limits.weights_bytes + BESIDE_BYTES
    try:
        with _opened(path, "the archive", allowed) as (file, size):
            data = _all_of(file, size, "the archive")
    except FileNotFoundError:
        raise _not_found(path) from None
    wanted = {CONFIG: limits.config_bytes, WEIGHTS: limits.weights_bytes}
    files, others = read_archive(data, wanted, allowed, beside)
    if missing := [_missing(name, others.__contains__) for name in wanted if name not in files]:
        raise AdapterRefused(missing)
    weights = files[WEIGHTS]
    return files[CONFIG], weights, read_header(io.BytesIO(weights), len(weights), limits.header_bytes)[1]


def _missing(name: str, exists: Callable[[str], bool]) -> Reason:
    if name == WEIGHTS and (found := [other for other in _UNSAFE_WEIGHTS if exists(other)]):
        return Reason("unsafe_format", f"{found[0]} is a pickle; save the adapter as {WEIGHTS}")
    return Reason("missing_file", f"the adapter has no {name}")


@contextlib.contextmanager
def _opened(path: Path, name: str, limit: int) -> Iterator[tuple[BinaryIO, int]]:
    """One regular file and its size. Never follows a link and never waits on a pipe or device.

    Raises:
        FileNotFoundError: there is none.
        AdapterRefused: it is not regular, cannot be read, or is larger than the limit.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise refuse(
                "not_regular_file",
                f"{name} is a link or a socket; copy the file it leads to, such as with cp -L. For a folder "
                "of the hub's cache: hf download REPOSITORY --local-dir DIR",
            ) from error
        raise refuse("unreadable_file", f"{name} cannot be opened: {error.strerror}") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise refuse("not_regular_file", f"{name} is not a regular file")
    with os.fdopen(descriptor, "rb") as file:
        if status.st_size > limit:
            cause = _LARGE_WEIGHTS if name == WEIGHTS else ""
            raise refuse("too_large", f"{name} is larger than the {limit:,} bytes that are allowed{cause}")
        try:
            yield file, status.st_size
        except OSError as error:
            raise refuse("unreadable_file", f"{name} cannot be read: {error.strerror}") from error


def _all_of(file: BinaryIO, size: int, name: str, beginning: bytes = b"") -> bytes:
    """A whole file of which the size and the beginning are known."""
    data = file.read(size + 1)
    if len(data) != size or not data.startswith(beginning):
        raise refuse("unreadable_file", f"{name} changed while it was read; load it again")
    return data


def _parse_config(text: bytes) -> dict[str, Any]:
    try:
        config = plain_json(text)
    except (ValueError, RecursionError) as error:
        found = other_format(text[:LONGEST_SIGN]) or str(error)
        raise refuse("config_malformed", f"{CONFIG} is not plain JSON: {found}") from error
    if not isinstance(config, dict):
        raise refuse("config_malformed", f"{CONFIG} is not a JSON object")
    return config
