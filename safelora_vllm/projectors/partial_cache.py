"""A projector cache that is being built: a hidden folder beside its place, from which the next build goes on.

Each shard that is finished has a line in ``.journal`` with its sha256. Both are on the disk before the next
shard is begun. A shard without a line, or with other bytes, is made again. The folder's name has a digest of
all that the cache depends on. Other folders of the same place are of other models or options: they are
removed. A lock keeps two builds apart. It ends with its process.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from safelora_vllm.errors import UsageError
from safelora_vllm.files import check_new, sha256_of, sync_folder

_LOCK, _JOURNAL = ".lock", ".journal"


@dataclass
class PartialCache:
    """The folder of a cache that is being built.

    modules: what the manifest will say of those in finished shards. unchanged: modules without a projector
    that came before them. shards: name → sha256 and bytes of tensors.
    """

    folder: Path
    modules: list[dict[str, Any]] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    shards: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def next_shard(self) -> str:
        """The name of the shard that comes next."""
        return f"projectors-{len(self.shards):05d}.safetensors"

    def add(self, tensors: Mapping[str, Tensor], modules: list[dict[str, Any]], unchanged: list[str]) -> None:
        """Write the next shard, with what the manifest will say of its modules.

        Raises:
            OSError, safetensors.SafetensorError: such as a disk that is full.
        """
        file = self.folder / self.next_shard
        save_file(dict(tensors), file)
        _sync(file)
        shard = {"sha256": sha256_of(file).hex(), "tensor_bytes": sum(t.nbytes for t in tensors.values())}
        line = {"shard": file.name, **shard, "modules": modules, "unchanged": unchanged}
        with (self.folder / _JOURNAL).open("ab") as journal:
            journal.write(json.dumps(line).encode() + b"\n")
            journal.flush()
            os.fsync(journal.fileno())
        sync_folder(self.folder)
        self._remember(line)

    def finish(self, out: Path, texts: Mapping[str, str]) -> None:
        """Add files and put the folder into its place."""
        for name, text in texts.items():
            (self.folder / name).write_text(text)
            _sync(self.folder / name)
        self.folder.chmod(0o755)
        sync_folder(self.folder)
        self.folder.rename(out)
        sync_folder(out.parent)
        for name in (_JOURNAL, _LOCK):
            (out / name).unlink(missing_ok=True)

    def restore(self) -> None:
        """Take over what an earlier build finished, and remove what it did not."""
        journal, length = self.folder / _JOURNAL, 0
        with contextlib.suppress(FileNotFoundError):
            for text in journal.read_bytes().splitlines(keepends=True):
                if (line := self._line(text)) is None:
                    break
                self._remember(line)
                length += len(text)
            os.truncate(journal, length)
        for path in self.folder.iterdir():
            if path.name not in (_LOCK, _JOURNAL, *self.shards):
                path.unlink()

    def _line(self, text: bytes) -> dict[str, Any] | None:
        """A journal's line, if it is whole and its shard is; the last one may be neither."""
        try:
            line: dict[str, Any] = json.loads(text)
            whole = text.endswith(b"\n") and sha256_of(self.folder / self.next_shard).hex() == line["sha256"]
            return line if whole and line["shard"] == self.next_shard else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _remember(self, line: dict[str, Any]) -> None:
        self.modules += line["modules"]
        self.unchanged += line["unchanged"]
        self.shards[line["shard"]] = {part: line[part] for part in ("sha256", "tensor_bytes")}


@contextlib.contextmanager
def partial_cache(out: Path, key: str) -> Iterator[PartialCache]:
    """The partial cache of ``out`` with this key, whatever is finished of it. Without a finished shard it is
    removed when the work fails.

    Raises:
        UsageError: another build of ``out`` is running, or the disk is full.
    """
    with hidden_folder(out, "partial", key, of_older_releases="|[0-9]+(-.*)?") as folder:
        partial = PartialCache(folder)
        try:
            check_new(out)  # it may have been made meanwhile
            partial.restore()
            yield partial
        except BaseException as error:
            if not partial.shards:
                shutil.rmtree(folder, ignore_errors=True)
            # safetensors reports a full disk in words only.
            if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
                kept = f": the {len(partial.modules)} finished modules are kept" if partial.shards else ""
                raise UsageError(f"no room left on the disk of {out}; free some and repeat{kept}") from error
            raise


@contextlib.contextmanager
def hidden_folder(out: Path, kind: str, key: str, of_older_releases: str = "") -> Iterator[Path]:
    """A folder beside ``out`` for this process alone, with what an earlier one left in it.

    Those of the same kind and place with another key are removed. of_older_releases: more names of them.

    Raises:
        UsageError: another build of ``out`` is running, or somebody else may write to the folder.
    """
    prefix = f".{out.name}.{kind}-"
    folder = out.parent / f"{prefix}{key[:32]}"
    mine = re.compile(re.escape(prefix) + f"([0-9a-f]{{32}}{of_older_releases})")
    for other in out.parent.iterdir():
        if mine.fullmatch(other.name) and other != folder and other.is_dir() and not other.is_symlink():
            with _locked(other, out):
                shutil.rmtree(other, ignore_errors=True)
    with _locked(folder, out):
        yield folder


@contextlib.contextmanager
def _locked(folder: Path, out: Path) -> Iterator[None]:
    """Hold the lock of a folder, which is made where it is missing."""
    while True:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        _check_own(folder)
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            descriptor = os.open(folder / _LOCK, flags, 0o600)
        except FileNotFoundError:  # another process has just removed the folder
            continue
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                owner = os.pread(descriptor, 20, 0).decode(errors="replace").strip()
                raise UsageError(
                    f"another build of {out} is running, process {owner or 'unknown'}: wait until it ends, "
                    "or give another folder as `out`"
                ) from error
            if _is_at(descriptor, folder / _LOCK):
                os.pwrite(descriptor, f"{os.getpid()}".ljust(20).encode(), 0)
                yield
                return
        finally:
            os.close(descriptor)


def _check_own(folder: Path) -> None:
    """What is in it is believed, and becomes a part of the cache.

    Raises:
        UsageError: it is a link, or somebody else may write to it.
    """
    with contextlib.suppress(FileNotFoundError):  # another process has just removed the folder
        found = folder.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022:
            return
        raise UsageError(
            f"{folder} is not a folder that only this user can write to, and a build would go on from what "
            "is in it. Remove it, or give a folder elsewhere as `out`"
        )


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one that is found at a path."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


def _sync(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
