"""Uploads that name a remote source: who may read what, and the download before the gate."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from safelora_vllm.errors import AdapterRefused
from safelora_vllm.integration.server.changes import Manager
from safelora_vllm.integration.server.registry import Entry
from safelora_vllm.integration.server.schemas import UploadFromSource
from safelora_vllm.integration.server.uploads import incoming
from safelora_vllm.remote.address import Source, allowed, parse, parse_prefix
from safelora_vllm.remote.fetch import fetch
from safelora_vllm.remote.reach import Reach
from safelora_vllm.remote.refusals import forbidden
from safelora_vllm.settings import ServerSettings
from safelora_vllm.tenants.keys_file import Tenant
from safelora_vllm.tenants.principal import Principal

logger = logging.getLogger("vllm.safelora.remote")


@dataclass(frozen=True)
class RemoteSources:
    """What one API server may read.

    Attributes:
        admins: prefixes for admins.
        tenants: of the keys file, as it is now.
        reach: network addresses.
        threads: of downloads, which may take an hour; asyncio's few are for the short calls.
    """

    admins: tuple[Source, ...]
    tenants: Callable[[], Mapping[str, Tenant]]
    reach: Reach
    threads: ThreadPoolExecutor

    @classmethod
    def of(cls, settings: ServerSettings, tenants: Callable[[], Mapping[str, Tenant]]) -> RemoteSources:
        """As the settings say."""
        threads = ThreadPoolExecutor(
            max(1, settings.concurrent_uploads), thread_name_prefix="safelora-remote"
        )
        admins = tuple(map(parse_prefix, settings.remote_sources))
        return cls(admins, tenants, Reach.to(settings.remote_endpoints), threads)

    def check(self, who: Principal, text: str) -> Source:
        """An address that the caller may have read.

        Raises:
            AdapterRefused: source_malformed. SourceForbidden: source_not_allowed.
        """
        source = parse(text)
        tenant = self.tenants().get(who.tenant or "")
        prefixes = self.admins if who.kind == "admin" else tenant.remote_sources if tenant else ()
        if not allowed(source, prefixes):
            raise forbidden(
                "source_not_allowed",
                f"{source} is not within a prefix that this key may load from. The operator lists them: "
                "--remote-source for admins, remote_sources in the keys file for a tenant",
            )
        return source


def source_named(text: bytes) -> UploadFromSource | None:
    """The body of an upload from a remote source; None if it is one of another kind.

    Raises:
        RequestValidationError: a source, but not a valid body.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or "source" not in found:
        return None
    try:
        return UploadFromSource.model_validate(found)
    except ValidationError as error:
        raise RequestValidationError(error.errors(include_input=False, include_url=False)) from error


async def add_from_source(
    request: Request,
    who: Principal,
    managed: Manager,
    wanted: UploadFromSource,
    *,
    replace: bool,
    action: str = "upload",
    exam_override: str = "",
) -> Entry:
    """Download an adapter, and let it pass the gate like an upload. A refusal is in the audit log.

    Raises:
        AdapterRefused: the source's or the gate's. SafeLoRAError: whatever `Manager.add` raises.
    """
    remote: RemoteSources = request.app.state.safelora_remote_sources
    managed.check(who, wanted.name)
    async with _refusals_recorded(who, managed, wanted.name, action):
        source = remote.check(who, wanted.source)
    async with incoming(managed.reconciler.names.root) as folder:
        async with _refusals_recorded(who, managed, wanted.name, action):
            signed = await asyncio.to_thread(managed.reconciler.copies.signing, wanted.name) is not None
            most = managed.max_adapter_bytes
            path = await _fetched(remote, source, folder, most, wanted.digest, signed)
        about = {"adapter": wanted.name}  # a version follows, if it is accepted
        logger.info("%s was downloaded from %s for %s", wanted.name, source, who.key_id, extra=about)
        return await managed.add(
            who, wanted.name, path, replace=replace, action=action, exam_override=exam_override
        )


@asynccontextmanager
async def _refusals_recorded(who: Principal, managed: Manager, name: str, action: str) -> AsyncIterator[None]:
    try:
        yield
    except AdapterRefused as error:
        await managed.refused_source(who, name, action, error.codes)
        raise


async def _fetched(
    remote: RemoteSources, source: Source, folder: Path, max_bytes: int, digest: str | None, signed: bool
) -> Path:
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(
        remote.threads, fetch, source, folder, max_bytes, remote.reach, digest, signed
    )
