"""Every seam is verified at start: without it, or with another in its place, the guard says which."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI
from fastapi.testclient import TestClient
from starlette.middleware import Middleware
from starlette.routing import Route

from safelora_vllm.errors import GuardError
from safelora_vllm.integration import plugin
from safelora_vllm.integration.seams import checks as seam_checks
from safelora_vllm.integration.seams import worker as seams
from safelora_vllm.integration.seams.table import SEAMS, Hold, Seam
from safelora_vllm.integration.server.middleware import AccessMiddleware
from safelora_vllm.integration.server.visibility import ServingMap

HOLDS = [pytest.param(seam, hold, id=f"{seam.name}-{hold.target}") for seam in SEAMS for hold in seam.holds]
# The others only have to be there.
WITH_NEEDS = [p for p in HOLDS if p.values[1] != Hold(p.values[1].module, p.values[1].target)]
SIDES = ("worker", "server", "command")


def places(hold: Hold) -> Iterator[Hold]:
    """Where this vLLM has it: here, in its older place, or in both, one importing it from the other."""
    for place in (hold, hold.older):
        if place is not None and not seam_checks._problem(place):
            yield place


def expectation(seam: Seam, hold: Hold) -> Any:
    """Raises GuardError with the seam's and the target's names."""
    return pytest.raises(
        GuardError, match=f"seam {seam.name!r}: .*{re.escape(hold.target)} (is not|takes|does not|has)"
    )


@pytest.mark.parametrize("side", SIDES)
def test_this_vllm_has_them_all(side: seam_checks.Side) -> None:
    seam_checks.check(side)


def test_every_seam_belongs_to_a_side() -> None:
    assert {seam.side for seam in SEAMS} == set(SIDES)
    assert all(seam.holds and seam.why and seam.until for seam in SEAMS)


@pytest.mark.parametrize(("seam", "hold"), HOLDS)
def test_one_that_is_gone(seam: Seam, hold: Hold, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in list(places(hold)):
        real, without = import_module(place.module), ModuleType(place.module)
        removed = (place.target.split(".")[0], "__getattr__")
        vars(without).update({name: value for name, value in vars(real).items() if name not in removed})
        monkeypatch.setitem(sys.modules, place.module, without)
    with expectation(seam, hold):
        seam_checks.check_seams(seam.side)


@pytest.mark.parametrize(("seam", "hold"), WITH_NEEDS)
def test_one_that_changed(seam: Seam, hold: Hold, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another signature, another body, another class in its place."""
    if hold.fields or hold.lacks:
        changed: object = type("Changed", (), dict.fromkeys(hold.lacks))
    else:

        def changed(other: object) -> None: ...

    for place in list(places(hold)):
        owner = import_module(place.module)
        *path, name = place.target.split(".")
        for part in path:
            owner = getattr(owner, part)
        monkeypatch.setattr(owner, name, changed)
    with expectation(seam, hold):
        seam_checks.check_seams(seam.side)


def test_all_that_changed_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.lora.worker_manager import WorkerLoRAManager

    monkeypatch.delattr(WorkerLoRAManager, "_load_adapter")
    monkeypatch.delattr(WorkerLoRAManager, "set_active_adapters")
    with pytest.raises(GuardError, match=r"seam 'load'.*seam 'step'.*docs/compatibility.md"):
        plugin.register()


def test_the_api_side_raises_where_vllm_does_not_swallow_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM logs and goes on if the factory fails, so the factory must not and the methods must."""
    from vllm.v1.engine.output_processor import RequestState

    monkeypatch.setattr(RequestState, "__init__", object.__init__)
    made = plugin.endpoint()
    with pytest.raises(GuardError, match="seam 'in flight'"):
        made.attach_router(FastAPI())


@pytest.mark.parametrize("version", ["0.27.1", "0.33.0", "1.0", "dev"])
def test_unknown_versions(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(seam_checks.ALLOW_UNTESTED, raising=False)
    with pytest.raises(GuardError, match=r"outside of the range 0\.28 to 0\.32"):
        seam_checks.check_version(version)
    monkeypatch.setenv(seam_checks.ALLOW_UNTESTED, "1")
    seam_checks.check_version(version)


@pytest.mark.parametrize("version", ["0.28.0", "0.30.2rc1", "0.32.0+cpu"])
def test_known_versions(version: str) -> None:
    seam_checks.check_version(version)


def test_a_replaced_manager_is_not_guarded(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.worker import lora_model_runner_mixin

    monkeypatch.setattr(seams, "_original_load", None)
    monkeypatch.setattr(lora_model_runner_mixin, "LRUCacheWorkerLoRAManager", type("Other", (), {}))
    with pytest.raises(GuardError, match="another plugin has replaced"):
        seams.install(object, dict)


def test_a_replaced_map_is_not_guarded() -> None:
    class Models:
        lora_requests: dict[str, Any] = {}  # noqa: RUF012

    models = Models()
    assert seams.replace_map(models, ServingMap()) == {}
    with pytest.raises(GuardError, match="ServingMap instead of a dict"):
        seams.replace_map(models, ServingMap())


def test_callers_are_told_apart_outside_of_the_key_check() -> None:
    class AuthenticationMiddleware:
        """As vLLM's is called."""

    ours, keys = Middleware(AccessMiddleware), Middleware(AuthenticationMiddleware)
    for right in ([ours], [ours, keys]):
        app = FastAPI()
        app.user_middleware = right
        seams.check_middleware(app, AccessMiddleware)
    for wrong in ([], [keys], [keys, ours]):
        app.user_middleware = wrong
        with pytest.raises(GuardError, match="seam 'middleware'"):
            seams.check_middleware(app, AccessMiddleware)


def test_our_routes_come_first() -> None:
    app, router = FastAPI(), APIRouter()
    app.router.routes.append(Route("/metrics", lambda _: None))

    @router.get("/metrics")
    async def ours() -> str:
        return "ours"

    seams.attach_first(app, router)
    assert TestClient(app).get("/metrics").json() == "ours"
