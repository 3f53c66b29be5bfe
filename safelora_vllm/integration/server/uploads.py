"""Receiving adapters: a multipart body streamed to the store's ``incoming/``, or a download from the hub.

Nothing is judged here. What arrives is bounded, and handed to the gate as a folder or an archive.
"""

from __future__ import annotations

import asyncio
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request

from safelora_vllm.adapters.beside import SIGNATURE, SIGNATURE_BYTES
from safelora_vllm.adapters.read import CONFIG, WEIGHTS, Limits
from safelora_vllm.errors import SafeLoRAError, UsageError
from safelora_vllm.files import not_written
from safelora_vllm.integration.server.background import HUB, in_thread
from safelora_vllm.store.layout import INCOMING

ARCHIVE = "archive"
_FIELDS = {"name": 300, "hub_id": 300, "revision": 200}  # longest values, bytes
_CONFIG_BYTES = Limits().config_bytes
_OVERHEAD_BYTES = 1024 * 1024  # part headers and small fields
_PATIENCE_SECONDS = 60.0
_PATIENCE_BYTES = 64 * 1024  # that have to come in each such time, unless the body ends
_MOST_SECONDS = 3600.0  # of a whole body, as of a download
_BLOCK = 1024 * 1024
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


class TooLarge(SafeLoRAError):
    """The body is larger than the server takes."""


class TooManyUploads(SafeLoRAError):
    """As many uploads as the server takes are under way."""


class UploadTimeout(SafeLoRAError):
    """The client sent nothing for a while."""


@dataclass(frozen=True)
class Received:
    """What a multipart body held. folder: the incoming folder; parts: the files in it."""

    fields: dict[str, str]
    folder: Path
    parts: frozenset[str]

    @property
    def adapter(self) -> Path:
        """What the gate is to read: the folder, or the archive in it.

        Raises:
            UsageError: neither both files nor one archive.
        """
        if self.parts == {ARCHIVE}:
            return self.folder / ARCHIVE
        if self.parts - {SIGNATURE} == {CONFIG, WEIGHTS}:
            return self.folder
        raise UsageError(
            f"the body has the files {sorted(self.parts)}; send {CONFIG} and {WEIGHTS}, or one {ARCHIVE} "
            f"(.tar, .tar.gz or .zip of the folder that PEFT saved). A {SIGNATURE} goes along"
        )


class UploadLimiter:
    """How many uploads may be under way at once; a tenant may hold half of them, all tenants all but one."""

    def __init__(self, count: int) -> None:
        self._free = count
        self._share = max(1, count // 2)
        self._kept = 1 if count > 1 else 0  # for the operator
        self._held: Counter[str] = Counter()

    @property
    def held(self) -> int:
        """How many are under way."""
        return self._held.total()

    @contextmanager
    def take(self, tenant: str | None) -> Iterator[None]:
        """Hold one until the block ends.

        Raises:
            TooManyUploads: none is free; the client is to try again.
        """
        holder = tenant or ""
        kept = self._kept if tenant else 0
        if self._free <= kept or (tenant and self._held[holder] >= self._share):
            raise TooManyUploads("too many uploads are running; try again in a second")
        self._free -= 1
        self._held[holder] += 1
        try:
            yield
        finally:
            self._free += 1
            self._held[holder] -= 1
            self._held += Counter()  # forgets those that hold none


@asynccontextmanager
async def incoming(root: Path) -> AsyncIterator[Path]:
    """A new folder under ``root``/incoming, gone when the block ends."""
    try:
        folder = await asyncio.to_thread(_new_folder, root / INCOMING)
    except OSError as error:
        raise not_written(error) from error
    try:
        yield folder
    finally:
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)


def _new_folder(parent: Path) -> Path:
    parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    return Path(tempfile.mkdtemp(dir=parent))


