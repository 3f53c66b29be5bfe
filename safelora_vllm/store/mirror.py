"""The store's names and uploads in a bucket, so that servers on several disks serve the same.

The local store stays what servers and gates read. The bucket decides: a name is changed by one write on
condition there, and the local record follows. Uploads are in the bucket before a name refers to them.

names/<quoted name>.json   as in the store; ``{"removed": true}`` for a name that is gone
raw/<digest>/<file>        never changed
ids                        the next number
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

from safelora_vllm.errors import GuardError, StoreDamaged, StoreUnavailable, UsageError
from safelora_vllm.files import locked, make_folder, replace_file, sync_folder, writing
from safelora_vllm.remote.bucket import Bucket, Conflict
from safelora_vllm.store.layout import IDS, MIRROR, NAMES
from safelora_vllm.store.mirror_uploads import MirroredUploads
from safelora_vllm.store.name_record import AdapterRecord, file_of, from_json, to_json
from safelora_vllm.store.names import FIRST_ID, LAST_ID, REMEDY, NameStore, number_in

logger = logging.getLogger("vllm.safelora.store")
_TRIES = 20
_GIVEN = f"{IDS} of the bucket"
_NO_RECORD = (ValueError, KeyError, TypeError, RecursionError, UsageError)
_AGAIN_SECONDS = 300.0  # after which what could not be taken over is read again: it may have been repaired
_REMOVED = json.dumps({"removed": True}).encode()


class _Complaint(NamedTuple):
    """A record with this ETag could not be taken over at this time."""

    etag: str
    at: float

    def stands(self, etag: str, now: float) -> bool:
        return self.etag == etag and now - self.at < _AGAIN_SECONDS


_NONE = _Complaint("", 0.0)


class MirroredNames(NameStore):
    """A `NameStore` whose changes are made in a bucket first."""

    is_mirror = True

    def __init__(self, root: str | Path, bucket: Bucket) -> None:
        super().__init__(root)
        self._bucket, self._uploads = bucket, MirroredUploads(root, bucket)
        self._etags: dict[str, str] = {}  # of what the local records are
        self._complaints: dict[str, _Complaint] = {}
        self.is_out = False

    def update(
        self,
        name: str,
        change: Callable[[AdapterRecord | None], AdapterRecord | None],
        around: Callable[[str, AdapterRecord | None], AbstractContextManager[None]] | None = None,
    ) -> AdapterRecord | None:
        """As in `NameStore`, of the bucket's record: of two servers, one sees what the other wrote."""
        file = file_of(name)
        before = _sound(self._bucket.get(f"{NAMES}/{file}"), file)
        self._uploads.put(after) if (after := change(before)) != before else self._uploads.fetch(after)
        with self._locked():
            for _ in range(_TRIES):
                found = self._bucket.get(f"{NAMES}/{file}")
                before = _sound(found, file)
                after = change(before)
                if after != before:
                    self._uploads.put(after)
                    content = to_json(after, file) if after else _REMOVED
                    try:
                        with around(_digest(found), after) if around else contextlib.nullcontext():
                            etag = self._put(f"{NAMES}/{file}", content, found[1] if found else None)
                            self._write(file, after, etag)
                    except Conflict:
                        continue
                elif found:
                    self._uploads.fetch(after)
                    self._write(file, after, found[1])
                return after
        raise StoreUnavailable(f"{name} is changed by others all the time; try again later")

    def newest(self, name: str) -> AdapterRecord | None:
        """As in `NameStore`, of the bucket. What it refers to is fetched, so that it can be judged here.

        An upload that is lost keeps nobody from replacing or removing the name.
        """
        try:
            file = file_of(name)
        except UsageError:
            return None  # nothing was ever stored under it
        found = self._bucket.get(f"{NAMES}/{file}")
        record = _sound(found, file)
        if found and self._etags.get(file) != found[1]:
            with contextlib.suppress(StoreDamaged):
                self._follow(file)
        return record

    def file_digest(self, name: str) -> str:
        """As in `NameStore`, of the bucket's record: the local one may be behind it."""
        return _digest(self._bucket.get(f"{NAMES}/{file_of(name)}"))

    def reserve_ids(self, count: int) -> int:
        """As in `NameStore`, for all servers of the bucket."""
        with self._locked():
            for _ in range(_TRIES):
                found = self._bucket.get(IDS)
                first = number_in(found[0], _GIVEN) if found else FIRST_ID
                if first + count > LAST_ID:
                    raise StoreUnavailable(f"{IDS}: all adapter ids are used up; start with a new bucket")
                try:
                    self._bucket.put(IDS, str(first + count).encode(), found[1] if found else None)
                except Conflict:
                    continue
                with writing(self.root):
                    replace_file(self.root / IDS, str(first + count).encode())
                return first
        raise StoreUnavailable("adapter ids are taken by others all the time; try again later")

    def look(self) -> None:
        """As in `NameStore`. While the bucket does not answer, what is known stays."""
        try:
            self.pull()
            self.is_out = False
        except StoreUnavailable as error:
            if not self.is_out:
                logger.error("%s. What is known of it stays in force", error)
            self.is_out = True

    def pull(self) -> None:
        """Make the local records those of the bucket, with the uploads that they refer to.

        Raises:
            StoreUnavailable: the bucket does not answer.
        """
        now = time.monotonic()
        news = {
            file: etag
            for file, etag in self._bucket.etags(NAMES).items()
            if self._etags.get(file) != etag and not self._complaints.get(file, _NONE).stands(etag, now)
        }
        if not news:
            return
        with self._locked():
            if ids := self._bucket.get(IDS):
                self._take_ids(ids[0])
        for file, etag in news.items():
            try:
                self._follow(file)
            except (StoreDamaged, *_NO_RECORD) as error:  # one bad name must not keep the others away
                if self._complaints.get(file, _NONE).etag != etag:
                    logger.error("%s/%s of the bucket is left out: %s", NAMES, file, error)
                self._complaints[file] = _Complaint(etag, now)

    def _take_ids(self, text: bytes) -> None:
        """Keep which numbers are given. What is damaged is left: new adapters are refused, names go on."""
        try:
            number_in(text, _GIVEN)
        except StoreDamaged as error:
            logger.error("%s", error)
            return
        with writing(self.root):
            replace_file(self.root / IDS, text)

    def _follow(self, file: str) -> None:
        """Take over what another server wrote.

        Raises:
            StoreDamaged: its upload is not in the bucket as it was.
        """
        if found := self._bucket.get(f"{NAMES}/{file}"):
            self._uploads.fetch(_record(found[0], file))  # long, so before the lock
        with self._locked():  # what was read before it may be older than what is here now
            if found := self._bucket.get(f"{NAMES}/{file}"):
                record = _record(found[0], file)
                self._uploads.fetch(record)
                self._write(file, record, found[1])

    def _put(self, path: str, content: bytes, etag: str | None) -> str:
        """`Bucket.put` of a record. A client that got no answer repeats it: its first write is in its way.

        Two servers that wrote the same at once both succeed: the change that each wanted is made.
        """
        try:
            return self._bucket.put(path, content, etag)
        except Conflict:
            found = self._bucket.get(path)
            if found is None or found[0] != content:
                raise
            return found[1]

    def _write(self, file: str, record: AdapterRecord | None, etag: str) -> None:
        path = self.folder / file
        with writing(self.root):
            if record:
                content = to_json(record, file)
                if not path.exists() or path.read_bytes() != content:
                    replace_file(path, content)
            elif path.exists():
                path.unlink()
                sync_folder(self.folder)
        self._etags[file] = etag

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with contextlib.ExitStack() as lock:
            with writing(self.root):
                make_folder(self.folder)
                lock.enter_context(locked(self.folder))
            yield


