"""Who a caller is, what he may do, and what becomes of a keys file that is edited."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safelora_vllm.errors import KeysError, QuotaExceeded, UsageError
from safelora_vllm.tenants.keys import KeyRing
from safelora_vllm.tenants.principal import UNAUTHENTICATED, Principal, check_name
from safelora_vllm.tenants.quotas import Quota

ALICE, BOB, CI, NIGHTLY, OTHER = (f"{who} has a long secret" for who in ("alice", "bob", "ci", "cron", "x"))
ADMIN, INFERENCE = "the environment's admin key", "an inference key of vLLM"
FILE = f"""
[admin]
alice = "{ALICE}"
bob = "sha256:{hashlib.sha256(BOB.encode()).hexdigest().upper()}"
[tenants.acme]
max_adapters = 20
max_bytes = 5_000_000_000
max_rank = 32
[tenants.acme.keys]
ci = "{CI}"
nightly = "{NIGHTLY}"
[tenants."b.2".keys]
ci = "{OTHER}"
"""
QUOTA = Quota(20, 5_000_000_000, 32)
Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Replace the keys file as an operator should: a new file, renamed."""

    def replace(text: str) -> Path:
        new, file = tmp_path / "new", tmp_path / "keys.toml"
        new.touch(0o600)
        new.write_text(text)
        return new.rename(file)

    return replace


def test_every_key_has_its_principal(write: Write) -> None:
    ring = KeyRing.open(write(FILE), ADMIN, [INFERENCE, "", INFERENCE])
    for token, expected in {
        ADMIN: Principal("admin", "admin/environment"),
        ALICE: Principal("admin", "admin/alice"),
        BOB: Principal("admin", "admin/bob"),
        CI: Principal("tenant", "acme/ci", "acme", QUOTA),
        NIGHTLY: Principal("tenant", "acme/nightly", "acme", QUOTA),
        OTHER: Principal("tenant", "b.2/ci", "b.2", Quota()),
        INFERENCE: Principal("inference", "inference"),
        "": UNAUTHENTICATED,
        None: UNAUTHENTICATED,
        "unknown": UNAUTHENTICATED,
        ALICE + " ": UNAUTHENTICATED,
        "sha256:" + hashlib.sha256(BOB.encode()).hexdigest(): UNAUTHENTICATED,
        "\ud800 ключ": UNAUTHENTICATED,
    }.items():
        assert ring.identify(token) == expected, token


def test_an_empty_inference_key_is_none() -> None:
    """As vLLM has it: without a key it serves everybody."""
    assert KeyRing.open(None, ADMIN, [""]).identify(None).kind == "anonymous"
    assert KeyRing.open(None, ADMIN, ["", INFERENCE]).identify("") == UNAUTHENTICATED


@pytest.mark.parametrize("tenants", [True, False])
def test_without_inference_keys_strangers_are_anonymous(tenants: bool, write: Write) -> None:
    ring = KeyRing.open(write(FILE) if tenants else None, ADMIN, [])
    stranger = Principal("anonymous", "anonymous", sees_all=not tenants)
    for token in (None, "", "unknown"):
        assert ring.identify(token) == stranger
    assert ring.identify(ADMIN) == Principal("admin", "admin/environment")


@pytest.mark.parametrize("text", ["", "[tenants]\n", f'[admin]\nalice = "{ALICE}"\n'])
def test_a_keys_file_without_tenants_opens_no_tenants_adapters(text: str, write: Write) -> None:
    """Emptied by mistake, or before its tenants: what the store has of tenants stays theirs."""
    for inference, kind in (([], "anonymous"), ([INFERENCE], "inference")):
        found = KeyRing.open(write(text), None, inference).identify(INFERENCE)
        assert (found.kind, found.sees_all) == (kind, False)
        assert found.may_use("a") and not found.may_use("acme/a")
        ring = KeyRing.open(write(FILE), None, inference)
        write(text)
        assert ring.identify(INFERENCE) == found


