"""Three tenants on one store, through two API servers, an edit of the keys file and a restart.

Each is judged by its own rules whatever it does, usage agrees with the store to the byte, the audit log has
every decision and nothing else, and no answer tells a tenant of another. The engines are fake.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from safelora_vllm.integration.server import reconcile
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.store import NameStore, RawStore
from safelora_vllm.store.audit_log import AuditLog
from tests.server.conftest import ADMIN_KEY, upload
from tests.server.fake_server import FakeServer, Place
from tests.tiny import Draft, lora

TENANTS = ("trusted", "careless", "stranger")
SECRETS = {name: f"the long secret of {name}" for name in TENANTS}
Wants = dict[str, tuple[str, str]]


def keys(careless: str, most: int) -> str:
    """The keys file. careless: its policy. most: bytes of the stranger."""
    own = {
        "trusted": 'less_strict = true\npolicy = {mode = "report-only"}',
        "careless": f"policy = {{{careless}}}",
        "stranger": f'max_bytes = {most}\npolicy = {{select = "all"}}',
    }
    return "".join(
        f'[tenants.{name}]\n{text}\n[tenants.{name}.keys]\nci = "{SECRETS[name]}"\n'
        for name, text in own.items()
    )


def until(true: Callable[[], bool]) -> None:
    for _ in range(400):
        if true():
            return
        time.sleep(0.02)
    raise AssertionError("it did not become true")


def rules(http: httpx.Client, name: str) -> tuple[str, str] | int:
    """By which an adapter is served, or the status."""
    answer = http.get(f"/v1/adapters/{name}")
    if answer.status_code != 200:
        return answer.status_code
    policy = answer.json()["policy"]
    return policy["mode"], policy["select"]


class Run:
    """Two API servers, with the callers of both, and what the audit log has to say of all that was done."""

    def __init__(self, place: Place, one: FakeServer, two: FakeServer) -> None:
        self.place = place
        self.clients = [{name: s.client(key) for name, key in SECRETS.items()} for s in (one, two)]
        self.admins = [server.client(ADMIN_KEY) for server in (one, two)]

    def usage(self, tenant: str) -> dict[str, Any]:
        found = [clients[tenant].get("/v1/usage").json() for clients in self.clients]
        found += [admin.get("/v1/usage", params={"tenant": tenant}).json() for admin in self.admins]
        assert all(answer == found[0] for answer in found), "the servers agree, and so do its admin and it"
        return dict(found[0])

    def check_usage(self) -> None:
        """Against the files in the store, found without the code that counts."""
        for tenant in TENANTS:
            told, raw = self.usage(tenant), self.place.store / "raw"
            names = [n for n in NameStore(self.place.store).all() if n.startswith(f"{tenant}/")]
            assert [adapter["name"] for adapter in told["adapters"]] == sorted(names)
            digests = {version["digest"] for adapter in told["adapters"] for version in adapter["versions"]}
            stored = sum(f.stat().st_size for digest in digests for f in (raw / digest).iterdir())
            assert told["used"] == {"adapters": len(names), "bytes": stored}
            assert stored == sum(RawStore(self.place.store).nbytes(digest) for digest in digests)

    def check_rules(self, wants: Wants, name: str = "x") -> None:
        for clients in self.clients:
            assert {t: rules(clients[t], f"{t}/{name}") for t in wants} == wants


@contextmanager
def running(cache: ProjectorCache, folder: Path, **policy: Any) -> Iterator[Run]:
    (folder / "gate.sock").unlink(missing_ok=True)
    with Place.start(cache, folder, **policy) as place:
        given = {"keys": str(place.keys)}
        with place.server(**given) as one, place.server(**given) as two:
            yield Run(place, one, two)


def test_three_tenants(cache: ProjectorCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "safelora")
    monkeypatch.setenv("SAFELORA_ADMIN_API_KEY", ADMIN_KEY)
    monkeypatch.setattr(reconcile, "_HEARTBEAT_SECONDS", 0.1)
    a, b, c = (Draft(tensors=lora(seed=seed)).write(tmp_path / f"adapter{seed}") for seed in range(3))
    size = sum(file.stat().st_size for file in a.iterdir())
    file, told = tmp_path / "keys.toml", []  # told: actor, action, adapter, decision, reasons

    def edit(careless: str) -> None:
        new = tmp_path / "new"
        new.touch(0o600)
        new.write_text(keys(careless, 2 * size))
        new.rename(file)

    edit("")
    wants: Wants = {
        "trusted": ("report-only", "threshold"),
        "careless": ("enforce", "threshold"),
        "stranger": ("enforce", "all"),
    }
    with running(cache, tmp_path) as run:
        first, second = run.clients
        for tenant in TENANTS:
            name, who = f"{tenant}/x", f"{tenant}/ci"
            assert upload(first[tenant], name, a).status_code == 201
            run.check_rules({tenant: wants[tenant]})
            assert upload(second[tenant], name, b, replace=True).status_code == 201
            run.check_rules({tenant: wants[tenant]})
            back = first[tenant].post(f"/v1/adapters/{name}/rollback", json={"version": 1})
            assert back.status_code == 200
            run.check_rules({tenant: wants[tenant]})
            assert second[tenant].delete(f"/v1/adapters/{name}").status_code == 200
            assert rules(first[tenant], name) == 404
            assert upload(first[tenant], name, b).status_code == 201
            told += [(who, action, name, "accepted", []) for action in ("upload", "upload", "rollback")]
            told += [(who, "delete", name, "removed", []), (who, "upload", name, "accepted", [])]
        run.check_rules(wants)
        run.check_usage()

        # A quota, and an old version that counts.
        stranger = second["stranger"]
        assert upload(stranger, "stranger/x", c, replace=True).status_code == 201
        over = upload(stranger, "stranger/y", a)
        assert over.status_code == 403
        message = over.json()["error"]["message"]
        assert f"has {size:,} bytes, 0 are left of max_bytes" in message
        assert "stranger/..." in message and "GET /v1/usage" in message
        usage = run.usage("stranger")
        assert usage["quota"]["max_bytes"] == usage["used"]["bytes"] == 2 * size
        assert [(r["action"], r["adapter"], r["reasons"]) for r in usage["refusals"]] == [
            ("upload", "stranger/y", ["quota"])
        ]
        assert not run.usage("careless")["refusals"]
        assert stranger.delete("/v1/adapters/stranger/x/versions/2").status_code == 400, "it is served"
        gone = stranger.delete("/v1/adapters/stranger/x/versions/1")
        assert (gone.status_code, gone.json()["version"]) == (200, 1)
        assert upload(first["stranger"], "stranger/y", a).status_code == 201
        run.check_usage()
        run.check_rules(wants)
        told += [
            ("stranger/ci", "upload", "stranger/x", "accepted", []),
            ("stranger/ci", "upload", "stranger/y", "refused", ["quota"]),
            ("stranger/ci", "delete-version", "stranger/x", "removed", []),
            ("stranger/ci", "upload", "stranger/y", "accepted", []),
        ]

        _check_nothing_is_told(first["stranger"], a)

        # An edit of the keys file refuses what one tenant is served, and nobody else's.
        norm = run.admins[0].get("/v1/adapters/careless/x").json()["total_norm"]
        edit(f"max_total_norm = {norm / 2}")
        until(lambda: all(rules(clients["careless"], "careless/x") == 422 for clients in run.clients))
        answer = second["careless"].get("/v1/adapters/careless/x").json()["error"]
        assert [reason["code"] for reason in answer["reasons"]] == ["total_norm"]
        for clients in run.clients:
            *_, last = clients["careless"].get("/v1/adapters/careless/x/versions").json()["versions"]
            assert [reason["code"] for reason in last["refused"]] == ["total_norm"]
        assert upload(first["careless"], "careless/y", b).status_code == 422
        told += [
            ("server", "rejudge", "careless/x", "refused", ["total_norm"]),
            ("careless/ci", "upload", "careless/y", "refused", ["total_norm"]),
        ]
        refused = run.usage("careless")
        assert [adapter["state"] for adapter in refused["adapters"]] == ["refused"]
        assert [r["action"] for r in refused["refusals"]] == ["rejudge", "upload"]
        run.check_rules({tenant: wants[tenant] for tenant in ("trusted", "stranger")})

    edit("")
    wants["trusted"], wants["careless"] = ("report-only", "all"), ("enforce", "all")
    with running(cache, tmp_path, select="all") as run:  # the server's policy is another one
        until(
            lambda: all(
                rules(clients["careless"], "careless/x") == wants["careless"] for clients in run.clients
            )
        )
        until(
            lambda: all(
                rules(clients["stranger"], "stranger/y") == wants["stranger"] for clients in run.clients
            )
        )
        run.check_rules(wants)
        run.check_usage()
        names = sorted(NameStore(run.place.store).all())
        assert names == ["careless/x", "stranger/x", "stranger/y", "trusted/x"]

    found = [
        (r["actor"], r["action"], r["adapter"], r["decision"], r.get("reasons", []))
        for r in AuditLog(tmp_path / "store" / "audit").read()
    ]
    assert found[: len(told)] == told
    assert sorted(found[len(told) :]) == [("server", "rejudge", name, "accepted", []) for name in names]


def _check_nothing_is_told(stranger: httpx.Client, adapter: Path) -> None:
    """A tenant gets the same answers for what another tenant has and for what nobody has."""
    calls: dict[str, Callable[[str], httpx.Response]] = {
        "report": lambda name: stranger.get(f"/v1/adapters/{name}/x"),
        "versions": lambda name: stranger.get(f"/v1/adapters/{name}/x/versions"),
        "rollback": lambda name: stranger.post(f"/v1/adapters/{name}/x/rollback", json={"version": 1}),
        "remove": lambda name: stranger.delete(f"/v1/adapters/{name}/x"),
        "remove a version": lambda name: stranger.delete(f"/v1/adapters/{name}/x/versions/1"),
        "policy": lambda name: stranger.put(f"/v1/adapters/{name}/x/policy", json={"policy": {}}),
        "upload": lambda name: upload(stranger, f"{name}/x", adapter),
        "replace": lambda name: upload(stranger, f"{name}/x", adapter, replace=True),
        "usage": lambda name: stranger.get("/v1/usage", params={"tenant": name}),
    }
    for what, call in calls.items():
        there, nobody = call("trusted"), call("nobodys")
        assert there.status_code == nobody.status_code >= 400, what
        assert there.text.replace("trusted", "nobodys") == nobody.text, what
    for listed in ("/v1/adapters", "/v1/models", "/v1/usage"):
        text = stranger.get(listed).text
        assert "stranger/x" in text and "trusted" not in text and "careless" not in text, listed
