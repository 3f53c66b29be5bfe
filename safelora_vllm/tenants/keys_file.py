"""The keys file: what it may hold, who may be able to read it, and what is wrong with it."""

from __future__ import annotations

import hashlib
import os
import re
import stat
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safelora_vllm.errors import KeysError, UsageError
from safelora_vllm.remote.address import Source, parse_prefix
from safelora_vllm.tenants import signing_keys
from safelora_vllm.tenants.exam_rules import TenantExam
from safelora_vllm.tenants.principal import PART, PART_RULE, Principal
from safelora_vllm.tenants.quotas import LIMITS, Quota
from safelora_vllm.tenants.rules import SERVERS, TenantRules

ENVIRONMENT = "admin/environment"
_SECRET = re.compile(r"[!-~][ -~]{14,}[!-~]")  # what an HTTP header carries unchanged
_DIGEST = re.compile(r"sha256:([0-9a-fA-F]{64})")
_PLACEHOLDER = "replace-this"  # of the secrets in docs and examples
_PLACEHOLDERS = re.compile(r"replace[-_ ]?this|(choose-a|another)-long-secret$|inference-secret$", re.I)
RulesCheck = Callable[[str, TenantRules], None]  # an entry of the file and its rules; raises KeysError


@dataclass(frozen=True)
class Tenant:
    """What the file says of a tenant, besides its keys."""

    quota: Quota
    rules: TenantRules
    remote_sources: tuple[Source, ...] = ()  # prefixes that its uploads may name


@dataclass(frozen=True)
class KeysFile:
    """A file's content. keys: digest of a secret and whose it is."""

    keys: Sequence[tuple[bytes, Principal]] = field(default=(), repr=False)
    tenants: Mapping[str, Tenant] = field(default_factory=dict)


NO_KEYS = KeysFile()


def read(file: Path, check: RulesCheck | None = None) -> KeysFile:
    """What a keys file holds.

    Args:
        file: in TOML.
        check: of each tenant's rules.

    Raises:
        KeysError: it cannot be read, others can read it, or an entry is wrong. The entry is named, never its
            secret.
    """
    tables = _tables(file)
    try:
        tenants = dict(_tenants(tables))
        for name, tenant in tenants.items():
            if check is not None and tenant.rules != SERVERS:
                check(f"tenants.{name}", tenant.rules)
        return KeysFile(tuple(_entries(tables, tenants)), tenants)
    except KeysError as error:
        raise KeysError(f"keys file {file}: {error}") from None


def sha256(secret: str) -> bytes:
    """The digest by which a key is known."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


def check_replaced(entry: str, secret: str) -> None:
    """Raise KeysError for the secret of an example, which everybody knows."""
    if _PLACEHOLDERS.match(secret):
        raise KeysError(
            f"{entry} is an example's secret, such as one that begins with {_PLACEHOLDER}: expected one of "
            "your own. Make it with: openssl rand -base64 24"
        )


def check_secret(entry: str, secret: str) -> None:
    """Raise KeysError for a secret that can be guessed, or that no header can carry."""
    if not _SECRET.fullmatch(secret):
        raise KeysError(
            f"{entry} is not a valid secret: expected at least 16 printable ASCII characters without a space "
            "at either end. Make one with: openssl rand -base64 24"
        )
    check_replaced(entry, secret)


def stamp(file: Path) -> tuple[int, ...]:
    """What differs when the file was written, replaced, or (ctime) its mode changed."""
    try:
        status = file.stat()
    except OSError as error:
        raise _unreadable(file, error) from error
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino


def _unreadable(file: Path, error: OSError) -> KeysError:
    return KeysError(f"keys file {file} cannot be read ({error.strerror}); fix its path or its permissions")


def _tables(file: Path) -> dict[str, Any]:
    """The file's content. Its owner alone may be able to read it, or root's file this process's group."""
    try:
        with file.open("rb") as stream:
            status = os.fstat(stream.fileno())
            mode = stat.S_IMODE(status.st_mode)
            if mode & 0o077 and not (_in_secret_volume(file) and _only_for_our_group(status)):
                raise KeysError(
                    f"keys file {file} has mode {mode:04o}, so that others than its owner can read it. "
                    f"Run chmod 600 {file}, and replace its keys if others may have read them. A Kubernetes "
                    "secret needs an fsGroup and defaultMode: 0440"
                )
            return tomllib.load(stream)
    except OSError as error:
        raise _unreadable(file, error) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:  # they name a place, not its content
        raise KeysError(f"keys file {file} is not valid TOML: {error}") from None


