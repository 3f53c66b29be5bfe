"""Keys: where they come from, whose they are, and what becomes of a keys file that is edited."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import stat
import threading
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safelora_vllm.errors import KeysError
from safelora_vllm.tenants.principal import PART, PART_RULE, UNAUTHENTICATED, Principal
from safelora_vllm.tenants.quotas import LIMITS, Quota

logger = logging.getLogger("vllm.safelora.keys")
ENVIRONMENT = "admin/environment"
_SECRET = re.compile(r"[!-~][ -~]{14,}[!-~]")  # what an HTTP header carries unchanged
_DIGEST = re.compile(r"sha256:([0-9a-fA-F]{64})")


@dataclass(frozen=True)
class _Known:
    """All keys at one moment, by the sha256 digest of their secret."""

    keys: Mapping[bytes, Principal] = field(repr=False)
    others: Principal  # who a caller without a known key is


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
    ) -> None:
        """The arguments of `open`, secrets as digests."""
        self._file, self._admin, self._inference, self._metrics = keys_file, admin, inference, metrics
        self._lock = threading.Lock()
        self._complaint = ""
        self._stamp = _stamp(keys_file) if keys_file else None
        self._known = self._read()

    @classmethod
    def open(
        cls,
        keys_file: Path | None,
        admin_key: str | None,
        inference_keys: Sequence[str],
        metrics_key: str | None = None,
    ) -> KeyRing:
        """Take the keys from the file, from the environment and from vLLM's ``--api-key``.

        Raises:
            KeysError: the file cannot be read or used, or two keys have one secret.
        """
        inference = frozenset(_sha256(key) for key in inference_keys if key)
        admin, metrics = (_sha256(key) if key else None for key in (admin_key, metrics_key))
        return cls(keys_file, admin, inference, metrics)

    def identify(self, token: str | None) -> Principal:
        """Whose key a bearer token is; `UNAUTHENTICATED` for nobody's.

        Without inference keys vLLM serves everybody and ignores the header, so anyone unknown is
        the anonymous principal then. The time taken does not depend on which key it is.
        """
        known = self._current()
        if not token:
            return known.others
        digest, found = _sha256(token), known.others
        for candidate, principal in known.keys.items():
            if hmac.compare_digest(candidate, digest):
                found = principal
        return found

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
        stamp = None
        try:
            stamp = _stamp(file)
            if stamp == self._stamp:
                return
            self._known = self._read()
        except KeysError as error:
            if isinstance(error.__cause__, OSError):
                stamp = None  # nothing was read: try again at the next call
            if str(error) != self._complaint:
                self._complaint = str(error)
                logger.error("%s. Until then the keys read before stay in force", error)
        else:
            self._complaint = ""
            logger.info("keys file %s read again: %d keys in force", file, len(self._known.keys))
        self._stamp = stamp

    def _read(self) -> _Known:
        """All keys, from the file as it is now."""
        tables = _tables(self._file) if self._file else {}
        keys: dict[bytes, Principal] = {}
        inference = Principal("inference", "inference", sees_all=self._file is None)
        found = [(digest, inference) for digest in self._inference]
        if self._admin:
            found.append((self._admin, Principal("admin", ENVIRONMENT)))
        if self._metrics:
            found.append((self._metrics, Principal("metrics", "metrics")))
        try:
            for digest, principal in [*found, *_entries(tables)]:
                other = keys.setdefault(digest, principal)
                if other is not principal:
                    raise KeysError(
                        f"the keys {other.key_id} and {principal.key_id} have the same secret; "
                        "give each its own"
                    )
        except KeysError as error:
            raise KeysError(f"keys file {self._file}: {error}" if self._file else str(error)) from None
        others = Principal("anonymous", "anonymous", sees_all=self._file is None)
        return _Known(keys, UNAUTHENTICATED if self._inference else others)


def _sha256(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


def _stamp(file: Path) -> tuple[int, ...]:
    """What differs when the file was written, replaced, or (ctime) its mode changed."""
    try:
        status = file.stat()
    except OSError as error:
        raise _unreadable(file, error) from error
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino


def _unreadable(file: Path, error: OSError) -> KeysError:
    return KeysError(f"keys file {file} cannot be read ({error.strerror}); fix its path or its permissions")


def _tables(file: Path) -> dict[str, Any]:
    """The file's content. Its owner alone may be able to read it."""
    try:
        with file.open("rb") as stream:
            mode = stat.S_IMODE(os.fstat(stream.fileno()).st_mode)
            if mode & 0o077:
                raise KeysError(
                    f"keys file {file} has mode {mode:04o}, so that others than its owner can read it. "
                    f"Run chmod 600 {file}, and replace its keys if others may have read them"
                )
            return tomllib.load(stream)
    except OSError as error:
        raise _unreadable(file, error) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:  # they name a place, not its content
        raise KeysError(f"keys file {file} is not valid TOML: {error}") from None


def _entries(tables: dict[str, Any]) -> Iterator[tuple[bytes, Principal]]:
    """Digest and principal of every key in the file. Errors name the entry, never its secret."""
    _check_known("the file", tables, ("admin", "tenants"))
    for name, digest in _digests("admin", tables.get("admin", {})):
        if f"admin/{name}" == ENVIRONMENT:
            raise KeysError("admin.environment means the key of SAFELORA_ADMIN_API_KEY; choose another name")
        yield digest, Principal("admin", f"admin/{name}")
    for tenant, table in _table("tenants", tables.get("tenants", {})).items():
        _check_part("tenants", tenant)
        if tenant == "admin":
            raise KeysError("admin is not a valid tenant name: its keys would look like the operator's")
        entry = f"tenants.{tenant}"
        _check_known(entry, _table(entry, table), (*LIMITS, "keys"))
        limits = {LIMITS[key]: _limit(f"{entry}.{key}", table[key]) for key in LIMITS if key in table}
        for name, digest in _digests(f"{entry}.keys", table.get("keys", {})):
            yield digest, Principal("tenant", f"{tenant}/{name}", tenant, Quota(**limits))


def _digests(entry: str, value: object) -> Iterator[tuple[str, bytes]]:
    for name, secret in _table(entry, value).items():
        _check_part(entry, name)
        if isinstance(secret, str) and (digest := _DIGEST.fullmatch(secret)):
            yield name, bytes.fromhex(digest[1])
        elif isinstance(secret, str) and _SECRET.fullmatch(secret) and not secret.startswith("sha256:"):
            yield name, _sha256(secret)
        else:
            raise KeysError(
                f"{entry}.{name} is not a valid secret: expected a string of at least 16 printable ASCII "
                "characters without a space at either end, or 'sha256:' and the 64 hexadecimal digits of one"
            )


def _table(entry: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise KeysError(f"{entry} is of type {type(value).__name__}; expected a table, [{entry}]")
    return value


def _check_known(entry: str, table: dict[str, Any], known: tuple[str, ...]) -> None:
    if unknown := sorted(set(table) - set(known)):
        raise KeysError(f"{entry} has unknown entries {unknown!r:.200}; known are {', '.join(known)}")


def _check_part(entry: str, name: str) -> None:
    if not PART.fullmatch(name):
        raise KeysError(f"{entry} has an entry called {name!r:.200}; a name is {PART_RULE}")


def _limit(entry: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise KeysError(f"{entry} is {value!r:.40}; give a whole number, 0 or more")
    return value
