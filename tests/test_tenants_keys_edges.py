"""Access at its edges: limits of zero, tenants without keys, names of three parts, every sentence in full."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from safelora_vllm.errors import KeysError, QuotaExceeded
from safelora_vllm.tenants.keys import KeyRing
from safelora_vllm.tenants.principal import Principal
from safelora_vllm.tenants.quotas import Quota

SECRET, OTHER = "sixteen or more letters", "another secret of a key"
_TABLE = "expected a table"
_NAME = "a name is 1 to 128 letters, digits, '.', '_' or '-', the first a letter or a digit"
_USABLE = (
    "expected a string of at least 16 printable ASCII characters without a space at either end, or "
    "'sha256:' and the 64 hexadecimal digits of one"
)


def keys_file(folder: Path, text: str) -> Path:
    """A new keys file in the place of the one before."""
    new, file = folder / "new", folder / "keys.toml"
    new.touch(0o600)
    new.write_text(text)
    return new.rename(file)


def test_the_metrics_key_is_its_own_kind_with_and_without_a_file(tmp_path: Path) -> None:
    for file in (None, keys_file(tmp_path, f'[admin]\na = "{SECRET}"\n')):
        ring = KeyRing.open(file, None, [], OTHER)
        assert ring.identify(OTHER) == Principal("metrics", "metrics")
        assert ring.identify(None) == Principal("anonymous", "anonymous", sees_all=file is None)
    with pytest.raises(KeysError, match="the keys admin/environment and metrics have the same secret"):
        KeyRing.open(None, SECRET, [], SECRET)


@pytest.mark.parametrize(
    ("admin", "metrics", "entry"), [("short", None, "admin"), (None, "x" * 15, "metrics")]
)
def test_a_key_of_the_environment_cannot_be_guessed(
    admin: str | None, metrics: str | None, entry: str
) -> None:
    with pytest.raises(KeysError, match=f"the {entry} key is not a valid secret: .* 16 .*openssl rand"):
        KeyRing.open(None, admin, [], metrics)
    KeyRing.open(None, "x" * 16, ["short"], "y" * 16)  # --api-key is vLLM's own


def test_limits_may_be_zero_and_a_tenant_may_have_no_keys(tmp_path: Path) -> None:
    limits = "max_adapters = 0\nmax_bytes = 0\nmax_rank = 0\n"
    text = f'[tenants.acme]\n{limits}[tenants.acme.keys]\nci = "{SECRET}"\n[tenants.later]\n{limits}'
    found = KeyRing.open(keys_file(tmp_path, text), None, []).identify(SECRET)
    assert found == Principal("tenant", "acme/ci", "acme", Quota(0, 0, 0))


def test_the_first_part_of_a_name_is_its_owner() -> None:
    """Names of three parts are refused when they are given; a request may ask for one nevertheless."""
    tenant = Principal("tenant", "acme/ci", "acme")
    for name, own in (("acme/a/b", True), ("globex/acme/a", False), ("acme2/acme/", False), ("/acme", False)):
        assert (tenant.may_use(name), tenant.may_manage(name)) == (own, own), name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f'[user]\na = "{SECRET}"\n', "the file has unknown entries ['user']; known are admin, tenants"),
        ("tenants = 5\n", f"tenants is of type int; {_TABLE}, [tenants]"),
        ("admin = 5\n", f"admin is of type int; {_TABLE}, [admin]"),
        ("[tenants]\nacme = 5\n", f"tenants.acme is of type int; {_TABLE}, [tenants.acme]"),
        ("[tenants.acme]\nkeys = 5\n", f"tenants.acme.keys is of type int; {_TABLE}, [tenants.acme.keys]"),
        (
            "[tenants.acme]\nci = 5\n",
            "tenants.acme has unknown entries ['ci']; known are max_adapters, max_bytes, max_rank, "
            "less_strict, policy, exam, remote_sources, signing_keys, require_signature, keys",
        ),
        ("[tenants.acme]\nmax_rank = -1\n", "tenants.acme.max_rank is -1; give a whole number, 0 or more"),
        ('[tenants."a b"]\n', f"tenants has an entry called 'a b'; {_NAME}"),
        (f'[admin]\n"a b" = "{SECRET}"\n', f"admin has an entry called 'a b'; {_NAME}"),
        ('[admin]\na = "short"\n', f"admin.a is not a valid secret: {_USABLE}"),
        ('[tenants.acme.keys]\nci = "short"\n', f"tenants.acme.keys.ci is not a valid secret: {_USABLE}"),
        (
            f'[admin]\nenvironment = "{SECRET}"\n',
            "admin.environment means the key of SAFELORA_ADMIN_API_KEY; choose another name",
        ),
        ("[tenants.admin]\n", "admin is not a valid tenant name: its keys would look like the operator's"),
        (
            f'[admin]\na = "{SECRET}"\n[tenants.b.keys]\nc = "{SECRET}"\n',
            "the keys admin/a and b/c have the same secret; give each its own",
        ),
    ],
    ids=lambda value: value.split(";")[0],
)
def test_what_is_wrong_with_a_file_is_told_in_full(text: str, message: str, tmp_path: Path) -> None:
    file = keys_file(tmp_path, text)
    with pytest.raises(KeysError) as told:
        KeyRing.open(file, None, [])
    assert str(told.value) == f"keys file {file}: {message}"


def test_without_a_file_none_is_named() -> None:
    with pytest.raises(KeysError) as told:
        KeyRing.open(None, SECRET, [SECRET])
    message = "the keys inference and admin/environment have the same secret; give each its own"
    assert str(told.value) == message


def test_an_exceeded_quota_is_told_in_full() -> None:
    with pytest.raises(QuotaExceeded) as told:
        Quota(20, 100, 32).check(21, 100, 64)
    assert str(told.value) == (
        "over the tenant's quota: max_adapters is 20, 21 would be needed; max_rank is 32, 64 would be "
        "needed. Either remove an adapter and train with a smaller rank, or ask the operator to raise the "
        "limit in the keys file"
    )
    with pytest.raises(QuotaExceeded, match="Either remove an adapter or an old version, or ask"):
        Quota(20, 100, 32).check(20, 101, 32)


def test_what_becomes_of_an_edited_file_is_logged_in_full(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "vllm.safelora.keys")
    file = keys_file(tmp_path, f'[admin]\na = "{SECRET}"\n')
    ring = KeyRing.open(file, None, [])
    for text in ("[user]\n", f'[admin]\na = "{SECRET}"\nb = "{OTHER}"\n'):
        keys_file(tmp_path, text)
        ring.identify(SECRET)
    assert [record.getMessage() for record in caplog.records] == [
        f"keys file {file}: the file has unknown entries ['user']; known are admin, tenants. "
        "Until then the keys read before stay in force",
        f"keys file {file} read again: 2 keys in force; new: admin/b",
    ]


def test_an_examples_secret_in_vllms_api_key_is_refused_by_its_option() -> None:
    with pytest.raises(KeysError, match=r"^a key of vLLM's --api-key is an example's secret"):
        KeyRing.open(None, SECRET, ["replace-this-key-of-an-example"])