@pytest.mark.parametrize(
    ("text", "admin_key", "expected"),
    [
        ("", None, False), ("", "", False), ("", ADMIN, True), (f'[admin]\na = "{ALICE}"\n', None, True),
        (f'[tenants.acme.keys]\nci = "{CI}"\n', None, False),
        (f'[tenants.acme.keys]\nci = "{CI}"\n', ADMIN, True),
    ],
)  # fmt: skip
def test_whether_there_is_an_admin(text: str, admin_key: str | None, expected: bool, write: Write) -> None:
    ring = KeyRing.open(write(text), admin_key, [INFERENCE])
    assert ring.has_admin is expected
    kinds = [principal.kind for principal in ring.principals]
    assert "inference" in kinds and ("admin" in kinds) is expected


def test_without_tenants_inference_keys_see_every_adapter() -> None:
    found = KeyRing.open(None, None, [INFERENCE]).identify(INFERENCE)
    assert found.sees_all and found.may_use("acme/a") and not found.may_manage("a")


@pytest.mark.parametrize(
    ("principal", "usable", "manageable"),
    [
        (Principal("admin", "admin/alice"), ["a", "acme/a", "acme2/a"], ["a", "acme/a", "acme2/a"]),
        (Principal("tenant", "acme/ci", "acme"), ["a", "acme/a"], ["acme/a"]),
        (Principal("tenant", "a/ci", "a"), ["a"], []),
        (Principal("inference", "inference"), ["a"], []),
        (Principal("metrics", "metrics"), [], []),
        (UNAUTHENTICATED, [], []),
        (Principal("anonymous", "anonymous"), ["a"], []),
        (Principal("inference", "inference", sees_all=True), ["a", "acme/a", "acme2/a"], []),
        (Principal("anonymous", "anonymous", sees_all=True), ["a", "acme/a", "acme2/a"], []),
    ],
    ids=str,
)
def test_what_a_principal_may_do(principal: Principal, usable: list[str], manageable: list[str]) -> None:
    names = ["a", "acme/a", "acme2/a"]
    assert [name for name in names if principal.may_use(name)] == usable
    assert [name for name in names if principal.may_manage(name)] == manageable


@pytest.mark.parametrize(
    "name", ["a", "a/b", "A0._-", "acme/a.b", "x" * 128, "versions", "policy/a", "a/text"]
)
def test_names_that_an_adapter_can_have(name: str) -> None:
    check_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "", "/", "a/", "/a", "a/b/c", "a//b", ".", "..", "a/..", "../a", ".a", "-a", "_a", "a b", "a\n",
        "\na", "a\x00", "é", "٣", "a\\b", "a%2fb", "x" * 129, "a/versions", "a/rollback", "a/policy",
        "\ud800", "/" * 100_000,
        "text", "image", "audio", "video", "input", "file", "refusal", "thinking", "tool",
    ],
    ids=lambda name: repr(name)[:20],
)  # fmt: skip
def test_names_that_no_adapter_can_have(name: str) -> None:
    with pytest.raises(UsageError) as error:
        check_name(name)
    assert repr(name)[:200] in str(error.value) and len(str(error.value)) < 400


@given(st.text(max_size=6) | st.text("ab/.-\n", max_size=6))
def test_a_name_that_passes_is_one_part_or_two(name: str) -> None:
    """Independently of the regular expression: what a URL, a file system and a log line need."""
    try:
        check_name(name)
    except UsageError:
        return
    for part in name.split("/"):
        assert part.isascii() and part[0].isalnum() and part.replace(".", "").replace("-", "").isalnum()
    assert name.count("/") <= 1


@pytest.mark.parametrize(
    ("figures", "words"),
    [
        ((20, 5_000_000_000, 32), []),
        ((21, 0, 0), ["max_adapters is 20, 21 would be needed"]),
        ((0, 5_000_000_001, 0), ["max_bytes is 5000000000, 5000000001 would be needed"]),
        ((0, 0, 33), ["max_rank is 32, 33 would be needed"]),
        ((21, 0, 64), ["max_adapters is 20, 21 would be needed", "max_rank is 32, 64 would be needed"]),
    ],
)
def test_a_quota_names_each_limit_that_is_passed(figures: tuple[int, int, int], words: list[str]) -> None:
    Quota().check(*figures)
    Quota(0, 0, 0).check(0, 0, 0)
    if not words:
        return QUOTA.check(*figures)
    with pytest.raises(QuotaExceeded) as error:
        QUOTA.check(*figures)
    assert all(word in str(error.value) for word in words)
    assert str(error.value).count("would be needed") == len(words)


