"""vLLM's endpoint-plugin contract (``vllm/plugins/endpoint_plugins/interface.py``) for safelora."""

from __future__ import annotations

import os
import secrets
from argparse import Namespace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from safelora_vllm.errors import GuardError, SafeLoRAError
from safelora_vllm.integration.routes import build_router, error_response
from safelora_vllm.integration.serving import Serving

ADMIN_KEY = "SAFELORA_ADMIN_API_KEY"


class SafeLoRAEndpoint:
    """Attaches our routes and builds the serving state of one API server process."""

    name = "safelora"
    required_tasks = None

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes; where vLLM asks for an inference key, let the admin key pass there too."""
        args = app.state.args
        key = os.environ.get(ADMIN_KEY) or ""
        if not key:
            key = secrets.token_urlsafe(24)
            print(
                f"\nsafelora: admin key for this run (set {ADMIN_KEY} to choose it): {key}\n",
                flush=True,
            )
        inference_keys = [k for k in (args.api_key or [os.environ.get("VLLM_API_KEY")]) if k]
        if inference_keys:
            args.api_key = [*inference_keys, key]
        app.include_router(build_router(key))

        @app.exception_handler(SafeLoRAError)
        async def answer(_: Request, error: SafeLoRAError) -> JSONResponse:
            return error_response(error)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Start serving adapters, if this server has an engine with LoRA.

        Raises:
            GuardError: a worker is not guarded; the server does not start.
        """
        if engine_client is None or not getattr(args, "enable_lora", False):
            return
        if (getattr(args, "api_server_count", None) or 1) > 1:
            raise GuardError(
                "several API servers do not share their adapters yet; start with --api-server-count 1"
            )
        state.safelora = await Serving.start(engine_client, state.openai_serving_models)
