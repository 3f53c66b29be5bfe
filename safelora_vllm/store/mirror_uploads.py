"""The uploads of a mirrored store: what a record refers to is in the bucket before it, and here after it."""

from __future__ import annotations

import contextlib
from pathlib import Path

from safelora_vllm.adapters.read import CONFIG, WEIGHTS, content_digest
from safelora_vllm.errors import StoreDamaged, StoreUnavailable
from safelora_vllm.remote.bucket import Bucket, Conflict
from safelora_vllm.store.layout import RAW
from safelora_vllm.store.name_record import AdapterRecord
from safelora_vllm.store.raw import RawStore


class MirroredUploads:
    """``raw/`` of a store and of its bucket. All of it may take long: hold no lock meanwhile."""

    def __init__(self, root: str | Path, bucket: Bucket) -> None:
        self._bucket, self._raw = bucket, RawStore(root)
        self._kept: set[str] = set()  # digests that are in the bucket

    def put(self, record: AdapterRecord | None) -> None:
        """What a record refers to into the bucket.

        Raises:
            StoreUnavailable: the bucket does not answer, or an upload is neither there nor here.
        """
        for digest in {version.digest for version in record.versions} - self._kept if record else ():
            for name in (CONFIG, WEIGHTS):
                path = f"{RAW}/{digest}/{name}"
                if self._bucket.size(path) is None:
                    with contextlib.suppress(Conflict):  # it is there now
                        self._bucket.put(path, _content(self._raw.path(digest) / name), None)
            self._kept.add(digest)

    def fetch(self, record: AdapterRecord | None) -> None:
        """What a record refers to out of the bucket.

        Raises:
            StoreDamaged: the upload that is served is not in the bucket as it was.
            StoreUnavailable: the bucket does not answer.
        """
        for version in record.versions if record else ():
            live = record is not None and version.digest == record.live.digest
            with contextlib.nullcontext() if live else contextlib.suppress(StoreDamaged):
                self._download(version.digest)

    def _download(self, digest: str) -> None:
        if self._raw.has(digest):
            return
        files: dict[str, bytes] = {}
        for name in (CONFIG, WEIGHTS):
            path = f"{RAW}/{digest}/{name}"
            size = self._bucket.size(path)
            if size is None or (found := self._bucket.get(path, size)) is None:
                raise StoreDamaged(f"{path} is not in the bucket; upload the adapter again")
            files[name] = found[0]
        if content_digest(files[CONFIG], files[WEIGHTS]) != digest:
            raise StoreDamaged(f"{RAW}/{digest} in the bucket has other content; upload the adapter again")
        self._raw.keep(digest, files)
        self._kept.add(digest)


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise StoreUnavailable(
            f"{file} cannot be read ({error.strerror}); upload the adapter again"
        ) from error