def test_a_limit_of_nothing_is_a_limit(write: Write) -> None:
    text = f'[tenants.acme]\nmax_adapters = 0\nmax_bytes = 0\nmax_rank = 0\nkeys = {{ci = "{CI}"}}\n'
    quota = KeyRing.open(write(text), None, []).identify(CI).quota
    assert quota == Quota(0, 0, 0)
    with pytest.raises(
        QuotaExceeded, match=r"max_adapters is 0, 1 .*; max_bytes is 0, 1 .*; max_rank is 0, 1 "
    ):
        quota.check(1, 1, 1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[admin", "is not valid TOML"),
        ('[tenants.a]\nremote_sources = "s3://bucket"\n', "tenants.a.remote_sources is 's3://bucket'"),
        ('[tenants.a]\nremote_sources = ["/srv"]\n', "tenants.a.remote_sources: '/srv' is not a valid"),
        (f'[admin]\na = {ALICE}\n', "is not valid TOML"),
        (f'[admin]\na = "{ALICE}"\na = "{BOB}"\n', "is not valid TOML"),
        (f'[user]\na = "{ALICE}"\n', "unknown entries ['user']; known are admin, tenants"),
        (f'admin = "{ALICE}"\n', "admin is of type str"),
        (f'[tenants]\nacme = "{ALICE}"\n', "tenants.acme is of type str"),
        (f'[tenants.acme]\nkeys = ["{ALICE}"]\n', "tenants.acme.keys is of type list"),
        (f'[tenants.acme]\nci = "{ALICE}"\n', "tenants.acme has unknown entries ['ci']"),
        ('[tenants.acme]\nmax_rank = "8"\n', "tenants.acme.max_rank is '8'"),
        ('[tenants.acme]\nmax_rank = true\n', "tenants.acme.max_rank is True"),
        ('[tenants.acme]\nmax_bytes = 1e9\n', "tenants.acme.max_bytes is 1000000000.0"),
        ('[tenants.acme]\nmax_adapters = -1\n', "tenants.acme.max_adapters is -1"),
        (f'[tenants."a/b".keys]\nci = "{ALICE}"\n', "tenants has an entry called 'a/b'"),
        (f'[tenants.a.keys]\n"c i" = "{ALICE}"\n', "tenants.a.keys has an entry called 'c i'"),
        (f'[admin]\n"" = "{ALICE}"\n', "admin has an entry called ''"),
        (f'[tenants.admin.keys]\nci = "{ALICE}"\n', "admin is not a valid tenant name"),
        (f'[admin]\nenvironment = "{ALICE}"\n', "admin.environment means"),
        ('[admin]\na = "fifteen letters"\n', "admin.a is not a valid secret: expected a string of at l"),
        ('[admin]\na = " sixteen letters"\n', "admin.a is not a valid secret"),
        ('[admin]\na = "sixteen letters "\n', "admin.a is not a valid secret"),
        ('[admin]\na = "sixteen lettérs!"\n', "admin.a is not a valid secret"),
        ('[admin]\na = 1234567890123456\n', "admin.a is not a valid secret"),
        (f'[admin]\na = "sha256:{"0" * 63}"\n', "admin.a is not a valid secret"),
        (f'[admin]\na = "sha256:{"g" * 64}"\n', "admin.a is not a valid secret"),
        (f'[admin]\na = "{ALICE}"\nb = "{ALICE}"\n', "admin/a and admin/b have the same secret"),
        (f'[admin]\na = "{ADMIN}"\n', "admin/environment and admin/a have the same secret"),
        (f'[admin]\na = "{INFERENCE}"\n', "inference and admin/a have the same secret"),
        (
            f'[admin]\na = "{ALICE}"\n'
            f'[tenants.b.keys]\nc = "sha256:{hashlib.sha256(ALICE.encode()).hexdigest()}"\n',
            "admin/a and b/c have the same secret",
        ),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_by_name_and_entry_only(text: str, words: str, write: Write) -> None:
    file = write(text)
    with pytest.raises(KeysError) as error:
        KeyRing.open(file, ADMIN, [INFERENCE])
    message = str(error.value)
    assert words in message and str(file) in message
    secrets = (ALICE, BOB, ADMIN, INFERENCE, "fifteen letters", "sixteen", "1234567890", "0" * 20, "ggg")
    assert not [secret for secret in secrets if secret in message]


def test_one_secret_for_admin_and_inference_is_refused() -> None:
    with pytest.raises(KeysError, match="inference and admin/environment have the same secret"):
        KeyRing.open(None, ADMIN, [ADMIN])


def test_bytes_that_are_not_text(write: Write) -> None:
    file = write("")
    file.write_bytes(b'[admin]\na = "\xff"\n')
    with pytest.raises(KeysError, match="is not valid TOML"):
        KeyRing.open(file, None, [])


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601])
def test_a_file_that_others_can_get_at_is_refused(mode: int, write: Write) -> None:
    file = write(FILE)
    file.chmod(mode)
    with pytest.raises(KeysError, match=f"mode {mode:04o}.*chmod 600 {file}"):
        KeyRing.open(file, None, [])


