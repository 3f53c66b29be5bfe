"""Which connectors of vLLM to other caches of keys and values a guarded server may have.

An adapter changes keys and values. A cache that looks blocks up by their tokens alone gives one adapter's to
another, and to the aligned model: answers of one tenant's adapter then go on from another's.
vLLM's own block hashes have the adapter's name and path. LMCache's keys have neither:
https://github.com/vllm-project/vllm/issues/44250.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from safelora_vllm.errors import GuardError

ALLOW = "SAFELORA_ALLOW_KV_CONNECTORS"
# Read in vLLM 0.32: the first three look blocks up by vLLM's hashes, the others fetch those of one request.
_KEEP_APART = frozenset(
    {
        "OffloadingConnector", "SimpleCPUOffloadConnector", "MooncakeStoreConnector",
        "NixlConnector", "NixlPullConnector", "NixlPushConnector", "MooncakeConnector", "MoRIIOConnector",
    }
)  # fmt: skip
_SEVERAL, _OFFLOADING = "MultiConnector", "OffloadingConnector"
# What it may keep blocks in besides memory. Its tier p2p fetches from a host that a caller's request names.
_TIERS = frozenset({"fs", "obj", "example"})


def check(config: Any) -> None:
    """Raise GuardError where a connector may give one adapter another's keys and values.

    config: vLLM's ``kv_transfer_config``, an object or its fields; or None.
    """
    allowed = _KEEP_APART | {name.strip() for name in os.environ.get(ALLOW, "").split(",")}
    if others := sorted({name for name in _names(config) if name not in allowed}):
        names = ", ".join(others)
        raise GuardError(
            f"the connector {names} (--kv-transfer-config, --kv-offloading-backend) may look keys and values "
            "up without the adapter that made them, or take a caller's for them: one tenant's adapter would "
            "go on from another's. Leave it out, or use one of "
            f"{', '.join(sorted(_KEEP_APART))}. If you know that its keys hold the adapter's name and path, "
            f"set {ALLOW}={','.join(others)}"
        )


def _names(config: Any) -> Iterator[str]:
    """Of a connector, or of those that are in one; with the module that one is loaded from, if given.

    What a connector offloads to is named too, where it is not known.
    """
    name, module, more = (
        _field(config, field)
        for field in ("kv_connector", "kv_connector_module_path", "kv_connector_extra_config")
    )
    if name == _SEVERAL and not module:
        for each in (more or {}).get("connectors", ()):
            yield from _names(each)
    elif name:
        yield f"{module}.{name}" if module else str(name)
        if name == _OFFLOADING and not module:
            yield from _offloads_to(more or {})


def _offloads_to(settings: Mapping[str, Any]) -> Iterator[str]:
    if module := settings.get("spec_module_path"):
        yield f"{module}.{settings.get('spec_name')}"
    for tier in settings.get("secondary_tiers") or ():
        kind, module = tier.get("type"), tier.get("module_path")
        if module or kind not in _TIERS:
            yield f"{module or _OFFLOADING}.{kind}"


def _field(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
