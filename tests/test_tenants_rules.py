"""Which rules hold for a tenant's adapters, and what of a keys file cannot be a tenant's rules."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from safelora_vllm.errors import KeysError, PolicyError
from safelora_vllm.policy import Policy
from safelora_vllm.tenants.keys import KeyRing
from safelora_vllm.tenants.rules import SERVERS, Rules, TenantRules, rules_of

SERVER = Policy(energy=0.2, max_total_norm=0.5)


def check(entry: str, rules: TenantRules) -> None:
    rules.check(entry, SERVER, lambda _: None)


def ring(tmp_path: Path, text: str) -> KeyRing:
    file = tmp_path / "keys.toml"
    file.touch(0o600)
    file.write_text(text)
    return KeyRing.open(file, None, [], None, check)


def test_rules_are_those_of_the_tenant_that_owns_the_name(tmp_path: Path) -> None:
    found = ring(tmp_path, "[tenants.a.policy]\nenergy = 0.5\n[tenants.b]\nmax_rank = 4\n")
    strict = TenantRules({"energy": 0.5})
    names = {"a/x": strict, "a": SERVERS, "b/x": SERVERS, "c/x": SERVERS, "": SERVERS, "a/x/y": strict}
    assert {name: found.rules(name) for name in names} == names


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("policy = 5", "tenants.a.policy is of type int; expected a table, [tenants.a.policy]"),
        ("policy = {energie = 0.5}", "tenants.a.policy: ['energie'] are not valid fields of a policy"),
        ("policy = {energy = 2}", "tenants.a.policy: `energy` is 2: expected a number from 0 to 1"),
        ("policy = {energy = 1979-05-27}", "tenants.a.policy: `energy` is datetime.date(1979, 5, 27)"),
        ("policy = {threshold = 0.9}", "tenants.a.policy: `threshold` has no effect with `select` 'all'"),
        (
            "policy = {max_total_norm = 0.9}",
            "enforce, max_total_norm 0.9) is less strict than the server's policy (input-removal, energy "
            "0.2, select all, enforce, max_total_norm 0.5), or",
        ),
        ("policy = {mode = 'report-only'}", "less strict than the server's policy (input-removal, energy"),
        ("policy = {energy = 0.1}", "set less_strict = true in [tenants.a]"),
        ("policy = {method = 'csulora'}", "or cannot be compared with it"),
        ("policy = {max_total_norm = 0.6}", "tenants.a.policy (input-removal, energy 0.2, select all, enf"),
        ("less_strict = 1", "tenants.a.less_strict is 1; give true or false"),
    ],
)
def test_rules_that_cannot_be(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(KeysError) as told:
        ring(tmp_path, f"[tenants.a]\n{text}\n")
    assert message in str(told.value) and str(tmp_path / "keys.toml") in str(told.value)


def test_less_strict_rules_need_the_operators_word_and_stricter_ones_none(tmp_path: Path) -> None:
    text = "[tenants.a]\nless_strict = true\npolicy = {energy = 0.1}\n[tenants.b.policy]\nenergy = 0.3\n"
    found = ring(tmp_path, text)
    assert found.rules("a/x") == TenantRules({"energy": 0.1}, True)
    assert found.rules("b/x").over(SERVER) == dataclasses.replace(SERVER, energy=0.3)


def test_a_file_edited_to_rules_that_cannot_be_leaves_the_old_ones_in_force(tmp_path: Path) -> None:
    found = ring(tmp_path, "[tenants.a.policy]\nenergy = 0.5\n")
    for wrong in ("0.1", "2", "'x'"):
        (tmp_path / "keys.toml").write_text(f"[tenants.a.policy]\nenergy = {wrong}\n#{wrong}\n")
        assert found.rules("a/x") == TenantRules({"energy": 0.5})
    (tmp_path / "keys.toml").write_text("[tenants.a.policy]\nenergy = 0.75\n# as it should be\n")
    assert found.rules("a/x") == TenantRules({"energy": 0.75})


def test_rules_that_the_cache_cannot_serve() -> None:
    def thin(_: Policy) -> None:
        raise PolicyError("the projector cache is thin")

    with pytest.raises(KeysError, match=r"tenants\.a\.policy: the projector cache is thin"):
        TenantRules({"energy": 0.5}).check("tenants.a", SERVER, thin)


FRIEND, STRANGER = TenantRules({"energy": 0.1}, True), TenantRules({"energy": 0.5})


@pytest.mark.parametrize(
    ("tenant", "own", "override", "changes", "loose"),
    [
        (SERVERS, {}, False, None, False),
        (SERVERS, {"energy": 0.2}, False, None, False),
        (SERVERS, {"energy": 0.4}, False, {"energy": 0.4}, False),
        (SERVERS, {"energy": 0.1}, False, None, False),
        (SERVERS, {"energy": 0.1}, True, {"energy": 0.1}, True),
        (FRIEND, {}, False, {"energy": 0.1}, True),
        (FRIEND, {"energy": 0.2}, False, None, False),
        (FRIEND, {"energy": 0.05}, False, {"energy": 0.1}, True),
        (FRIEND, {"energy": 0.05}, True, {"energy": 0.05}, True),
        (FRIEND, {"max_total_norm": 0.1}, False, {"energy": 0.1, "max_total_norm": 0.1}, True),
        (STRANGER, {}, False, {"energy": 0.5}, False),
        (STRANGER, {"energy": 0.3}, False, {"energy": 0.5}, False),
        (STRANGER, {"energy": 0.3}, True, {"energy": 0.3}, False),
        (STRANGER, {"energy": 0.1}, True, {"energy": 0.1}, True),
    ],
)
def test_the_rules_of_a_content(
    tenant: TenantRules, own: dict[str, Any], override: bool, changes: dict[str, Any] | None, loose: bool
) -> None:
    found = rules_of(SERVER, tenant, own, override)
    wanted = dataclasses.asdict(dataclasses.replace(SERVER, **changes)) if changes else {}
    assert found == Rules(wanted, loose)


def test_what_of_an_adapters_policy_is_stricter_holds_beside_the_tenants() -> None:
    found = rules_of(SERVER, STRANGER, {"energy": 0.3, "max_relative_norm": 0.25}, False).policy
    assert (found["energy"], found["max_relative_norm"], found["max_total_norm"]) == (0.5, 0.25, 0.5)


def test_the_digest_of_all_rules() -> None:
    """Other rules of the server, the tenant, or the word of the operator: another digest."""
    found = {
        tenant.ruleset(server)
        for server in ("r" * 64, "s" * 64)
        for tenant in (SERVERS, FRIEND, STRANGER, TenantRules({"energy": 0.1}))
    }
    assert len(found) == 8
    assert SERVERS.ruleset("r") == "r", "records of names without such rules are as they were"


DOCUMENTED = (Path(__file__).parents[1] / "docs" / "tenants.md").read_text()


def test_the_keys_files_of_the_documentation_work_on_a_default_server(tmp_path: Path) -> None:
    blocks = [
        block for block in re.findall(r"```(?:toml|bash)\n(.*?)```", DOCUMENTED, re.S)
        if "[tenants.strangers" in block
    ]  # fmt: skip
    assert len(blocks) == 2
    for block in blocks:
        found = re.search(r"<<'END'\n(.*?)END\n", block, re.S)
        file = tmp_path / "keys.toml"
        file.touch(0o600)
        text = found[1] if found else block
        file.write_text(text.replace("replace-this-secret", "a-secret-of-its-own"))

        def check(entry: str, rules: TenantRules) -> None:
            rules.check(entry, Policy(), lambda _: None)

        ring = KeyRing.open(file, None, [], None, check)
        strangers, friends = (ring.rules(f"{name}/x") for name in ("strangers", "friends"))
        assert not strangers.less_strict and strangers.over(Policy()).at_least_as_strict(Policy())
        assert friends.less_strict and not friends.over(Policy()).at_least_as_strict(Policy())


def test_the_keys_file_for_strangers_alone_leaves_its_server_as_it_is(tmp_path: Path) -> None:
    (text,) = re.findall(r"cat > keys.toml <<END\n(.*?)END\n", DOCUMENTED, re.S)
    file = tmp_path / "keys.toml"
    file.touch(0o600)
    for number in range(text.count("$(new)")):
        text = text.replace("$(new)", f"a-secret-of-its-own-{number}", 1)
    file.write_text(text)
    server = Policy(select="none", max_total_norm=0.0064)
    ring = KeyRing.open(file, None, [], None, lambda entry, rules: rules.check(entry, server, lambda _: None))
    assert ring.has_admin and set(ring.tenants) == {"acme"} and ring.rules("acme/x").over(server) == server


@pytest.mark.parametrize(
    ("exam", "message"),
    [
        ('mode = "on"', "exam.mode is 'on'; give one of off, report, enforce"),
        ("mode = 1", "exam.mode is 1"),
        ("threshold = 0", "exam.threshold is 0; give a finite number above 0"),
        ("threshold = nan", "exam.threshold is nan"),
        ("threshold = true", "exam.threshold is True"),
        ('ladder = "lora"', "exam.ladder: 'lora' is not a valid rung"),
        ("ladder = 1", "exam.ladder is 1; give a text"),
        ("per_minute = -1", "exam.per_minute is -1; give a whole number, 0 or more"),
        ("per_day = true", "exam.per_day is True"),
        ("per_hour = 1", "has unknown entries"),
    ],
)
def test_wrong_rules_of_exams(tmp_path: Path, exam: str, message: str) -> None:
    with pytest.raises(KeysError, match=re.escape(message)):
        ring(tmp_path, f"[tenants.acme.exam]\n{exam}\n")
