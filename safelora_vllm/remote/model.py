"""Models that `build` is given as addresses: downloaded whole, for as long as the build lasts.

Each file is of one version of its object. Whether the files belong together is not known: a server compares
the model that it serves with the one that was read.

A build that is killed or interrupted leaves its downloads in a hidden folder beside its output. The next one
of the same models goes on from there, if the objects are what they were.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from safelora_vllm.errors import AdapterRefused, CheckpointError, UsageError
from safelora_vllm.files import replace_file
from safelora_vllm.projectors.partial_cache import hidden_folder
from safelora_vllm.projectors.weight_files import INDEX, weight_names
from safelora_vllm.remote.address import Source, is_remote, parse
from safelora_vllm.remote.fetch import Seen, fetch_object
from safelora_vllm.remote.reach import Reach

CONFIG = "config.json"
_SEEN = ".seen"  # what is known of each file, as JSON: no file of a model can have its name
_SMALL_BYTES = 256 * 1024**2  # of config and index
_MOST_BYTES = 1024**4  # of a file of weights


@contextmanager
def models_on_disk(base: str, aligned: str, out: Path) -> Iterator[tuple[str, str]]:
    """The folders of two models. One with an address is downloaded beside ``out`` while the block lasts.

    With the credentials of this process. There is no allowlist: whoever types an address may go there.
    What was downloaded stays where the next build can go on with it, and is removed otherwise.

    Raises:
        CheckpointError: the address is not valid, or a file cannot be downloaded.
        UsageError: the disk is full or not writable, or another build of ``out`` is running.
    """
    given = {"base": base, "aligned": aligned}
    if not any(map(is_remote, given.values())):
        yield base, aligned
        return
    sources = {side: _source(model) for side, model in given.items() if is_remote(model)}
    text = json.dumps({side: str(source) for side, source in sources.items()})
    key = hashlib.sha256(text.encode()).hexdigest()
    with ExitStack() as stack:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            folder = stack.enter_context(hidden_folder(out, "models", key))
        except OSError as error:
            raise _disk(out.parent, error) from error
        try:
            for side, source in sources.items():
                _download(source, folder / side, out.parent)
                given[side] = str(folder / side)
        except BaseException:
            _end(folder, keep=any(folder.glob(f"*/{_SEEN}/*.safetensors")))
            raise
        try:
            yield given["base"], given["aligned"]
        except CheckpointError:  # nothing can be built of these models
            _end(folder, keep=False)
            raise
        except BaseException:
            _end(folder, keep=True)
            raise
        _end(folder, keep=False)


def _source(model: str) -> Source:
    try:
        source = parse(model)
    except AdapterRefused as error:
        raise CheckpointError(f"the model cannot be downloaded: {error.reasons[0].message}") from None
    if source.is_archive:
        raise CheckpointError(f"{source} is not the address of a model: expected a folder with {CONFIG}")
    return source


def _download(source: Source, folder: Path, parent: Path) -> None:
    """A model, or what is missing of it."""
    try:
        (folder / _SEEN).mkdir(parents=True, exist_ok=True)
        _fetch(source, folder, Reach(everywhere=True))
    except AdapterRefused as error:
        raise CheckpointError(f"the model cannot be downloaded: {error.reasons[0].message}") from None
    except OSError as error:
        raise _disk(parent, error) from error


def _fetch(source: Source, folder: Path, reach: Reach) -> None:
    """Download config, index and weights of a model."""
    _file(source, folder, CONFIG, _SMALL_BYTES, reach)
    try:
        _file(source, folder, INDEX, _SMALL_BYTES, reach)
    except AdapterRefused as error:
        # Without the right to list a bucket, an object that is not there is denied.
        if not {"source_not_found", "source_denied"}.intersection(error.codes):
            raise
        (folder / INDEX).unlink()
    for name in tqdm(weight_names(folder), desc=f"Downloading {source}", unit="file"):
        _file(source, folder, name, _MOST_BYTES, reach)


def _file(source: Source, folder: Path, name: str, most: int, reach: Reach) -> None:
    """One file, or the rest of it if its object is what it was."""
    file, note = folder / name, folder / _SEEN / name

    def keep(stream: BinaryIO, seen: Seen | None) -> None:
        """Remember how much of the file is on the disk, and of which version."""
        if seen is None:
            note.unlink(missing_ok=True)
            return
        stream.flush()
        os.fsync(stream.fileno())
        replace_file(note, json.dumps({**seen._asdict(), "bytes": stream.tell()}).encode())

    seen = _begun(file, note)
    try:
        fetch_object(source.child(name), file, most, reach, seen, keep)
    except AdapterRefused as error:
        if seen is None or "source_changed" not in error.codes:
            raise
        note.unlink(missing_ok=True)
        fetch_object(source.child(name), file, most, reach, _begun(file, note), keep)


def _begun(file: Path, note: Path) -> Seen | None:
    """The version of which a file has the beginning; all else of the file is removed."""
    try:
        found = json.loads(note.read_bytes())
        seen, count = Seen(str(found["etag"]), int(found["size"])), int(found["bytes"])
        there = file.stat().st_size
        if seen.etag and 0 < count <= min(seen.size, there):
            if there > count:  # else its times would change, by which a build knows the model
                os.truncate(file, count)
            return seen
    except (OSError, ValueError, KeyError, TypeError):
        pass
    note.unlink(missing_ok=True)
    file.unlink(missing_ok=True)
    return None


def _end(folder: Path, keep: bool) -> None:
    """Remove the downloads, or say where they are."""
    if keep:
        left = f"the downloads are kept in {folder}: repeat the build to go on, or delete the folder"
        with contextlib.suppress(OSError, ValueError):  # nobody reads it
            tqdm.write(left, file=sys.stderr)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def _disk(parent: Path, error: OSError) -> UsageError:
    return UsageError(
        f"{parent} cannot be written ({error.strerror}): a model that is downloaded needs its size there"
    )