def test_a_file_that_is_not_there_or_no_file(tmp_path: Path) -> None:
    for file, cause in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(KeysError, match=rf"{file} cannot be read \({cause}.*fix its path"):
            KeyRing.open(file, None, [])


def test_two_keys_are_changed_one_after_the_other(write: Write) -> None:
    """The way to a new key without a moment in which none is valid."""
    first = Principal("tenant", "acme/a", "acme")
    second = Principal("tenant", "acme/b", "acme")
    ring = KeyRing.open(write(f'[tenants.acme.keys]\na = "{CI}"\n'), None, [INFERENCE])
    assert (ring.identify(CI), ring.identify(NIGHTLY)) == (first, UNAUTHENTICATED)
    write(f'[tenants.acme.keys]\na = "{CI}"\nb = "{NIGHTLY}"\n')
    assert (ring.identify(CI), ring.identify(NIGHTLY)) == (first, second)
    write(f'[tenants.acme.keys]\nb = "{NIGHTLY}"\n')
    assert (ring.identify(CI), ring.identify(NIGHTLY)) == (UNAUTHENTICATED, second)
    write("")
    assert ring.identify(NIGHTLY) == UNAUTHENTICATED
    assert not ring.identify(INFERENCE).sees_all, "a file without tenants opens nothing"


def test_a_file_gone_wrong_leaves_the_old_keys_in_force_and_is_logged_once(
    write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "vllm.safelora.keys")
    file = write(FILE)
    ring = KeyRing.open(file, None, [INFERENCE])
    alice = Principal("admin", "admin/alice")

    def logged(times: int = 3) -> list[tuple[int, str]]:
        caplog.clear()
        assert [ring.identify(ALICE) for _ in range(times)] == [alice] * times
        assert ring.identify(NIGHTLY[::-1]) == UNAUTHENTICATED
        assert {record.name for record in caplog.records} <= {"vllm.safelora.keys"}
        return [(record.levelno, record.getMessage()) for record in caplog.records]

    assert logged() == []
    write(f'[admin]\nalice = "{ALICE}"\ndave = "short{NIGHTLY[::-1]}é"\n')
    ((level, message),) = logged()
    assert level == logging.ERROR and "admin.dave" in message and "keys read before stay" in message
    file.unlink()
    ((level, message),) = logged()
    assert level == logging.ERROR and "No such file" in message
    assert not ring.is_current
    write(FILE)
    ((level, message),) = logged()
    assert level == logging.INFO and message.endswith("read again: 5 keys in force"), "those of the file"
    assert ring.is_current
    file.chmod(0o644)  # the content is as before
    ((level, message),) = logged()
    assert level == logging.ERROR and "chmod 600" in message
    file.chmod(0o600)
    ((level, _),) = logged()
    assert level == logging.INFO
    file.chmod(0o644)
    ((level, message),) = logged()
    assert level == logging.ERROR and "chmod 600" in message, "the same once more, after it was mended"


