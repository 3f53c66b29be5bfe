"""Downloading an adapter: bounded, resumed after a broken connection, of one version of its objects.

Nothing is judged here. What arrives is handed to the gate as a folder or an archive, like an upload.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from safelora_vllm.adapters.beside import SIGNATURE, SIGNATURE_BYTES
from safelora_vllm.adapters.read import CONFIG, WEIGHTS, Limits, joined_digest
from safelora_vllm.errors import AdapterRefused, refuse
from safelora_vllm.files import not_written, sha256_of
from safelora_vllm.remote import clouds, pinned
from safelora_vllm.remote.address import Source
from safelora_vllm.remote.reach import Reach
from safelora_vllm.remote.refusals import forbidden, unavailable

ARCHIVE = "archive"
TRIES = 5  # without an advance of 1 MiB
PAUSE_SECONDS = 0.25  # doubled after each
MOST_SECONDS = 3600.0
_ADVANCE = 1024 * 1024
_KEEP_BYTES = 64 * 1024 * 1024
_DIGEST = re.compile(r"(sha256:)?[0-9a-f]{64}")
_TRY_AGAIN = {408, 425, 429, 500, 502, 503, 504}


class Seen(NamedTuple):
    """What the first answer said of an object. etag: '' without a strong one."""

    etag: str
    size: int


Keep = Callable[[BinaryIO, Seen | None], None]


@dataclass
class _Object:
    """An object on its way to a file. seen: of the version that the file has the beginning of."""

    source: Source
    file: Path
    limit: int
    reach: Reach
    end: float
    seen: Seen | None = None
    keep: Keep = lambda *_: None

    @property
    def shown(self) -> str:
        return str(self.source)


def fetch(
    source: Source,
    folder: Path,
    max_bytes: int,
    reach: Reach,
    digest: str | None = None,
    signature: bool = False,
) -> Path:
    """Download an adapter into an empty folder. Blocking.

    Args:
        source: a folder with both files, or an archive.
        folder: where to.
        max_bytes: of the weights or the archive.
        reach: which network addresses are allowed.
        digest: that of the adapter, as `inspect` and every report show it; of an archive ``sha256:`` and the
            sha256 of its bytes.
        signature: take the folder's signature too, if it has one.

    Returns:
        The folder, or the archive in it.

    Raises:
        AdapterRefused: with a code of docs/troubleshooting.md. StoreUnavailable: the disk.
    """
    end = time.monotonic() + MOST_SECONDS
    _check_digest(source, digest)
    try:
        if source.is_archive:
            _download(_Object(source, folder / ARCHIVE, max_bytes, reach, end))
            _compare(source, digest, f"sha256:{sha256_of(folder / ARCHIVE).hex()}")
            return folder / ARCHIVE
        config = _Object(source.child(CONFIG), folder / CONFIG, Limits().config_bytes, reach, end)
        weights = _Object(source.child(WEIGHTS), folder / WEIGHTS, max_bytes, reach, end)
        _download(config)
        _download(weights)
        if signature:
            _download_signature(source, folder, reach, end)
        _check_unchanged(config)
        _compare(source, digest, joined_digest(sha256_of(config.file), sha256_of(weights.file)))
    except OSError as error:
        raise not_written(error) from error
    return folder


def _download_signature(source: Source, folder: Path, reach: Reach, end: float) -> None:
    """The signature of a folder. S3 says 403 of what is not there, where it may not be listed."""
    try:
        _download(_Object(source.child(SIGNATURE), folder / SIGNATURE, SIGNATURE_BYTES, reach, end))
    except AdapterRefused as error:
        (folder / SIGNATURE).unlink()
        if not {"source_not_found", "source_denied"}.issuperset(error.codes):
            raise


def fetch_object(
    source: Source,
    file: Path,
    max_bytes: int,
    reach: Reach,
    seen: Seen | None = None,
    keep: Keep | None = None,
) -> None:
    """Download one object, or the rest of it. Blocking.

    Args:
        source, max_bytes, reach: as for `fetch`.
        file: a new one, or with ``seen`` one with the beginning of that version, or all of it.
        seen: the version.
        keep: is told every 64 MiB and at the end that all of the file until then is of that version; None
            where it has to begin anew. It is not called for an object without a strong ETag.

    Raises:
        AdapterRefused: with a code of docs/troubleshooting.md: source_changed where it is another version.
        OSError: the disk.
    """
    end = time.monotonic() + MOST_SECONDS
    _download(_Object(source, file, max_bytes, reach, end, seen, keep or (lambda *_: None)))


def _download(wanted: _Object) -> None:
    """All of an object."""
    with wanted.file.open("r+b" if wanted.seen else "xb") as file:
        tries, start = 0, file.seek(0, os.SEEK_END)
        while True:
            try:
                _read_on(wanted, file)
                return
            except pinned.Broken:
                advance = file.tell() - start
                if not (wanted.seen and wanted.seen.etag):  # another version could follow: from the beginning
                    file.seek(0)
                    file.truncate()
                    wanted.seen, advance = None, 0
            tries, start = (1 if advance >= _ADVANCE else tries + 1), file.tell()
            if tries >= TRIES or time.monotonic() > wanted.end:
                raise unavailable(
                    "source_unreachable",
                    f"{wanted.shown} could not be read, {TRIES} times: no connection, an error of the other "
                    "side, or a connection that broke off",
                )
            time.sleep(PAUSE_SECONDS * 2 ** (tries - 1))


def _read_on(wanted: _Object, file: BinaryIO) -> None:
    """From where the file ends."""
    at = kept = file.tell()
    headers, whole = {"Accept-Encoding": "identity"}, bool(wanted.seen and at == wanted.seen.size)
    if whole and wanted.seen:
        headers["If-None-Match"] = wanted.seen.etag
    elif at and wanted.seen:
        headers |= {"Range": f"bytes={at}-", "If-Match": wanted.seen.etag}
    with pinned.get(clouds.url(wanted.source), headers, wanted.reach, wanted.shown, wanted.end) as answer:
        if whole and answer.status == 304:
            return
        _check_status(answer, wanted)
        if answer.status == 200 and at and not whole:  # no ranges here
            wanted.keep(file, None)
            file.seek(0)
            file.truncate()
            at = kept = 0
        size = _size(answer, wanted, at)
        seen = Seen(_strong(answer.header("etag")), size)
        if wanted.seen and seen != wanted.seen:
            raise _changed(wanted)
        if whole:  # the server does not know If-None-Match
            return
        wanted.seen = seen
        if size > wanted.limit:
            raise refuse("too_large", f"{wanted.shown} has {size:,} bytes; {wanted.limit:,} are accepted")
        for block in answer.blocks():
            at += len(block)
            if at > size:
                raise refuse("source_response", f"{wanted.shown} sent more than it announced")
            file.write(block)
            if seen.etag and at - kept >= _KEEP_BYTES:
                wanted.keep(file, seen)
                kept = at
    if at < size:
        raise pinned.Broken
    if seen.etag:
        wanted.keep(file, seen)


def _check_status(answer: pinned.Answer, wanted: _Object) -> None:
    """Raises the refusal that an answer other than 200 and 206 means."""
    status, shown = answer.status, wanted.shown
    if status == 200 or (status == 206 and wanted.seen):
        return
    if 300 <= status < 400 and status != 304:
        raise forbidden(
            "source_redirect",
            f"{shown} redirects to another address, which is not followed: give the last address, or the "
            "bucket's region",
        )
    if status in (401, 403):
        raise refuse(
            "source_denied",
            f"{shown} may not be read (status {status}): the credentials may not read it, a presigned URL "
            "has expired, or it is not there and may not be listed",
        )
    if status in (404, 410):
        raise refuse("source_not_found", f"{shown} is not there (status {status}): check the address")
    if status in (412, 416):
        raise _changed(wanted)
    if status in _TRY_AGAIN:
        raise pinned.Broken
    raise refuse("source_response", f"{shown} was answered with status {status}: expected 200")


def _size(answer: pinned.Answer, wanted: _Object, at: int) -> int:
    """Bytes of the whole object."""
    length = answer.header("content-length")
    if answer.header("transfer-encoding") or not re.fullmatch(r"[0-9]{1,18}", length):
        raise refuse("source_response", f"{wanted.shown} was answered without one Content-Length")
    if answer.header("content-encoding") not in ("", "identity", "aws-chunked"):
        raise refuse(
            "source_response", f"{wanted.shown} was answered in a Content-Encoding; store it without"
        )
    if answer.status == 200:
        return int(length)
    match = re.fullmatch(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})", answer.header("content-range"))
    if match is None or int(match[1]) != at or int(match[2]) - at + 1 != int(length):
        raise refuse(
            "source_response", f"{wanted.shown} was answered with another part than the one asked for"
        )
    if int(match[2]) + 1 != int(match[3]):
        raise refuse("source_response", f"{wanted.shown} was answered with less than all that is left")
    return int(match[3])


def _check_unchanged(wanted: _Object) -> None:
    """That a file read first is still the one read, now that the other was read too."""
    assert wanted.seen is not None
    again = _Object(wanted.source, wanted.file.with_name("again"), wanted.limit, wanted.reach, wanted.end)
    _download(again)
    same = again.seen == wanted.seen and again.file.read_bytes() == wanted.file.read_bytes()
    again.file.unlink()
    if not same:
        raise _changed(wanted)


def _strong(etag: str) -> str:
    return etag if re.fullmatch(r'"[!#-~]{1,200}"', etag) else ""


def _check_digest(source: Source, digest: str | None) -> None:
    if digest is None:
        return
    if not _DIGEST.fullmatch(digest) or digest.startswith("sha256:") != source.is_archive:
        raise refuse(
            "source_digest",
            "the expected digest is not valid: expected sha256: and 64 hexadecimal digits for an archive, "
            "the 64 digits that `safelora-vllm inspect` shows for a folder",
        )


def _compare(source: Source, expected: str | None, found: str) -> None:
    if expected is not None and expected != found:
        raise refuse("source_digest", f"{source} has the digest {found}, not the expected {expected}")


def _changed(wanted: _Object) -> AdapterRefused:
    return refuse("source_changed", f"{wanted.shown} was changed while it was read; load it again")
