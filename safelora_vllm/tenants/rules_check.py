"""Whether a server can judge by the rules that its keys file has for a tenant."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from safelora_vllm.methods.reads import check_energy
from safelora_vllm.policy import Policy, chooses
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.tenants.exam_rules import SERVERS_EXAM, ServersExam
from safelora_vllm.tenants.keys_file import RulesCheck
from safelora_vllm.tenants.rules import TenantRules


def tenant_check(
    policy: Mapping[str, Any], projectors: str, exam: tuple[str, float, str | None] | None = None
) -> RulesCheck:
    """The check of a keys file for a server with this policy and this folder of projectors.

    exam: the server's mode, threshold and ladder. None: rules of exams are not compared with them.
    """
    server, cache = Policy.from_mapping(policy), ProjectorCache(projectors)
    fits = functools.partial(check_energy, cache=cache)
    servers = ServersExam(*exam, server, chooses(policy), cache) if exam else None

    def check(entry: str, rules: TenantRules) -> None:
        rules.check(entry, server, fits)
        if servers is not None and rules.exam != SERVERS_EXAM:
            servers.check(entry, rules.exam, rules.less_strict)

    return check