def _only_for_our_group(status: os.stat_result) -> bool:
    """Whether a file is root's, and readable by a group that this process is in: a volume with an fsGroup."""
    if status.st_uid != 0 or stat.S_IMODE(status.st_mode) & 0o037:
        return False
    return status.st_gid in {os.getegid(), *os.getgroups()} and status.st_gid != 0


def _in_secret_volume(file: Path) -> bool:
    """Whether a file is in a volume that Kubernetes mounts: it is reached through the link ``..data``.

    Any other file of root's may be meant for all members of its group, such as ``users``.
    """
    data = file.parent / "..data"
    return data.is_symlink() and file.resolve().parent == data.resolve()


def _tenants(tables: dict[str, Any]) -> Iterator[tuple[str, Tenant]]:
    """Every tenant with its limits and rules."""
    _check_known("the file", tables, ("admin", "tenants"))
    for name, table in _table("tenants", tables.get("tenants", {})).items():
        _check_part("tenants", name)
        if name == "admin":
            raise KeysError("admin is not a valid tenant name: its keys would look like the operator's")
        entry = f"tenants.{name}"
        _check_known(
            entry,
            _table(entry, table),
            (*LIMITS, "less_strict", "policy", "exam", "remote_sources", *signing_keys.ENTRIES, "keys"),
        )
        limits = {LIMITS[key]: _limit(f"{entry}.{key}", table[key]) for key in LIMITS if key in table}
        policy, less_strict = (
            _table(f"{entry}.policy", table.get("policy", {})),
            table.get("less_strict", False),
        )
        if not isinstance(less_strict, bool):
            raise KeysError(f"{entry}.less_strict is {less_strict!r:.40}; give true or false")
        sources = tuple(_sources(f"{entry}.remote_sources", table.get("remote_sources", [])))
        exam = TenantExam.read(f"{entry}.exam", _table(f"{entry}.exam", table.get("exam", {})))
        rules = TenantRules(policy, less_strict, signing_keys.signing_rule(entry, table), exam)
        yield name, Tenant(Quota(**limits), rules, sources)


def _entries(tables: dict[str, Any], tenants: Mapping[str, Tenant]) -> Iterator[tuple[bytes, Principal]]:
    """Digest and principal of every key."""
    for name, digest in _digests("admin", tables.get("admin", {})):
        if f"admin/{name}" == ENVIRONMENT:
            raise KeysError("admin.environment means the key of SAFELORA_ADMIN_API_KEY; choose another name")
        yield digest, Principal("admin", f"admin/{name}")
    for tenant, found in tenants.items():
        for name, digest in _digests(f"tenants.{tenant}.keys", tables["tenants"][tenant].get("keys", {})):
            yield digest, Principal("tenant", f"{tenant}/{name}", tenant, found.quota)


def _digests(entry: str, value: object) -> Iterator[tuple[str, bytes]]:
    for name, secret in _table(entry, value).items():
        _check_part(entry, name)
        if isinstance(secret, str) and (digest := _DIGEST.fullmatch(secret)):
            yield name, bytes.fromhex(digest[1])
        elif isinstance(secret, str) and _SECRET.fullmatch(secret) and not secret.startswith("sha256:"):
            check_replaced(f"{entry}.{name}", secret)
            yield name, sha256(secret)
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


def _sources(entry: str, value: object) -> Iterator[Source]:
    if not isinstance(value, list) or not all(isinstance(prefix, str) for prefix in value):
        raise KeysError(f'{entry} is {value!r:.40}; give a list of prefixes such as "s3://BUCKET/FOLDER/"')
    for prefix in value:
        try:
            yield parse_prefix(prefix)
        except UsageError as error:
            raise KeysError(f"{entry}: {error}") from None


def _limit(entry: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise KeysError(f"{entry} is {value!r:.40}; give a whole number, 0 or more")
    return value
