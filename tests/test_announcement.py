"""What a guarded server says of itself when it starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route, WebSocketRoute

from safelora_vllm.gate.protocol import GateState
from safelora_vllm.integration.server.access_check import RouteAccess, granted
from safelora_vllm.integration.server.announcement import access_line, caps_warning, rules_line
from safelora_vllm.policy import Policy
from safelora_vllm.settings import ADMIN_KEY_MADE, new_admin_key
from safelora_vllm.tenants.keys import KeyRing

ADMIN, INFERENCE, METRICS = (f"the {who} key of this test" for who in ("admin", "api", "prom"))
KEYS = """
[admin]
alice = "a long secret of alice"
[tenants.acme.keys]
ci = "a long secret of acme"
dev = "another long secret of acme"
[tenants.zeta.keys]
ci = "a long secret of zeta"
"""
ROUTES = [
    Route("/v1/adapters", JSONResponse, methods=["GET"]),
    Route("/v1/adapters", JSONResponse, methods=["POST"]),
    Route("/health", JSONResponse),
    Route("/docs", JSONResponse),
    Route("/metrics", JSONResponse),
    Route("/invented", JSONResponse),
    Mount("/metrics", JSONResponse),
    WebSocketRoute("/v1/realtime", JSONResponse),
]


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    """A keys file with an admin and two tenants."""
    path = tmp_path / "keys.toml"
    path.touch(mode=0o600)
    path.write_text(KEYS)
    return path


def state(policy: Policy) -> GateState:
    return GateState("p" * 64, policy, "r" * 64, "/srv/store", 1, 0.0)


def test_the_rules() -> None:
    assert rules_line(state(Policy(max_total_norm=0.006))) == (
        "adapters are guarded: input-removal, energy 0.2, select all, norms up to 1 a module and 0.006 in "
        "total, mode enforce; projectors pppppppppppp, store /srv/store"
    )
    assert rules_line(state(Policy()), ["as-uploaded", "as-uploaded+opinion"]).startswith(
        "adapters are guarded: by the ladder as-uploaded, then as-uploaded+opinion, norms up to 1 a module"
    )
    assert "mode report-only: adapters are served UNPROJECTED;" in rules_line(
        state(Policy(mode="report-only"))
    )


def test_caps_that_bound_nothing_or_everything() -> None:
    none, capped = Policy(select="none"), Policy(select="none", max_total_norm=0.006)
    for policy, ladder in ((none, ()), (Policy(), ["as-uploaded", "safe-lora"])):
        assert "set --max-relative-norm and --max-total-norm" in caps_warning(policy, ladder)
    for policy, ladder in (
        (Policy(), ()),
        (capped, ()),
        (capped, ["as-uploaded"]),
        (Policy(), ["safe-lora"]),
    ):
        assert not caps_warning(policy, ladder)
    for cap in ("max_relative_norm", "max_total_norm"):
        assert "a cap of 0" in caps_warning(Policy(**{cap: 0.0}))


def test_keys_and_what_is_open(keys_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ADMIN_KEY_MADE, raising=False)
    plain = access_line(KeyRing.open(None, ADMIN, []).principals, RouteAccess(), ROUTES)
    assert plain == (
        "keys: admin SAFELORA_ADMIN_API_KEY, 0 tenants, inference no, metrics no; open without a key: /docs, "
        "/health, /metrics, /metrics/*, every route that uses a model"
    )
    ring = KeyRing.open(keys_file, ADMIN, [INFERENCE], METRICS)
    closed = RouteAccess(private_docs=True, private_metrics=True, more=granted({"GET /invented": "anybody"}))
    assert access_line(ring.principals, closed, ROUTES) == (
        "keys: admin SAFELORA_ADMIN_API_KEY and the keys file, 2 tenants, inference yes, metrics yes; open "
        "without a key: /health, /invented"
    )


def test_where_the_admin_key_comes_from(
    keys_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def line(file: Path | None, key: str | None) -> str:
        return access_line(KeyRing.open(file, key, []).principals, RouteAccess(), []).partition(",")[0]

    assert line(keys_file, None) == "keys: admin the keys file"
    keys_file.write_text('[tenants.acme.keys]\nci = "a long secret of acme"\n')
    text = access_line(KeyRing.open(keys_file, None, [INFERENCE]).principals, RouteAccess(), [])
    assert text == "keys: admin none, 1 tenant, inference yes, metrics no; open without a key: nothing"
    monkeypatch.setenv(ADMIN_KEY_MADE, "")  # undone at the end, whatever sets it
    assert line(None, new_admin_key()) == "keys: admin generated"
    assert "admin key for this run" in capsys.readouterr().out