async def receive(
    request: Request, folder: Path, max_bytes: int, check_name: Callable[[str], None]
) -> Received:
    """Stream a multipart body into ``folder``. Memory holds one block of 1 MiB, whatever arrives.

    check_name: called as soon as the name is there, which may be before the files.

    Raises:
        UsageError: not multipart, cut short, a part twice or one that has no place here, or no name.
        TooLarge: more than ``max_bytes`` in one file. UploadTimeout: less than 64 KiB in 60 s.
        SafeLoRAError: whatever ``check_name`` raises.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise UsageError(
            "the body is not multipart/form-data with a boundary; a JSON body needs the content type "
            "application/json"
        )
    form = _Form(folder, max_bytes, check_name)
    total, waiting = 0, bytearray()
    try:
        parser = MultipartParser(options[b"boundary"], form.callbacks())
        async for chunk in read_with_timeout(request):
            total += len(chunk)
            if total > max_bytes + _CONFIG_BYTES + SIGNATURE_BYTES + _OVERHEAD_BYTES:
                raise TooLarge(f"the body is larger than the {max_bytes:,} bytes that this server accepts")
            waiting += chunk
            if len(waiting) >= _BLOCK:
                await asyncio.to_thread(parser.write, bytes(waiting))
                waiting.clear()
        await asyncio.to_thread(parser.write, bytes(waiting))
        await asyncio.to_thread(parser.finalize)
        fields = form.fields()
    except (ClientDisconnect, UnicodeDecodeError, ValueError) as error:  # MultipartParseError is a ValueError
        raise UsageError(
            f"the multipart body cannot be read: {str(error) or 'the client went away'}"
        ) from error
    except OSError as error:
        raise not_written(error) from error
    finally:
        form.close()
    if not form.ended:
        raise UsageError("the multipart body ends before its closing boundary; send it again")
    if "name" not in fields:
        raise UsageError("the body has no field 'name': expected the adapter's name and its files")
    return Received(fields, folder, frozenset(form.files))


async def read_with_timeout(request: Request) -> AsyncIterator[bytes]:
    """The pieces of a body, as long as they come at a rate of 64 KiB in 60 s, for an hour.

    Raises:
        UploadTimeout: they do not.
    """
    stream, loop = request.stream(), asyncio.get_running_loop()
    end = loop.time() + _MOST_SECONDS
    deadline, come = loop.time() + _PATIENCE_SECONDS, 0
    while True:
        try:
            async with asyncio.timeout_at(min(deadline, end)):
                chunk = await anext(stream, None)
        except TimeoutError as error:
            if loop.time() >= end:
                raise UploadTimeout(
                    f"the body did not end in {_MOST_SECONDS / 60:.0f} minutes; send it faster"
                ) from error
            raise UploadTimeout(
                f"less than {_PATIENCE_BYTES:,} bytes came in {_PATIENCE_SECONDS:.0f} seconds; send it again"
            ) from error
        if chunk is None:
            return
        come += len(chunk)
        if come >= _PATIENCE_BYTES:
            deadline, come = loop.time() + _PATIENCE_SECONDS, 0
        if chunk:
            yield chunk


class _Form:
    """What the parser's callbacks (python-multipart) build up: small fields in memory, files on disk."""

    def __init__(self, folder: Path, max_bytes: int, check_name: Callable[[str], None]) -> None:
        self._folder = folder
        self._check_name = check_name
        self._limits = {**_FIELDS, CONFIG: _CONFIG_BYTES, WEIGHTS: max_bytes, ARCHIVE: max_bytes}
        self._limits[SIGNATURE] = SIGNATURE_BYTES
        self._values: dict[str, bytearray] = {}
        self._header, self._value = bytearray(), bytearray()
        self._part = ""
        self._written = 0
        self._file: BinaryIO | None = None
        self.files: set[str] = set()
        self.ended = False

    def callbacks(self) -> dict[str, object]:
        """For `python_multipart.multipart.MultipartParser`."""
        return {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._extend(self._header, data[start:end]),
            "on_header_value": lambda data, start, end: self._extend(self._value, data[start:end]),
            "on_header_end": self._end_header,
            "on_headers_finished": self._start,
            "on_part_data": lambda data, start, end: self._data(data[start:end]),
            "on_part_end": self._end_part,
            "on_end": lambda: setattr(self, "ended", True),
        }

    def fields(self) -> dict[str, str]:
        """The small fields as text."""
        return {name: value.decode() for name, value in self._values.items()}

    def close(self) -> None:
        """End the file being written, if any."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _end_part(self) -> None:
        self.close()
        if self._part == "name":
            self._check_name(self._values["name"].decode())

    def _begin(self) -> None:
        self._part, self._written = "", 0

    def _extend(self, text: bytearray, data: bytes) -> None:
        if len(text) + len(data) > _OVERHEAD_BYTES // 16:
            raise ValueError("a part's header is too long")
        text += data

    def _end_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            _, options = parse_options_header(bytes(self._value))
            self._part = options.get(b"name", b"").decode()
        self._header.clear()
        self._value.clear()

    def _start(self) -> None:
        name = self._part
        if name not in self._limits:
            raise ValueError(f"there is no field {name!r:.100}; known are {sorted(self._limits)}")
        if name in self._values or name in self.files:
            raise ValueError(f"{name} is there twice")
        if name in _FIELDS:
            self._values[name] = bytearray()
        else:
            self.files.add(name)
            self._file = (self._folder / name).open("xb")

    def _data(self, data: bytes) -> None:
        self._written += len(data)
        limit = self._limits[self._part]
        if self._written > limit:
            raise TooLarge(f"{self._part} is larger than the {limit:,} bytes that this server accepts")
        if self._file is not None:
            self._file.write(data)
        else:
            self._values[self._part] += data


async def downloaded(hub_id: str, revision: str | None, folder: Path, max_bytes: int, token: bool) -> Path:
    """As `download`, in a thread for that."""
    return await in_thread(HUB, download, hub_id, revision, folder, max_bytes, token)


def download(hub_id: str, revision: str | None, folder: Path, max_bytes: int, token: bool) -> Path:
    """Both files of a hub repository, into ``folder``. Blocking.

    token: whether the server's own hub token is shown, which opens what its owner may see.

    The first file says which commit that is, so that both are of one, and of the sizes that were looked at.

    Raises:
        UsageError: no such id, revision or file, or the hub cannot be reached.
        TooLarge: the hub says that a file is over its limit; nothing is downloaded.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    shown = None if token else False
    if not HUB_ID.fullmatch(hub_id):
        raise UsageError(f"{hub_id!r:.200} is not a valid hub id: expected ORGANISATION/NAME")
    try:
        for name, limit in ((CONFIG, _CONFIG_BYTES), (WEIGHTS, max_bytes)):
            url = hf_hub_url(hub_id, name, revision=revision)
            found = get_hf_file_metadata(url, token=shown)
            revision, size = found.commit_hash or revision, found.size or 0
            if size > limit:
                raise TooLarge(f"{name} of {hub_id} has {size:,} bytes; this server accepts {limit:,}")
            hf_hub_download(hub_id, name, revision=revision, local_dir=folder, token=shown)
    except TooLarge:
        raise
    except Exception as error:  # the hub client's errors have no common base class
        first = str(error).partition("\n")[0]
        raise UsageError(
            f"{hub_id} could not be downloaded from the hub ({type(error).__name__}: {first:.300})"
        ) from error
    return folder
