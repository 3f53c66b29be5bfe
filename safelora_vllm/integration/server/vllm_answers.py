"""vLLM's own words for what its controllers look for in answers of its own routes.

Controllers of one generation read the fields of ``error``, those of another the same fields at the top.
Sources: ``_check_load_lora_adapter_request`` in ``vllm/entrypoints/openai/models/serving.py``,
``sendRequest`` in ``loraadapter_controller.go`` of vllm-project/production-stack,
``client.go`` of kubeai-project/kubeai.
"""

from __future__ import annotations

from fastapi.responses import JSONResponse


def already_loaded(name: str, cause: str) -> JSONResponse:
    """The name is taken by other content, or cannot be taken."""
    return _error(400, "InvalidUserInput", f"The lora adapter '{name}' has already been loaded: {cause}")


def not_found(name: str) -> JSONResponse:
    """There is nothing to unload."""
    return _error(404, "NotFoundError", f"The lora adapter '{name}' cannot be found.")


def _error(status: int, kind: str, message: str) -> JSONResponse:
    fields = {"message": message, "type": kind, "param": None, "code": status}
    return JSONResponse({"error": fields, "object": "error", **fields}, status_code=status)
