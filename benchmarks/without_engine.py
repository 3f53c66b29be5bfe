"""This package's whole HTTP side and a real gate process, without an engine behind: it starts in seconds.

    python benchmarks/without_engine.py --aligned DIR --projectors DIR --store DIR --port N

For crash.py, which needs many starts. Loading into the pool does nothing here; the server tests have it.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import uvicorn
from fastapi import FastAPI

from safelora_vllm.gate.protocol import GateConfig
from safelora_vllm.gate.supervisor import GateProcess
from safelora_vllm.integration.attestation import Attestation
from safelora_vllm.integration.server.app import SafeLoRAEndpoint
from safelora_vllm.integration.server.middleware import AccessMiddleware
from safelora_vllm.settings import ServerSettings


class NoEngine:
    """What the routes need of vLLM's ``EngineClient``."""

    def __init__(self, gate: GateProcess, socket: str) -> None:
        self._gate, self._socket = gate, socket
        self.engine_core, self.core_engines = self, ["engine"]
        self.output_processor = SimpleNamespace(request_states={})

    async def _call_utility_async(self, *_: object, **__: object) -> list[dict[str, Any]]:
        """One guarded worker."""
        state = self._gate.state
        return [Attestation(True, self._socket, state.projectors, state.policy.id, []).to_dict()]

    async def add_lora(self, _: object) -> bool:
        """Loads nothing."""
        return True

    async def remove_lora(self, _: int) -> bool:
        """Frees nothing."""
        return True


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("aligned", "projectors", "store"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    given = parser.parse_args()
    socket = str(Path(tempfile.mkdtemp()) / "gate.sock")
    settings = ServerSettings(str(given.projectors), str(given.store), {"method": "safe-lora"})
    gate = GateProcess(GateConfig(socket, str(given.aligned), settings, dtype="bfloat16"))
    section = settings.to_section()
    args = Namespace(api_key=None, middleware=[], enable_lora=True, additional_config=section)
    app, endpoint = FastAPI(), SafeLoRAEndpoint()
    app.state.args = args
    models = SimpleNamespace(lora_requests={}, is_base_model=lambda name: name == "aligned")
    app.state.openai_serving_models = models

    async def start() -> None:
        await endpoint.init_state(NoEngine(gate, socket), app.state, args)

    endpoint.attach_router(app)
    app.add_middleware(AccessMiddleware)
    app.router.on_startup.append(start)
    uvicorn.run(app, host="127.0.0.1", port=given.port, log_level="warning")
    os._exit(0)


if __name__ == "__main__":
    main()
