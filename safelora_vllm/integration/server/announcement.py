"""What a guarded server says of itself in its log when it starts. Imports no vllm."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from starlette.routing import BaseRoute, WebSocketRoute

from safelora_vllm.exam.ladder import AS_UPLOADED
from safelora_vllm.gate.protocol import GateState
from safelora_vllm.integration.server.access_check import RouteAccess, name_of
from safelora_vllm.integration.server.access_rules import Access
from safelora_vllm.policy import CAPS, Policy
from safelora_vllm.settings import ADMIN_KEY, ADMIN_KEY_MADE
from safelora_vllm.tenants.keys_file import ENVIRONMENT
from safelora_vllm.tenants.principal import Kind, Principal


def rules_line(state: GateState, ladder: Sequence[str] = ()) -> str:
    """By which rules the gate judges, with which projectors, and where the store is.

    ladder: the rungs of an enforced exam, which decides by which of them an adapter is served.
    """
    policy = state.policy
    mode = policy.mode if policy.enforcing else f"{policy.mode}: adapters are served UNPROJECTED"
    how = f"by the ladder {', then '.join(ladder)}" if ladder else policy.summary
    return (
        f"adapters are guarded: {how}, norms up to {policy.max_relative_norm:g} a module and "
        f"{policy.max_total_norm:g} in total, mode {mode}; projectors {state.projectors[:12]}, "
        f"store {state.store}"
    )


def caps_warning(policy: Policy, ladder: Sequence[str] = ()) -> str:
    """What an operator may not want of the caps on norms; empty where there is nothing to say."""
    if not min(policy.max_relative_norm, policy.max_total_norm):
        return (
            "a cap of 0 (--max-relative-norm, --max-total-norm) refuses every adapter that changes anything"
        )
    as_uploaded = policy.selects_none or any(rung.startswith(AS_UPLOADED) for rung in ladder)
    if as_uploaded and all(getattr(policy, cap) >= getattr(Policy(), cap) for cap in CAPS):
        return (
            "adapters are served as uploaded, and the caps on norms are at their defaults, which bound "
            "little: set --max-relative-norm and --max-total-norm (docs/policies.md, Caps on norms)"
        )
    return ""


def access_line(principals: Sequence[Principal], access: RouteAccess, routes: Sequence[BaseRoute]) -> str:
    """Which keys there are, and what is open without one."""
    kinds = {principal.kind for principal in principals}
    tenants = {principal.tenant for principal in principals if principal.tenant}
    nobody: Kind = "stranger" if "inference" in kinds else "anonymous"
    keys = [
        f"admin {_admin_keys(principals)}",
        f"{len(tenants)} tenant{'s' * (len(tenants) != 1)}",
        *(f"{kind} {'yes' if kind in kinds else 'no'}" for kind in ("inference", "metrics")),
    ]
    without = ", ".join(_open(nobody, access, routes)) or "nothing"
    return f"keys: {', '.join(keys)}; open without a key: {without}"


def _admin_keys(principals: Sequence[Principal]) -> str:
    """Where the admin keys come from."""
    names = {principal.key_id for principal in principals if principal.kind == "admin"}
    found = ["the keys file"] if names - {ENVIRONMENT} else []
    if ENVIRONMENT in names:
        found.insert(0, "generated" if os.environ.get(ADMIN_KEY_MADE) else ADMIN_KEY)
    return " and ".join(found) or "none"


def _open(nobody: Kind, access: RouteAccess, routes: Sequence[BaseRoute]) -> list[str]:
    """The paths that a caller without a key may call; those that use models as one."""
    granted = {
        (name.partition(" ")[2], given)
        for name in _names(routes)
        if nobody in access.may(given := access.access(name))
    }
    paths = sorted({path for path, given in granted if given is not Access.USERS})
    return [*paths, *(["every route that uses a model"] * any(given is Access.USERS for _, given in granted))]


def _names(routes: Sequence[BaseRoute]) -> Iterator[str]:
    for route in routes:
        if isinstance(route, WebSocketRoute):
            yield name_of(route, "WEBSOCKET")
        else:
            methods = getattr(route, "methods", None) or ("GET",)
            yield from (name_of(route, method) for method in methods if method != "HEAD")
