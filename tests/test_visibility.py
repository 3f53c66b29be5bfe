"""What a caller sees of the registry, through our routes and through vLLM's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from safelora_vllm.errors import GateUnavailable, SafeLoRAError, UnknownAdapter, refuse
from safelora_vllm.integration.server.callers import acting_as
from safelora_vllm.integration.server.registry import Entry, Registry, Served, being_prepared
from safelora_vllm.integration.server.visibility import CallersRequests, look_up, visible
from safelora_vllm.tenants.principal import UNAUTHENTICATED, Principal

ACME = Principal("tenant", "acme/ci", "acme")
EVERYBODY = [
    (Principal("admin", "ops"), {"shared", "acme/a", "globex/a"}),
    (ACME, {"shared", "acme/a"}),
    (Principal("inference", "inference"), {"shared"}),
    (Principal("inference", "inference", sees_all=True), {"shared", "acme/a", "globex/a"}),
    (Principal("metrics", "metrics"), set()),
    (UNAUTHENTICATED, set()),
    (None, {"shared", "acme/a", "globex/a"}),
]


def served(name: str) -> Entry:
    report: Any = None
    request: Any = SimpleNamespace(lora_name=name)
    return Entry(name, 0, served=Served(request, report))


REGISTRY: Registry = {name: served(name) for name in ("shared", "acme/a", "globex/a")}


@pytest.mark.parametrize(("who", "names"), EVERYBODY)
def test_everybody_sees_their_part_everywhere(who: Principal | None, names: set[str]) -> None:
    assert set(visible(REGISTRY, who)) == names
    requests = CallersRequests(REGISTRY)
    with acting_as(who):
        assert set(requests) == set(requests.keys()) == names and len(requests) == len(names)
        assert {request.lora_name for request in requests.values()} == names
        assert {request.lora_name for _, request in requests.items()} == names
        for name in ("shared", "acme/a", "globex/a", "none"):
            assert (name in requests) == (requests.get(name) is not None) == (name in names)
            if name in names:
                assert look_up(REGISTRY, who, name).name == requests[name].lora_name == name
                continue
            with pytest.raises(KeyError, match=f"^'{name}'$"):
                requests[name]
            with pytest.raises(UnknownAdapter, match=f"no adapter '{name}'"):
                look_up(REGISTRY, who, name)
    assert 5 not in requests and None not in requests


@pytest.mark.parametrize("problem", [GateUnavailable("later"), refuse("nan", "a NaN"), None], ids=str)
def test_asking_for_an_unavailable_name_tells_why_and_keeps_nothing(problem: SafeLoRAError | None) -> None:
    requests = CallersRequests({"acme/a": Entry("acme/a", 0, problem=problem)})
    expected = problem or being_prepared("acme/a")
    for _ in range(3):
        with acting_as(ACME), pytest.raises(type(expected)) as raised:
            assert "acme/a" in requests
        assert str(raised.value) == str(expected) and raised.value is not problem
    assert problem is None or problem.__traceback__ is None, "frames of requests would be kept with it"
    assert list(requests) == [] and len(requests) == 0
    with acting_as(Principal("tenant", "globex/ci", "globex")):
        assert "acme/a" not in requests
