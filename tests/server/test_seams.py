"""Every seam is verified at start: without it, or with another in its place, the guard says which."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType
from typing import Any, get_args

import pytest
from fastapi import APIRouter, FastAPI
from fastapi.testclient import TestClient
from starlette.middleware import Middleware
from starlette.routing import Route

from safelora_vllm.errors import GuardError
from safelora_vllm.integration import plugin
from safelora_vllm.integration.seams import checks, server, worker
from safelora_vllm.integration.seams.fixes import SWITCH
from safelora_vllm.integration.seams.table import Requirement, Seam, Side
from safelora_vllm.integration.server.middleware import AccessMiddleware
from safelora_vllm.integration.server.visibility import CallersRequests

SIDES = get_args(Side)
SEAMS = [seam for side in SIDES for seam in checks.seams(side)]
ALL = [
    pytest.param(seam, requirement, id=f"{seam.name}-{requirement.target}")
    for seam in SEAMS
    for requirement in seam.requirements
]
# The others only have to be there.
WITH_NEEDS = [p for p in ALL if p.values[1] != Requirement(p.values[1].module, p.values[1].target)]


def places(requirement: Requirement) -> Iterator[Requirement]:
    """Where this vLLM has it: here, in its older place, or in both, one importing it from the other."""
    for place in (requirement, requirement.formerly):
        if place is not None and not checks._problem(place):
            yield place


def expectation(seam: Seam, requirement: Requirement) -> Any:
    """Raises GuardError with the seam's and the target's names."""
    return pytest.raises(
        GuardError, match=f"seam {seam.name!r}: .*{re.escape(requirement.target)} (is not|takes|does not|has)"
    )


@pytest.mark.parametrize("side", SIDES)
def test_this_vllm_has_them_all(side: Side) -> None:
    checks.check(side)


def test_every_seam_belongs_to_a_side() -> None:
    assert {seam.side for seam in SEAMS} == set(SIDES)
    assert len({seam.name for seam in SEAMS}) == len(SEAMS)
    assert all(seam.requirements and seam.why and seam.until for seam in SEAMS)


@pytest.mark.parametrize(("seam", "requirement"), ALL)
def test_one_that_is_gone(seam: Seam, requirement: Requirement, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in list(places(requirement)):
        real, without = import_module(place.module), ModuleType(place.module)
        removed = (place.target.split(".")[0], "__getattr__")
        vars(without).update({name: value for name, value in vars(real).items() if name not in removed})
        monkeypatch.setitem(sys.modules, place.module, without)
    with expectation(seam, requirement):
        checks.check_seams(seam.side)


@pytest.mark.parametrize(("seam", "requirement"), WITH_NEEDS)
def test_one_that_changed(seam: Seam, requirement: Requirement, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another signature, another body, another class in its place."""
    if requirement.annotations or requirement.inherits:
        changed: object = type("Changed", (), dict.fromkeys(requirement.inherits))
    else:

        def changed(other: object) -> None: ...

    for place in list(places(requirement)):
        owner = import_module(place.module)
        *path, name = place.target.split(".")
        for part in path:
            owner = getattr(owner, part)
        monkeypatch.setattr(owner, name, changed)
    with expectation(seam, requirement):
        checks.check_seams(seam.side)


def test_all_that_changed_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.lora.worker_manager import WorkerLoRAManager

    monkeypatch.delattr(WorkerLoRAManager, "_load_adapter")
    monkeypatch.delattr(WorkerLoRAManager, "set_active_adapters")
    with pytest.raises(GuardError, match=r"seam 'load'.*seam 'step'.*docs/compatibility.md"):
        plugin.register()


@pytest.mark.parametrize("side", SIDES)
def test_a_wrong_switch_of_the_fixes_stops_the_start(side: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "off")
    with pytest.raises(GuardError, match=f"{SWITCH}='off' is not a valid switch"):
        checks.check(side)


