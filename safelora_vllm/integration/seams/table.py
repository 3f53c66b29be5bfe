"""Every place where the guard holds on to vLLM's internals, as data.

`checks` compares it with the vLLM of the running process before anything is used, and ``.ci/check_seams``
with the sources of a vLLM that is not installed. What the mended bugs of vLLM need stands with them, in
`fixes`. Imports nothing, so that both can read it where neither vllm nor torch is installed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Side = Literal["worker", "server", "command"]

# The methods that each worker gets, and the names of the RPCs.
ATTEST = "safelora_attest"
PREPARE = "safelora_prepare"


@dataclass(frozen=True)
class Requirement:
    """One name of vLLM's, and what has to be true of it.

    Attributes:
        module: where it is.
        target: the name in the module, with dots for what is inside of a class.
        parameters: a function's parameters; a last ``...`` stands for any others.
        assigns: attributes that the function sets.
        references: names that its body refers to.
        annotations: names annotated in the class's body.
        inherits: names that the class must inherit instead of having its own.
        formerly: where it was in an older vLLM, looked at if it is not here.
    """

    module: str
    target: str
    parameters: tuple[str, ...] | None = None
    assigns: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    annotations: tuple[str, ...] = ()
    inherits: tuple[str, ...] = ()
    formerly: Requirement | None = None


@dataclass(frozen=True)
class Seam:
    """One thing that we do to vLLM or need of it.

    Attributes:
        name: how error messages call it.
        side: who needs it: every process with the plugin, API servers, or ``safelora-vllm serve``.
        why: what it is for.
        until: when it can go.
        requirements: what vLLM must have for it.
    """

    name: str
    side: Side
    why: str
    until: str
    requirements: tuple[Requirement, ...]


_MIXIN = "vllm.v1.worker.lora_model_runner_mixin"
_MANAGER = "vllm.lora.worker_manager"
_MODELS = "vllm.lora.model_manager"
_ASYNC_LLM = "vllm.v1.engine.async_llm"
_OUTPUTS = "vllm.v1.engine.output_processor"
_SERVING_MODELS = "vllm.entrypoints.openai.models.serving"
_SERVING = "vllm.entrypoints.serve.engine.serving"
_SERVER_0_28 = "vllm.entrypoints.openai.api_server"
_STATE = "vllm.entrypoints.launchers.api_server.app_state"
_MIDDLEWARE = "vllm.entrypoints.serve.middleware.register"
_ENDPOINT = "vllm.plugins.endpoint_plugins.interface"
_COMMAND = "vllm.entrypoints.cli.serve"

SEAMS = (
    Seam(
        "manager", "worker",
        "every runner builds its LoRA manager from this name, which the guarded one replaces",
        "vLLM lets plugins choose the manager",
        (
            Requirement(
                _MIXIN, "LoRAModelRunnerMixin.load_lora_model",
                assigns=("lora_manager",),
                references=("LRUCacheWorkerLoRAManager",),
            ),
            Requirement(
                _MANAGER, "WorkerLoRAManager.__init__",
                parameters=("self", "vllm_config", "device", "..."),
            ),
            Requirement(_MIXIN, "LRUCacheWorkerLoRAManager"),
        ),
    ),
    Seam(
        "load", "worker",
        "every real load passes here; managers that are not guarded refuse",
        "vLLM lets plugins choose the manager",
        (
            Requirement(_MANAGER, "WorkerLoRAManager._load_adapter", parameters=("self", "lora_request")),
            Requirement(
                _MANAGER, "LRUCacheWorkerLoRAManager.add_adapter",
                parameters=("self", "lora_request"),
                references=("_load_adapter",),
            ),
            Requirement(
                _MANAGER, "LRUCacheWorkerLoRAManager",
                inherits=("_load_adapter", "set_active_adapters"),
            ),
            Requirement("vllm.lora.lora_model", "LoRAModel.__init__", assigns=("loras",)),
            Requirement(
                "vllm.lora.lora_weights", "LoRALayerWeights.__init__", assigns=("lora_a", "lora_b")
            ),
        ),
    ),
    Seam(
        "step", "worker",
        "tells a load in the step loop, where an error ends the engine, from one by request",
        "vLLM fails the request instead of the engine",
        (
            Requirement(
                _MANAGER, "WorkerLoRAManager.set_active_adapters",
                parameters=("self", "requests", "mapping"),
            ),
            Requirement(
                _MIXIN, "LoRAModelRunnerMixin._set_active_loras",
                references=("set_active_adapters",),
            ),
        ),
    ),
    Seam(
        "zeros", "worker",
        "what a running request gets whose adapter cannot be read again",
        "vLLM fails the request instead of the engine",
        (
            Requirement(
                _MODELS, "LoRAModelManager.create_dummy_lora",
                parameters=("self", "lora_id", "rank", "embedding_modules"),
            ),
            Requirement(
                _MODELS, "LoRAModelManager.get_dummy_lora_warmup_rank",
                parameters=("self", "default_rank"),
            ),
            Requirement(_MANAGER, "WorkerLoRAManager.__init__", assigns=("embedding_modules",)),
            Requirement(
                _MANAGER, "LRUCacheWorkerLoRAManager.create_lora_manager",
                assigns=("_adapter_manager",),
            ),
            Requirement("vllm.lora.lora_model", "LoRAModel.clone", parameters=("self", "lora_model_id")),
            Requirement(_MODELS, "LoRAModelManager.remove_adapter", parameters=("self", "adapter_id")),
        ),
    ),
    Seam(
        "request", "worker",
        "requests are rewritten to name the published copy",
        "never: public",
        (
            Requirement(
                "vllm.lora.request", "LoRARequest",
                annotations=("lora_name", "lora_int_id", "lora_path", "load_inplace"),
            ),
        ),
    ),
    Seam(
        "settings", "worker",
        "what the gate is told about the model, and vLLM's own loading routes, which must be shut",
        "never: public",
        (
            Requirement(
                "vllm.config.vllm", "VllmConfig",
                annotations=(
                    "additional_config", "instance_id", "model_config", "load_config", "lora_config",
                    "weight_transfer_config",
                ),
            ),
            Requirement("vllm.config.model", "ModelConfig", annotations=("model", "revision")),
            Requirement("vllm.config.lora", "LoRAConfig", annotations=("lora_dtype", "max_lora_rank")),
            Requirement("vllm.config.load", "LoadConfig", annotations=("load_format",)),
        ),
    ),
    Seam(
        "pool state", "worker",
        "metrics say which adapters are in the engine's slots and in host memory",
        "vLLM has metrics of resident adapters (vllm#54830)",
        (
            Requirement(
                _MODELS, "LoRAModelManager.activate_adapter",
                references=("_active_adapters", "_registered_adapters"),
            ),
            Requirement(_MODELS, "LoRAModelManager.capacity"),
            Requirement(_MODELS, "LoRAModelManager.lora_slots"),
            Requirement(_MANAGER, "WorkerLoRAManager.list_adapters", parameters=("self",)),
        ),
    ),
    Seam(
        "attest", "worker",
        "methods that each worker gets: whether it is guarded, and to read an adapter beside its steps",
        "vLLM has a plugin RPC",
        (
            Requirement("vllm.v1.worker.worker_base", "WorkerBase.__init__", assigns=("model_runner",)),
            Requirement(
                "vllm.v1.engine.core", "EngineCore.collective_rpc",
                parameters=("self", "method", "timeout", "args", "kwargs"),
            ),
        ),
    ),
    Seam(
        "all engines", "server",
        "collective_rpc gives the first data-parallel engine's answer only",
        "it gives all; from 0.32 call_utility_all_async does",
        (
            Requirement(
                "vllm.v1.engine.core_client", "AsyncMPClient._call_utility_async",
                parameters=("self", "method", "args", "engine"),
            ),
            Requirement("vllm.v1.engine.core_client", "MPClient.__init__", assigns=("core_engines",)),
            Requirement(_ASYNC_LLM, "AsyncLLM.__init__", assigns=("engine_core",)),
        ),
    ),
    Seam(
        "in flight", "server",
        "weights are freed when their last request has ended",
        "remove_lora waits itself",
        (
            Requirement(_ASYNC_LLM, "AsyncLLM.__init__", assigns=("output_processor",)),
            Requirement(_OUTPUTS, "OutputProcessor.__init__", assigns=("request_states",)),
            Requirement(_OUTPUTS, "RequestState.__init__", assigns=("lora_request",)),
        ),
    ),
    Seam(
        "pool", "server",
        "weights are loaded before anybody asks for them, and freed",
        "never: public",
        (
            Requirement(_ASYNC_LLM, "AsyncLLM.add_lora", parameters=("self", "lora_request")),
            Requirement(_ASYNC_LLM, "AsyncLLM.remove_lora", parameters=("self", "lora_id")),
        ),
    ),
    Seam(
        "serving map", "server",
        "replaced by one in which each caller finds only what they may use",
        "vLLM asks a plugin who may use a model",
        (
            Requirement(_SERVING_MODELS, "OpenAIServingModels.__init__", assigns=("lora_requests",)),
            Requirement(
                _SERVING_MODELS, "OpenAIServingModels.show_available_models",
                references=("lora_requests",),
            ),
            Requirement(
                _SERVING_MODELS, "OpenAIServingModels.is_base_model",
                parameters=("self", "model_name"),
            ),
            Requirement(_SERVING, "BaseServing._check_model", references=("lora_requests",)),
            Requirement(_SERVING, "BaseServing._maybe_get_adapters", references=("lora_requests",)),
            Requirement(
                _STATE, "init_app_state",
                assigns=("openai_serving_models",),
                formerly=Requirement(_SERVER_0_28, "init_app_state", assigns=("openai_serving_models",)),
            ),
        ),
    ),
    Seam(
        "middleware", "server",
        "callers are told apart outside of vLLM's key check, whose list of keys gets one more",
        "vLLM lets plugins authenticate",
        (
            Requirement(
                _MIDDLEWARE, "init_entrypoints_middleware",
                references=("AuthenticationMiddleware", "api_key", "middleware"),
                formerly=Requirement(
                    _SERVER_0_28, "build_app",
                    references=("AuthenticationMiddleware", "api_key", "middleware"),
                ),
            ),
        ),
    ),
    Seam(
        "endpoint plugin", "server",
        "our routes and the state behind them",
        "never: public",
        (
            Requirement(_ENDPOINT, "EndpointPlugin.attach_router", parameters=("self", "app")),
            Requirement(
                _ENDPOINT, "EndpointPlugin.init_state",
                parameters=("self", "engine_client", "state", "args"),
            ),
            Requirement("vllm.plugins", "load_endpoint_plugins", parameters=("supported_tasks",)),
            Requirement(
                "vllm.entrypoints.launchers.app", "build_app",
                assigns=("args",),
                formerly=Requirement(_SERVER_0_28, "build_app", assigns=("args",)),
            ),
        ),
    ),
    Seam(
        "metrics", "server",
        "GET /metrics shows vLLM's registry and ours",
        "never: public",
        (Requirement("vllm.v1.metrics.prometheus", "get_prometheus_registry", parameters=()),),
    ),
    Seam(
        "requests", "server",
        "each request is counted for its adapter",
        "vLLM's stat loggers are told the adapter of a request",
        (
            Requirement(
                _ASYNC_LLM, "AsyncLLM.generate",
                parameters=("self", "prompt", "sampling_params", "request_id", "..."),
                references=("lora_request",),
            ),
            Requirement(_ASYNC_LLM, "AsyncLLM.encode", references=("lora_request",)),
            Requirement(
                "vllm.outputs", "RequestOutput.__init__",
                assigns=("prompt_token_ids", "outputs", "finished", "metrics"),
            ),
            Requirement(
                "vllm.v1.metrics.stats", "RequestStateStats",
                annotations=(
                    "num_generation_tokens", "scheduled_ts", "first_token_ts", "last_token_ts",
                    "first_token_latency",
                ),
            ),
            Requirement(_OUTPUTS, "RequestState.__init__", assigns=("stats",)),
        ),
    ),
    Seam(
        "second opinion", "server",
        "a request for an adapter is given to the aligned model too, which may answer in its place",
        "never",
        (
            Requirement(
                _ASYNC_LLM, "AsyncLLM.generate",
                parameters=("self", "prompt", "sampling_params", "request_id", "..."),
                references=("lora_request",),
            ),
            Requirement("vllm.outputs", "CompletionOutput", annotations=("text", "finish_reason")),
            Requirement(
                "vllm.sampling_params", "SamplingParams",
                annotations=(
                    "n", "max_tokens", "stop", "include_stop_str_in_output", "logprobs", "prompt_logprobs",
                    "detokenize", "skip_special_tokens", "spaces_between_special_tokens", "output_kind",
                    "top_k",
                ),
            ),
            Requirement("vllm.sampling_params", "RequestOutputKind", annotations=()),
        ),
    ),
    Seam(
        "exam", "server",
        "the exam asks how likely the aligned model's answers are, of --lora-modules too",
        "never: public",
        (
            Requirement("vllm.outputs", "RequestOutput.__init__", assigns=("prompt_logprobs",)),
            Requirement("vllm.logprobs", "Logprob", annotations=("logprob",)),
            Requirement(
                "vllm.sampling_params", "SamplingParams",
                annotations=("prompt_logprobs", "detokenize", "max_tokens", "temperature"),
            ),
            Requirement(
                _STATE, "init_app_state",
                references=("lora_modules",),
                formerly=Requirement(_SERVER_0_28, "init_app_state", references=("lora_modules",)),
            ),
        ),
    ),
    Seam(
        "serve command", "command",
        "vLLM's own command, which also starts several API servers",
        "its console script works on CPU builds",
        (
            Requirement(_COMMAND, "ServeSubcommand.subparser_init", parameters=("self", "subparsers")),
            Requirement(_COMMAND, "ServeSubcommand.validate", parameters=("self", "args")),
            Requirement(_COMMAND, "ServeSubcommand.cmd", parameters=("args",)),
            Requirement("vllm.utils.argparse_utils", "FlexibleArgumentParser"),
        ),
    ),
)  # fmt: skip
