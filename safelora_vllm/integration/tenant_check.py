"""Whether a server can judge by the rules that its keys file has for a tenant."""

from __future__ import annotations

from collections.abc import Callable

from safelora_vllm.methods.reads import check_parts
from safelora_vllm.policy import Policy
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.settings import ServerSettings
from safelora_vllm.tenants.keys_file import RulesCheck
from safelora_vllm.tenants.rules import TenantRules


def tenant_check(settings: ServerSettings) -> RulesCheck:
    """The check of a keys file for a server with these settings."""
    server, fits = Policy.from_mapping(settings.policy), policy_fits(ProjectorCache(settings.projectors))

    def check(entry: str, rules: TenantRules) -> None:
        rules.check(entry, server, fits)

    return check


def policy_fits(cache: ProjectorCache) -> Callable[[Policy], None]:
    """Raises PolicyError for a policy that reads what the cache lacks."""

    def fits(policy: Policy) -> None:
        check_parts(policy, cache)
        if policy.has_effect("energy"):
            cache.projector(next(iter(cache.modules))).directions(policy.energy)

    return fits