def test_a_fix_that_is_switched_off_needs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    monkeypatch.setattr(PrometheusStatLogger, "record", lambda: None)
    with pytest.raises(GuardError, match="seam 'mixes'"):
        checks.check("worker")
    monkeypatch.setenv(SWITCH, "0")
    checks.check("worker")


def test_the_api_side_raises_where_vllm_does_not_swallow_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM logs and goes on if the factory fails, so the factory must not and the methods must."""
    from vllm.v1.engine.output_processor import RequestState

    monkeypatch.setattr(RequestState, "__init__", object.__init__)
    made = plugin.endpoint()
    with pytest.raises(GuardError, match="seam 'in flight'"):
        made.attach_router(FastAPI())


def test_workers_and_the_offline_api_stop_at_an_untested_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything of it is replaced: `LLM` has no API server that would stop at it."""
    monkeypatch.delenv(checks.ALLOW_UNTESTED, raising=False)
    monkeypatch.setattr(checks, "_version", lambda: "0.33.0")
    monkeypatch.setattr(worker, "install", lambda *_: pytest.fail("the guard is put in"))
    with pytest.raises(GuardError, match=r"vLLM 0\.33\.0 is outside of the range"):
        plugin.register()


@pytest.mark.parametrize("version", ["0.27.1", "0.33.0", "1.0", "dev"])
def test_unknown_versions(
    version: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv(checks.ALLOW_UNTESTED, raising=False)
    with pytest.raises(GuardError, match=r"outside of the range 0\.28 to 0\.32"):
        checks.check_version(version)
    for value in ("", "0", "yes"):
        monkeypatch.setenv(checks.ALLOW_UNTESTED, value)
        with pytest.raises(GuardError, match=f"{checks.ALLOW_UNTESTED}=1 to try"):
            checks.check_version(version)
    monkeypatch.setenv(checks.ALLOW_UNTESTED, "1")
    checks.check_version(version)
    assert f"vLLM {version} is outside of the range 0.28 to 0.32 and was not run" in caplog.text


@pytest.mark.parametrize("version", ["0.28.0", "0.30.2rc1", "0.32.0+cpu"])
def test_known_versions(version: str) -> None:
    checks.check_version(version)


def test_a_replaced_manager_is_not_guarded(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.worker import lora_model_runner_mixin

    monkeypatch.setattr(worker, "_original_load", None)
    monkeypatch.setattr(lora_model_runner_mixin, "LRUCacheWorkerLoRAManager", type("Other", (), {}))
    with pytest.raises(GuardError, match="another plugin has replaced"):
        worker.install(object, dict, lambda *_: True)


def test_a_replaced_map_is_not_guarded() -> None:
    class Models:
        lora_requests: dict[str, Any] = {}  # noqa: RUF012

    models = Models()
    assert server.replace_map(models, CallersRequests({})) == {}
    with pytest.raises(GuardError, match="CallersRequests instead of a dict"):
        server.replace_map(models, CallersRequests({}))


def test_callers_are_told_apart_outside_of_the_key_check() -> None:
    class AuthenticationMiddleware:
        """As vLLM's is called."""

    ours, keys = Middleware(AccessMiddleware), Middleware(AuthenticationMiddleware)
    for right in ([ours], [ours, keys]):
        app = FastAPI()
        app.user_middleware = right
        server.check_middleware(app, AccessMiddleware)
    for wrong in ([], [keys], [keys, ours]):
        app.user_middleware = wrong
        with pytest.raises(GuardError, match="seam 'middleware'"):
            server.check_middleware(app, AccessMiddleware)


def test_our_routes_come_first() -> None:
    app, router = FastAPI(), APIRouter()
    app.router.routes.append(Route("/metrics", lambda _: None))

    @router.get("/metrics")
    async def ours() -> str:
        return "ours"

    server.attach_first(app, router)
    assert TestClient(app).get("/metrics").json() == "ours"
