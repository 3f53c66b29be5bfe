"""The ``safelora`` entry points. vLLM logs and swallows an ImportError here and would go on
unguarded, so this module imports the standard library only; what is wrong raises in `register`.
"""

from __future__ import annotations

from typing import Any


def register() -> None:
    """``vllm.general_plugins``: put the guard into this process. May be called more than once.

    Raises:
        GuardError: this vLLM has other seams than those this release was written for.
    """
    from safelora_vllm.integration import seams, worker

    seams.install(worker.GuardedLoRAManager, worker.attest)


def endpoint() -> Any:
    """``vllm.endpoint_plugins``: the routes and the serving state of one API server process."""
    from safelora_vllm.integration.endpoint import SafeLoRAEndpoint

    return SafeLoRAEndpoint()
