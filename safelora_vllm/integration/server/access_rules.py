"""Who may call which route of the server, vLLM's and ours, as data. `access_check` holds requests to it.

Routes that are not listed need an admin key. Imports no vllm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from starlette.datastructures import QueryParams

from safelora_vllm.integration.seams.table import ATTEST


class Access(Enum):
    """Who may call a route. Each value is what the documentation says."""

    ANYBODY = "anybody"
    DOCS = "anybody; with `--private-docs` any key"
    METRICS = "anybody; with a metrics key that key, admin"
    USERS = "whoever may use a model: inference, tenant, admin; anybody without `--api-key`"
    TENANTS = "tenant, admin"
    MONITORS = "metrics key, admin"
    ADMINS = "admin"


_LISTED: dict[Access, str] = {
    Access.ANYBODY: """
        GET /health
        GET /ping
        POST /ping
        GET /version
        GET /safelora/ready
        GET /safelora/
        GET /safelora/page/{file}
    """,
    Access.DOCS: """
        GET /openapi.json
        GET /docs
        GET /docs/oauth2-redirect
        GET /redoc
    """,
    Access.METRICS: """
        GET /metrics
        * /metrics/*
    """,
    Access.USERS: """
        GET /v1/models
        POST /v1/completions
        POST /v1/completions/render
        POST /v1/completions/derender
        POST /v1/chat/completions
        POST /v1/chat/completions/batch
        POST /v1/chat/completions/render
        POST /v1/chat/completions/derender
        POST /v1/responses
        POST /v1/responses/render
        GET /v1/responses/{response_id}
        POST /v1/responses/{response_id}/cancel
        POST /v1/messages
        POST /v1/messages/count_tokens
        POST /v1/messages/render
        POST /v1/systemone
        POST /v1/audio/transcriptions
        POST /v1/audio/translations
        WEBSOCKET /v1/realtime
        POST /v1/embeddings
        POST /v2/embed
        POST /v1/score
        POST /score
        POST /v1/rerank
        POST /v2/rerank
        POST /rerank
        POST /classify
        POST /pooling
        POST /cohere/v2/chat
        POST /cohere/v2/chat/render
        POST /generative_scoring
        POST /inference/v1/generate
        POST /invocations
        POST /tokenize
        POST /detokenize
        GET /tokenizer_info
        GET /v1/adapters
        GET /v1/adapters/{name:path}
        GET /v1/adapters/{name:path}/versions
        GET /v1/overview
    """,
    Access.TENANTS: """
        POST /v1/adapters
        DELETE /v1/adapters/{name:path}
        DELETE /v1/adapters/{name:path}/versions/{number}
        POST /v1/adapters/{name:path}/rollback
        GET /v1/usage
        GET /v1/audit
    """,
    Access.MONITORS: """
        GET /load
    """,
    Access.ADMINS: """
        PUT /v1/adapters/{name:path}/policy
        POST /v1/adapters/{name:path}/exam
        PUT /v1/adapters/{name:path}/exam
        POST /v1/load_lora_adapter
        POST /v1/unload_lora_adapter
        POST /adapters
        DELETE /adapters/{adapter_name}
        GET /kv_event_sources
        GET /server_info
        GET /get_world_size
        POST /collective_rpc
        POST /inference/v1/abort_requests
        POST /abort_requests
        POST /pause
        POST /resume
        GET /is_paused
        POST /sleep
        POST /wake_up
        GET /is_sleeping
        POST /release_kv_cache_memory
        POST /reset_prefix_cache
        POST /reset_mm_cache
        POST /reset_encoder_cache
        POST /start_profile
        POST /stop_profile
        POST /scale_elastic_ep
        POST /is_scaling_elastic_ep
        POST /fault_tolerance/apply
        GET /fault_tolerance/status
        GET /weight_info
        POST /weight_checker
        POST /update_weight_version
        POST /init_weight_transfer_engine
        POST /shutdown_weight_transfer_engine
        POST /start_weight_update
        POST /start_draft_weight_update
        POST /update_weights
        POST /finish_weight_update
    """,
}
# "METHOD /template" → who may. A mounted application is one entry, "* /prefix/*".
TABLE: dict[str, Access] = {
    " ".join(line.split()): access for access, lines in _LISTED.items() for line in lines.strip().splitlines()
}


@dataclass(frozen=True)
class Refusal:
    """A route that even admins may not call while adapters are guarded.

    reason: why, and what to do instead. harmless: whether these query parameters and this body (None where
    ``reads_body`` is false) do no harm; without it nothing is harmless.
    """

    reason: str
    harmless: Callable[[QueryParams, object], bool] = lambda _query, _body: False
    reads_body: bool = False


# Methods that every worker has, that change nothing and cannot fail: vLLM leaves the answers of the ranks
# behind one that failed, or was late, unread, and takes them for the answers to its next questions.
RPC_METHODS = ("check_health", "get_model_inspection", "get_supported_tasks", "list_loras", ATTEST)
_NEW_WEIGHTS = Refusal(
    "new weights would not be those that the projector cache was built for. Build a cache for the new model "
    "(safelora-vllm build) and start a server with both"
)


_OTHER_LOADING = Refusal(
    "SageMaker's route leads past the adapter store. Use /v1/load_lora_adapter and /v1/unload_lora_adapter"
)


def _is_harmless_call(body: object) -> bool:
    """Whether the body of ``/collective_rpc`` calls one of `RPC_METHODS`, so that it cannot fail either."""
    if not isinstance(body, dict) or body.get("method") not in RPC_METHODS:
        return False
    return not body.get("args") and not body.get("kwargs") and body.get("timeout") is None


REFUSED: dict[str, Refusal] = {
    "POST /adapters": _OTHER_LOADING,
    "DELETE /adapters/{adapter_name}": _OTHER_LOADING,
    "POST /init_weight_transfer_engine": _NEW_WEIGHTS,
    "POST /shutdown_weight_transfer_engine": _NEW_WEIGHTS,
    "POST /start_weight_update": _NEW_WEIGHTS,
    "POST /start_draft_weight_update": _NEW_WEIGHTS,
    "POST /update_weights": _NEW_WEIGHTS,
    "POST /finish_weight_update": _NEW_WEIGHTS,
    "POST /sleep": Refusal(
        "level has to be 0 or 1. Level 2 discards the weights, and what is loaded afterwards was not "
        "compared with the projector cache. Stop the server instead",
        lambda query, _: set(query.getlist("level")) <= {"0", "1"},
    ),
    "POST /weight_checker": Refusal(
        'the action "reset" overwrites the weights. Use "checksum" or "compare"',
        lambda _, body: isinstance(body, dict) and body.get("action") in ("checksum", "compare"),
        reads_body=True,
    ),
    "POST /collective_rpc": Refusal(
        "a worker method may change weights or adapters without the gate. Manage adapters with /v1/adapters. "
        f"Methods that can be called, with no args, kwargs or timeout: {', '.join(RPC_METHODS)}",
        lambda _, body: _is_harmless_call(body),
        reads_body=True,
    ),
}