def test_the_log_names_the_keys_that_came_and_went(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "vllm.safelora.keys")
    ring = KeyRing.open(write(FILE), ADMIN, [INFERENCE], "the metrics key of a server")
    assert ring.is_current and not caplog.records
    write(FILE.replace(f'nightly = "{NIGHTLY}"', f'new = "{NIGHTLY}"').replace(CI, "another long secret"))
    assert ring.is_current
    (record,) = caplog.records
    told = "read again: 5 keys in force; gone: acme/ci, acme/nightly; new: acme/ci, acme/new"
    assert record.getMessage().endswith(told), "the secret of nightly has another name"
    caplog.clear()
    write("")
    assert ring.is_current and ring.identify(ADMIN).kind == "admin"
    (record,) = caplog.records
    gone = "acme/ci, acme/new, admin/alice, admin/bob, b.2/ci"
    assert record.getMessage().endswith(f"read again: 0 keys in force; gone: {gone}")


def test_a_file_that_could_not_be_read_is_read_at_the_next_call(
    write: Write, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ring = KeyRing.open(write(FILE), None, [INFERENCE])
    write(f'[admin]\nalice = "{NIGHTLY}"\n')

    def no_descriptor(*_: object) -> None:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", no_descriptor)
        assert ring.identify(ALICE) == ring.identify(ALICE) == Principal("admin", "admin/alice")
    assert len(caplog.records) == 1
    assert ring.identify(ALICE) == UNAUTHENTICATED != ring.identify(NIGHTLY)


def test_secrets_show_nowhere(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    ring = KeyRing.open(write(FILE), ADMIN, [INFERENCE])
    shown = [repr(ring), repr(ring._known), str(vars(ring))]
    for token in (ADMIN, ALICE, CI, INFERENCE, "a secret that nobody has"):
        shown.append(repr(ring.identify(token)))
    write(FILE + f'[tenants.c.keys]\nci = "{CI}"\n')
    ring.identify("a secret that nobody has")
    assert "acme/ci and c/ci have the same secret" in caplog.text
    text = "\n".join([*shown, caplog.text])
    for secret in (ADMIN, ALICE, BOB, CI, INFERENCE, "a secret that nobody has"):
        assert secret not in text


@pytest.mark.parametrize("token", [ADMIN, ALICE, OTHER, INFERENCE, "unknown"])
def test_each_token_is_compared_with_all_keys(
    token: str, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    ring = KeyRing.open(write(FILE), ADMIN, [INFERENCE])
    compared: list[tuple[bytes, bytes]] = []
    real = hmac.compare_digest

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return real(a, b)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    ring.identify(token)
    everyone = {
        hashlib.sha256(s.encode()).digest() for s in (ADMIN, ALICE, BOB, CI, NIGHTLY, OTHER, INFERENCE)
    }
    assert {a for a, _ in compared} == everyone and len(compared) == 7
    assert {b for _, b in compared} == {hashlib.sha256(token.encode()).digest()}


def test_a_key_that_was_taken_back_is_unknown_to_all_threads_at_once(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one of them still reads the new file, the others wait instead of asking the old one."""
    ring = KeyRing.open(write(FILE), None, [INFERENCE])
    write(f'[admin]\nalice = "{ALICE}"\n')
    reading, real, reads = threading.Event(), ring._read, []

    def read_slowly() -> object:
        reads.append(1)
        reading.set()
        assert not others_done.wait(0.2), "they did not wait"
        return real()

    monkeypatch.setattr(ring, "_read", read_slowly)
    found: list[Principal] = []
    others_done = threading.Event()

    def ask(last: bool) -> None:
        found.append(ring.identify(CI))
        if last:
            others_done.set()

    first = threading.Thread(target=ask, args=(False,))
    first.start()
    assert reading.wait(30)
    second = threading.Thread(target=ask, args=(True,))
    second.start()
    for thread in (first, second):
        thread.join(30)
    assert found == [UNAUTHENTICATED, UNAUTHENTICATED] and len(reads) == 1


def test_many_threads_while_the_file_is_replaced(write: Write) -> None:
    ring = KeyRing.open(write(FILE), None, [INFERENCE])
    stop, wrong = threading.Event(), []

    def ask() -> None:
        while not stop.is_set():
            if (found := ring.identify(ALICE)) is None or found.key_id not in (
                "admin/alice",
                "admin/renamed",
            ):
                wrong.append(found)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for turn in range(60):
        write(FILE.replace("alice =", "renamed =") if turn % 2 == 0 else FILE)
        os.sched_yield()
    stop.set()
    for thread in threads:
        thread.join(30)
    assert wrong == []
    assert ring.identify(ALICE) == Principal("admin", "admin/alice")


class Volume:
    """A secret as Kubernetes mounts it: links through ``..data``, which is exchanged as a whole."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.file, self._count = folder, folder / "keys.toml", 0

    def write(self, text: str) -> None:
        self._count += 1
        data = self.folder / f"..2026_{self._count}"
        data.mkdir()
        (data / "keys.toml").write_text(text)
        (data / "keys.toml").chmod(0o440)
        new = self.folder / "..data_tmp"
        new.symlink_to(data.name)
        new.rename(self.folder / "..data")
        if not self.file.is_symlink():
            self.file.symlink_to("..data/keys.toml")


def owned(monkeypatch: pytest.MonkeyPatch, uid: int, gid: int, groups: list[int]) -> None:
    """Files are of this user and group, and this process is in these groups."""
    real = os.fstat

    def fstat(file: int) -> os.stat_result:
        status = list(real(file))
        status[4:6] = [uid, gid]
        return os.stat_result(status)

    monkeypatch.setattr(os, "fstat", fstat)
    monkeypatch.setattr(os, "getgroups", lambda: groups)


def test_a_secret_of_kubernetes_is_read_and_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owned(monkeypatch, 0, 2000, [1, 2000])
    volume = Volume(tmp_path)
    volume.write(FILE)
    ring = KeyRing.open(volume.file, None, [INFERENCE])
    assert ring.identify(CI) == Principal("tenant", "acme/ci", "acme", QUOTA)
    volume.write(FILE.replace(CI, OTHER[::-1]))
    assert ring.identify(CI) == UNAUTHENTICATED and ring.identify(OTHER[::-1]).tenant == "acme"


@pytest.mark.parametrize(
    ("mode", "uid", "gid"),
    [
        (0o444, 0, 2000), (0o460, 0, 2000), (0o450, 0, 2000),
        (0o440, 0, 3000), (0o440, 1000, 2000), (0o640, 0, 0),
    ],
)  # fmt: skip
def test_other_files_that_a_group_can_read_are_refused(
    mode: int, uid: int, gid: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Readable by all, writable or of another group, of another user, of root's own group."""
    volume = Volume(tmp_path)
    volume.write(FILE)
    volume.file.chmod(mode)
    owned(monkeypatch, uid, gid, [0, 2000])
    with pytest.raises(KeysError, match=rf"mode {mode:04o}.*fsGroup and defaultMode: 0440"):
        KeyRing.open(volume.file, None, [])


def test_a_file_for_a_group_that_is_not_in_a_secrets_volume_is_refused(
    tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its group may be that of all users of the machine."""
    owned(monkeypatch, 0, 100, [100])
    plain = write(FILE)
    plain.chmod(0o440)
    with pytest.raises(KeysError, match="mode 0440"):
        KeyRing.open(plain, None, [])
    (tmp_path / "volume").mkdir()
    volume = Volume(tmp_path / "volume")
    volume.write(FILE)
    KeyRing.open(volume.file, None, [])
    beside = volume.file.with_name("beside.toml")
    beside.symlink_to(plain)
    with pytest.raises(KeysError, match="mode 0440"):
        KeyRing.open(beside, None, [])
