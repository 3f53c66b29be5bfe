"""The ``safelora`` entry points. vLLM logs and swallows an ImportError here and would go on
unguarded, so this module imports the standard library only; what is wrong raises in `register`
and in `Endpoint`'s methods.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any


def register() -> None:
    """``vllm.general_plugins``: put the guard into this process. May be called more than once.

    Raises:
        GuardError: this vLLM has other seams than those this release was written for.
    """
    from safelora_vllm.integration import runtime_updating
    from safelora_vllm.integration.seams import checks, fixes

    runtime_updating.switch_off()
    checks.check("worker")
    from safelora_vllm.integration.seams import worker as seams
    from safelora_vllm.integration.worker import lora_manager as worker

    seams.install(worker.GuardedLoRAManager, worker.attest, worker.prepare)
    fixes.apply(checks.release())


def endpoint() -> Endpoint:
    """``vllm.endpoint_plugins``: the routes and the serving state of one API server process."""
    return Endpoint()


class Endpoint:
    """vLLM's endpoint plugin: routes and serving state.

    vLLM swallows whatever goes wrong before it calls these methods, so all work is in them.
    """

    name = "safelora"
    required_tasks = None

    def attach_router(self, app: Any) -> None:
        """Add the routes and the middleware.

        Raises:
            GuardError: this vLLM has other seams than those this release was written for, or may have
                loading routes of its own.
        """
        from safelora_vllm.integration import runtime_updating
        from safelora_vllm.integration.seams import checks

        runtime_updating.check_off()
        checks.check("server")
        from safelora_vllm.integration.server.app import SafeLoRAEndpoint

        self._endpoint = SafeLoRAEndpoint()
        self._endpoint.attach_router(app)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Start serving adapters."""
        await self._endpoint.init_state(engine_client, state, args)
