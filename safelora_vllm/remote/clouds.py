"""URLs of objects in S3, Google Cloud Storage and Azure, signed with the process's own credentials.

obstore finds the credentials as the clouds' own tools do: environment, web identity, instance metadata.
"""

from __future__ import annotations

from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING

from safelora_vllm.errors import refuse
from safelora_vllm.remote.address import Source
from safelora_vllm.remote.refusals import unavailable

if TYPE_CHECKING:
    from obstore.store import AzureStore, GCSStore, S3Store

_VALID = timedelta(minutes=15)
_RETRY = timedelta(seconds=10)


def url(source: Source) -> str:
    """Where an object can be read for a quarter of an hour. Of https, its own address. Blocking.

    Raises:
        AdapterRefused: source_unsupported. SourceUnavailable: source_credentials.
    """
    if source.scheme == "https":
        return f"{source}?{source.query}" if source.query else str(source)
    try:
        import obstore
    except ImportError:
        raise refuse(
            "source_unsupported",
            f"{source.scheme}:// needs obstore, which is missing: pip install '.[remote]' in the checkout",
        ) from None
    try:
        return obstore.sign(_store(source.scheme, source.host), "GET", "/".join(source.segments), _VALID)
    except Exception:  # its text may hold a URL with a signature, or an address inside
        raise unavailable(
            "source_credentials",
            f"a URL for {source} could not be signed: this process has no credentials for {source.scheme}:// "
            "in its environment, or they cannot sign",
        ) from None


@cache
def _store(scheme: str, bucket: str) -> S3Store | GCSStore | AzureStore:
    from obstore.store import AzureStore, GCSStore, S3Store

    retry: dict[str, object] = {"max_retries": 1, "retry_timeout": _RETRY}
    kinds = {"s3": S3Store, "gs": GCSStore, "az": AzureStore}
    return kinds[scheme](bucket, retry_config=retry)  # type: ignore[no-any-return]