def open_names(root: str | Path) -> NameStore:
    """The names of a store, in step with its bucket if it has one."""
    try:
        url = (Path(root) / MIRROR).read_text()
    except FileNotFoundError:
        return NameStore(root)
    return MirroredNames(root, Bucket(url))


def attach(root: str | Path, url: str | None) -> None:
    """Make a store the mirror of a bucket, or see that it is the one that it was.

    Raises:
        GuardError: it mirrors another bucket, or has names of its own that a bucket in use does not know.
        StoreUnavailable: a bucket that is new to the store does not answer.
    """
    if check_mirror(root, url) is not None:
        with writing(Path(root)):
            make_folder(Path(root))
            replace_file(Path(root) / MIRROR, str(url).rstrip("/").encode())


def check_mirror(root: str | Path, url: str | None) -> Bucket | None:
    """What `attach` refuses, with nothing written. The bucket, if it is new to the store.

    A bucket that the store knows is not asked: without it, a server starts with what is known.

    Raises:
        GuardError, StoreUnavailable: as of `attach`.
    """
    marker = Path(root) / MIRROR
    wanted = url.rstrip("/") if url else None
    before = marker.read_text() if marker.exists() else None
    if before is not None and before != wanted:
        raise GuardError(
            f"the adapter store {root} mirrors {before}, not {wanted or 'nothing'}: start with "
            f"--store-mirror {before}, or with a new --adapter-store"
        )
    if wanted is None or before is not None:
        return None
    bucket = Bucket(wanted)
    if NameStore(root).all():
        raise GuardError(
            f"the adapter store {root} has names already, and its ids could be those of others in {wanted}: "
            "start with a new --adapter-store and upload the adapters again"
        )
    bucket.etags(NAMES)  # it answers
    return bucket


def _sound(found: tuple[bytes, str] | None, file: str) -> AdapterRecord | None:
    try:
        return _record(found[0], file) if found else None
    except _NO_RECORD as error:
        raise StoreDamaged(
            f"{NAMES}/{file} in the bucket is no record of a name ({type(error).__name__}); {REMEDY}"
        ) from error


def _digest(found: tuple[bytes, str] | None) -> str:
    return "" if found is None or found[0] == _REMOVED else hashlib.sha256(found[0]).hexdigest()


def _record(content: bytes, file: str) -> AdapterRecord | None:
    return None if content == _REMOVED else from_json(content, file)
