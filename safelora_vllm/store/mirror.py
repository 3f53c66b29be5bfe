"""The store's names and uploads in a bucket, so that servers on several disks serve the same.

The local store stays what servers and gates read. The bucket decides: a name is changed by one write on
condition there, and the local record follows. Uploads are in the bucket before a name refers to them.

names/<quoted name>.json   as in the store; ``{"removed": true}`` for a name that is gone
raw/<digest>/<file>        never changed
ids                        the next number
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from safelora_vllm.adapters.read import CONFIG, WEIGHTS, content_digest
from safelora_vllm.errors import GuardError, StoreDamaged, StoreUnavailable, UsageError
from safelora_vllm.files import locked, make_folder, replace_file, sync_folder, writing
from safelora_vllm.remote.bucket import Bucket, Conflict
from safelora_vllm.store.layout import IDS, MIRROR, NAMES, RAW
from safelora_vllm.store.name_record import AdapterRecord, file_of, from_json, to_json
from safelora_vllm.store.names import FIRST_ID, LAST_ID, REMEDY, NameStore
from safelora_vllm.store.raw import RawStore

logger = logging.getLogger("vllm.safelora.store")
_TRIES = 20
_NO_RECORD = (ValueError, KeyError, TypeError, RecursionError, UsageError)
_REMOVED = json.dumps({"removed": True}).encode()


class MirroredNames(NameStore):
    """A `NameStore` whose changes are made in a bucket first."""

    def __init__(self, root: str | Path, bucket: Bucket) -> None:
        super().__init__(root)
        self._bucket, self._raw = bucket, RawStore(root)
        self._etags: dict[str, str] = {}  # of what the local records are
        self._complaints: dict[str, str] = {}  # of which records
        self._kept: set[str] = set()  # digests that are in the bucket
        self._out = False

    def update(
        self,
        name: str,
        change: Callable[[AdapterRecord | None], AdapterRecord | None],
        around: Callable[[str, AdapterRecord | None], AbstractContextManager[None]] | None = None,
    ) -> AdapterRecord | None:
        """As in `NameStore`, of the bucket's record: of two servers, one sees what the other wrote."""
        file = file_of(name)
        with self._locked():
            for _ in range(_TRIES):
                found = self._bucket.get(f"{NAMES}/{file}")
                before = _sound(found[0], file) if found else None
                after = change(before)
                if after != before:
                    self._upload(after)
                    content = to_json(after, file) if after else _REMOVED
                    try:
                        with around(self.file_digest(name), after) if around else contextlib.nullcontext():
                            etag = self._bucket.put(f"{NAMES}/{file}", content, found[1] if found else None)
                            self._write(file, after, etag)
                    except Conflict:
                        continue
                elif found:
                    self._follow(file, after, found[1])
                return after
        raise StoreUnavailable(f"{name} is changed by others all the time; try again later")

    def reserve_ids(self, count: int) -> int:
        """As in `NameStore`, for all servers of the bucket."""
        with self._locked():
            for _ in range(_TRIES):
                found = self._bucket.get(IDS)
                first = int(found[0]) if found else FIRST_ID
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

    def stamp(self) -> int:
        """As in `NameStore`, after a look into the bucket. While it does not answer, what is known stays."""
        try:
            self.pull()
            self._out = False
        except StoreUnavailable as error:
            if not self._out:
                logger.error("%s. What is known of it stays in force", error)
            self._out = True
        return super().stamp()

    def pull(self) -> None:
        """Make the local records those of the bucket, with the uploads that they refer to.

        Raises:
            StoreUnavailable: the bucket does not answer.
        """
        if self._bucket.etags(NAMES) == self._etags:
            return
        with self._locked():
            if ids := self._bucket.get(IDS):
                with writing(self.root):
                    replace_file(self.root / IDS, ids[0])
            for file, etag in self._bucket.etags(NAMES).items():
                if self._etags.get(file) == etag or not (found := self._bucket.get(f"{NAMES}/{file}")):
                    continue
                try:
                    self._follow(file, _record(found[0], file), found[1])
                except (StoreDamaged, *_NO_RECORD) as error:  # one bad name must not keep the others away
                    if self._complaints.get(file) != found[1]:
                        logger.error("%s/%s of the bucket is left out: %s", NAMES, file, error)
                    self._complaints[file] = found[1]

    def _follow(self, file: str, record: AdapterRecord | None, etag: str) -> None:
        """Take over what another server wrote.

        Raises:
            StoreDamaged: its upload is not in the bucket as it was.
        """
        for version in record.versions if record else ():
            live = record is not None and version.digest == record.live.digest
            with contextlib.nullcontext() if live else contextlib.suppress(StoreDamaged):
                self._download(version.digest)
        self._write(file, record, etag)

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

    def _upload(self, record: AdapterRecord | None) -> None:
        """What a record refers to, before the record."""
        for digest in {version.digest for version in record.versions} - self._kept if record else ():
            folder = self._raw.path(digest)
            if not self._raw.has(digest) and self._bucket.get(f"{RAW}/{digest}/{WEIGHTS}"):
                continue  # of an older version, lost here
            for name in (CONFIG, WEIGHTS):
                with contextlib.suppress(Conflict):  # it is there
                    self._bucket.put(f"{RAW}/{digest}/{name}", _content(folder / name), None)
            self._kept.add(digest)

    def _download(self, digest: str) -> None:
        if self._raw.has(digest):
            return
        files: dict[str, bytes] = {}
        for name in (CONFIG, WEIGHTS):
            if (found := self._bucket.get(f"{RAW}/{digest}/{name}")) is None:
                raise StoreDamaged(f"{RAW}/{digest}/{name} is not in the bucket; upload the adapter again")
            files[name] = found[0]
        if content_digest(files[CONFIG], files[WEIGHTS]) != digest:
            raise StoreDamaged(f"{RAW}/{digest} in the bucket has other content; upload the adapter again")
        self._raw.keep(digest, files)
        self._kept.add(digest)

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
    """
    marker = Path(root) / MIRROR
    wanted = url.rstrip("/") if url else None
    before = marker.read_text() if marker.exists() else None
    if before == wanted:
        return
    if before is not None:
        raise GuardError(
            f"the adapter store {root} mirrors {before}, not {wanted}: start with --store-mirror {before}, "
            "or with a new --adapter-store"
        )
    assert wanted is not None
    bucket, store = Bucket(wanted), NameStore(root)
    if store.all():
        raise GuardError(
            f"the adapter store {root} has names already, and its ids could be those of others in {wanted}: "
            "start with a new --adapter-store and upload the adapters again"
        )
    bucket.etags(NAMES)  # it answers
    with writing(Path(root)):
        make_folder(Path(root))
        replace_file(marker, wanted.encode())


def _sound(content: bytes, file: str) -> AdapterRecord | None:
    try:
        return _record(content, file)
    except _NO_RECORD as error:
        raise StoreDamaged(
            f"{NAMES}/{file} in the bucket is no record of a name ({type(error).__name__}); {REMEDY}"
        ) from error


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise StoreUnavailable(
            f"{file} cannot be read ({error.strerror}); upload the adapter again"
        ) from error


def _record(content: bytes, file: str) -> AdapterRecord | None:
    return None if content == _REMOVED else from_json(content, file)
