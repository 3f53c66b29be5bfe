"""A bucket of the operator's: objects read, listed, and written on condition.

Bucket and credentials are the operator's configuration, never a caller's, so obstore's own client is used.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

from safelora_vllm.errors import GuardError, StoreUnavailable
from safelora_vllm.remote.address import CLOUDS, is_remote
from safelora_vllm.remote.bucket_causes import because

_RETRY = {"max_retries": 3, "retry_timeout": timedelta(seconds=15)}
_SECONDS = 30  # for a request, and more for each of
_BYTES_A_SECOND = 256 * 1024
_ENDPOINTS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT")


class Conflict(Exception):
    """Somebody else wrote the object first."""


class Bucket:
    """Objects under one prefix. Safe for several threads.

    What the storage must guarantee: after a write, every read and every list sees it or a later one; a write
    on condition (``If-Match``, ``If-None-Match: *``) happens if and only if the condition holds.
    """

    def __init__(self, url: str) -> None:
        """Raises:
        GuardError: obstore is missing, or the address is not one of a bucket.
        """
        if not is_remote(url) or url.partition("://")[0] not in CLOUDS or "?" in url:
            raise GuardError(
                f"{url!r:.200} is not a valid bucket: expected s3://BUCKET/PREFIX, gs:// or az://"
            )
        try:
            import obstore
            from obstore.store import from_url
        except ImportError:
            raise GuardError(
                "a store's mirror needs obstore, which is missing: pip install '.[remote]' in the checkout"
            ) from None
        self.url = url.rstrip("/")
        self._obstore: Any = obstore
        self._from_url: Any = from_url
        self._clients: dict[int, Any] = {}  # by the seconds that a request may take, which are a client's
        try:
            self._store = self._client(0)
        except Exception as error:
            raise GuardError(f"the bucket {self.url} cannot be used: {because(error)}") from None

    def get(self, path: str, nbytes: int = 0) -> tuple[bytes, str] | None:
        """An object's content and ETag, None where there is none. nbytes: a large one's, which takes longer.

        Raises:
            StoreUnavailable: the bucket does not answer.
        """
        try:
            found = self._obstore.get(self._client(nbytes), path)
            return bytes(found.bytes()), str(found.meta["e_tag"])
        except FileNotFoundError:
            return None
        except Exception as error:
            raise self._unavailable(error) from None

    def size(self, path: str) -> int | None:
        """Bytes of an object, None where there is none.

        Raises:
            StoreUnavailable: the bucket does not answer.
        """
        try:
            return int(self._obstore.head(self._store, path)["size"])
        except FileNotFoundError:
            return None
        except Exception as error:
            raise self._unavailable(error) from None

    def etags(self, folder: str) -> dict[str, str]:
        """The objects of a folder by their names in it, with their ETags.

        Raises:
            StoreUnavailable: the bucket does not answer.
        """
        try:
            return {
                str(meta["path"]).rpartition("/")[2]: str(meta["e_tag"])
                for batch in self._obstore.list(self._store, folder)
                for meta in batch
            }
        except Exception as error:
            raise self._unavailable(error) from None

    def put(self, path: str, content: bytes, etag: str | None) -> str:
        """Write an object if it still has this ETag, or is still not there; the new ETag.

        Raises:
            Conflict: the condition does not hold. StoreUnavailable: the bucket does not answer.
        """
        mode = "create" if etag is None else {"e_tag": etag}
        try:
            client = self._client(len(content))
            return str(self._obstore.put(client, path, content, mode=mode, use_multipart=False)["e_tag"])
        except (self._obstore.exceptions.AlreadyExistsError, self._obstore.exceptions.PreconditionError):
            raise Conflict from None
        except Exception as error:
            raise self._unavailable(error) from None

    def _client(self, nbytes: int) -> Any:
        """One whose requests may take as long as so many bytes need."""
        seconds = _SECONDS
        while (seconds - _SECONDS) * _BYTES_A_SECOND < nbytes:
            seconds *= 2
        if seconds not in self._clients:
            # Options that are given take the place of the environment's.
            http = _allows_http(self.url)
            options = {"timeout": f"{seconds}s", "connect_timeout": "5s", "allow_http": http}
            self._clients[seconds] = self._from_url(self.url, client_options=options, retry_config=_RETRY)
        return self._clients[seconds]

    def _unavailable(self, error: Exception) -> StoreUnavailable:
        return StoreUnavailable(f"the bucket {self.url} cannot be read or written: {because(error)}")


def _allows_http(url: str) -> bool:
    """As the environment says; else for S3 if the endpoint that it names has no TLS."""
    if said := os.environ.get("AWS_ALLOW_HTTP"):
        return said.lower() in ("1", "true")
    endpoints = (os.environ.get(name, "") for name in _ENDPOINTS)
    return url.startswith("s3://") and any(endpoint.startswith("http://") for endpoint in endpoints)
