"""Keys: where they come from, whose they are, and what becomes of a keys file that is edited."""

from __future__ import annotations

import hmac
import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from safelora_vllm.errors import KeysError
from safelora_vllm.store.name_record import tenant_of
from safelora_vllm.tenants.keys_file import (
    ENVIRONMENT,
    NO_KEYS,
    RulesCheck,
    Tenant,
    check_replaced,
    check_secret,
    read,
    sha256,
    stamp,
)
from safelora_vllm.tenants.principal import UNAUTHENTICATED, Principal
from safelora_vllm.tenants.rules import SERVERS, TenantRules

logger = logging.getLogger("vllm.safelora.keys")


@dataclass(frozen=True)
class _Known:
    """All keys at one moment, by the sha256 digest of their secret."""

    keys: Mapping[bytes, Principal] = field(repr=False)
    others: Principal  # who a caller without a known key is
    tenants: Mapping[str, Tenant]


class KeyRing:
    """The keys that are in force. Safe for several threads.

    The keys file is read again when it changes. If it is gone or wrong then, that is logged and the
    keys read last stay in force, so an edit gone wrong locks nobody out.
    """

    def __init__(
        self,
        keys_file: Path | None,
        admin: bytes | None,
        inference: frozenset[bytes],
        metrics: bytes | None = None,
        check: RulesCheck | None = None,
    ) -> None:
        """The arguments of `open`, secrets as digests."""
        self._check = check
        self._file, self._admin, self._inference, self._metrics = keys_file, admin, inference, metrics
        self._lock = threading.Lock()
        self._complaint = ""
        self._stamp = stamp(keys_file) if keys_file else None
        self._known = self._read()

    @classmethod
    def open(
        cls,
        keys_file: Path | None,
        admin_key: str | None,
        inference_keys: Sequence[str],
        metrics_key: str | None = None,
        check: RulesCheck | None = None,
    ) -> KeyRing:
        """Take the keys from the file, from the environment and from vLLM's ``--api-key``.

        Args:
            check: raises KeysError for a tenant's rules that this server cannot judge by.

        Raises:
            KeysError: the file cannot be read or used, two keys have one secret, one is an
                example's, or the admin's or the metrics' is too short.
        """
        for entry, key in (("the admin key", admin_key), ("the metrics key", metrics_key)):
            if key:
                check_secret(entry, key)
        for key in inference_keys:  # vLLM's own, which may be short
            check_replaced("a key of vLLM's --api-key", key)
        inference = frozenset(sha256(key) for key in inference_keys if key)
        admin, metrics = (sha256(key) if key else None for key in (admin_key, metrics_key))
        return cls(keys_file, admin, inference, metrics, check)

    def identify(self, token: str | None) -> Principal:
        """Whose key a bearer token is; `UNAUTHENTICATED` for nobody's.

        Without inference keys vLLM serves everybody and ignores the header, so anyone unknown is
        the anonymous principal then. The time taken does not depend on which key it is.
        """
        known = self._current()
        if not token:
            return known.others
        digest, found = sha256(token), known.others
        for candidate, principal in known.keys.items():
            if hmac.compare_digest(candidate, digest):
                found = principal
        return found

    def rules(self, name: str) -> TenantRules:
        """By which rules the file wants adapters of this name judged: those of the tenant that owns it."""
        tenant = self._current().tenants.get(tenant_of(name))
        return tenant.rules if tenant else SERVERS

    @property
    def is_current(self) -> bool:
        """Whether the keys in force are those of the file as it is now."""
        self._current()
        return not self._complaint

    @property
    def tenants(self) -> Mapping[str, Tenant]:
        """The tenants of the file, by name."""
        return self._current().tenants

    @property
    def has_admin(self) -> bool:
        """Whether anybody can change what is served for all."""
        return any(principal.kind == "admin" for principal in self.principals)

    @property
    def principals(self) -> list[Principal]:
        """Whose keys are known, one for each key."""
        return list(self._current().keys.values())

    def _current(self) -> _Known:
        """The keys, after a look at whether their file has changed."""
        if self._file is not None:
            with self._lock:
                self._renew(self._file)
        return self._known

    def _renew(self, file: Path) -> None:
        found = None
        try:
            found = stamp(file)
            if found == self._stamp:
                return
            former, self._known = self._known, self._read()
        except KeysError as error:
            if isinstance(error.__cause__, OSError):
                found = None  # nothing was read: try again at the next call
            if str(error) != self._complaint:
                self._complaint = str(error)
                logger.error("%s. Until then the keys read before stay in force", error)
        else:
            self._complaint = ""
            logger.info("keys file %s read again: %s", file, _exchanged(former, self._known))
        self._stamp = found

    def _read(self) -> _Known:
        """All keys, from the file as it is now."""
        file = read(self._file, self._check) if self._file else NO_KEYS
        keys: dict[bytes, Principal] = {}
        inference = Principal("inference", "inference", sees_all=self._file is None)
        found = [(digest, inference) for digest in self._inference]
        if self._admin:
            found.append((self._admin, Principal("admin", ENVIRONMENT)))
        if self._metrics:
            found.append((self._metrics, Principal("metrics", "metrics")))
        try:
            for digest, principal in [*found, *file.keys]:
                other = keys.setdefault(digest, principal)
                if other is not principal:
                    raise KeysError(
                        f"the keys {other.key_id} and {principal.key_id} have the same secret; "
                        "give each its own"
                    )
        except KeysError as error:
            raise KeysError(f"keys file {self._file}: {error}" if self._file else str(error)) from None
        others = Principal("anonymous", "anonymous", sees_all=self._file is None)
        return _Known(keys, UNAUTHENTICATED if self._inference else others, file.tenants)


def _exchanged(former: _Known, known: _Known) -> str:
    """For the log: how many keys of the file are in force, and which came and went, without their secrets."""
    before, now = _of_file(former), _of_file(known)
    told = [f"{len(now)} keys in force"]
    for word, keys in (("gone", before - now), ("new", now - before)):
        if keys:
            told.append(f"{word}: {', '.join(sorted(key_id for _, key_id in keys))}")
    return "; ".join(told)


def _of_file(known: _Known) -> set[tuple[bytes, str]]:
    """Digest and id of each key: one that has another id now is another's."""
    return {
        (digest, of.key_id)
        for digest, of in known.keys.items()
        if of.kind in ("admin", "tenant") and of.key_id != ENVIRONMENT
    }
