"""Every place where this package holds on to vLLM's internals, as data.

`seam_checks` compares it with the vLLM of the running process before anything is used, and
``.ci/check_seams`` with the sources of a vLLM that is not installed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Side = Literal["worker", "server", "command"]


@dataclass(frozen=True)
class Hold:
    """One name of vLLM's, and what has to be true of it.

    takes: a function's parameters; a last ``...`` stands for any others. stores: attributes that the
    function sets. reads: names that its body refers to. fields: annotations in the class's body.
    lacks: what the class must inherit. older: where it was before, looked at if it is not here.
    """

    module: str
    target: str
    takes: tuple[str, ...] | None = None
    stores: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    older: Hold | None = None


@dataclass(frozen=True)
class Seam:
    """One thing that we do to vLLM or need of it.

    side: who needs it: every process with the plugin, API servers, or ``safelora-vllm serve``.
    until: when it can go.
    """

    name: str
    side: Side
    why: str
    until: str
    holds: tuple[Hold, ...]


_MIXIN = "vllm.v1.worker.lora_model_runner_mixin"
_MANAGER = "vllm.lora.worker_manager"
_TORCH_OPS = "vllm.lora.ops.torch_ops.lora_ops"
_PUNICA = "vllm.lora.punica_wrapper.punica_cpu"
_SERVER_0_28 = "vllm.entrypoints.openai.api_server"
_STATE = "vllm.entrypoints.launchers.api_server.app_state"
_MIDDLEWARE = "vllm.entrypoints.serve.middleware.register"

SEAMS = (
    Seam(
        "manager", "worker",
        "every runner builds its LoRA manager from this name, which the guarded one replaces",
        "vLLM lets plugins choose the manager",
        (
            Hold(_MIXIN, "LoRAModelRunnerMixin.load_lora_model", stores=("lora_manager",),
                 reads=("LRUCacheWorkerLoRAManager",)),
            Hold(_MANAGER, "WorkerLoRAManager.__init__", takes=("self", "vllm_config", "device", "...")),
            Hold(_MIXIN, "LRUCacheWorkerLoRAManager"),
        ),
    ),
    Seam(
        "load", "worker",
        "every real load passes here; managers that are not guarded refuse",
        "vLLM lets plugins choose the manager",
        (
            Hold(_MANAGER, "WorkerLoRAManager._load_adapter", takes=("self", "lora_request")),
            Hold(_MANAGER, "LRUCacheWorkerLoRAManager.add_adapter", takes=("self", "lora_request"),
                 reads=("_load_adapter",)),
            Hold(_MANAGER, "LRUCacheWorkerLoRAManager", lacks=("_load_adapter", "set_active_adapters")),
        ),
    ),
    Seam(
        "unmapped", "worker",
        "weights have memory of their own: on a CPU vLLM leaves them mapped from the file",
        "vLLM reads adapters without mapping them",
        (
            Hold("vllm.lora.lora_model", "safetensors"),
            Hold("vllm.lora.lora_model", "LoRAModel.from_local_checkpoint",
                 reads=("safetensors", "safe_open", "get_tensor")),
        ),
    ),
    Seam(
        "step", "worker",
        "tells a load in the step loop, where an error ends the engine, from one by request",
        "vLLM fails the request instead of the engine",
        (
            Hold(_MANAGER, "WorkerLoRAManager.set_active_adapters", takes=("self", "requests", "mapping")),
            Hold(_MIXIN, "LoRAModelRunnerMixin._set_active_loras", reads=("set_active_adapters",)),
        ),
    ),
    Seam(
        "zeros", "worker",
        "what a running request gets whose adapter cannot be read again",
        "vLLM fails the request instead of the engine",
        (
            Hold("vllm.lora.model_manager", "LoRAModelManager.create_dummy_lora",
                 takes=("self", "lora_id", "rank", "embedding_modules")),
            Hold("vllm.lora.model_manager", "LoRAModelManager.get_dummy_lora_warmup_rank",
                 takes=("self", "default_rank")),
            Hold(_MANAGER, "WorkerLoRAManager.__init__", stores=("embedding_modules",)),
            Hold(_MANAGER, "LRUCacheWorkerLoRAManager.create_lora_manager", stores=("_adapter_manager",)),
        ),
    ),
    Seam(
        "ranks", "worker",
        "all ranks load an adapter or none; when one raises, vLLM leaves the others' answers unread",
        "vLLM reads the answers of all ranks",
        (
            Hold("vllm.v1.executor.abstract", "Executor.add_lora", takes=("self", "lora_request")),
            Hold("vllm.v1.executor.abstract", "Executor.collective_rpc",
                 takes=("self", "method", "timeout", "args", "kwargs", "...")),
            Hold("vllm.v1.executor.multiproc_executor", "MultiprocExecutor", lacks=("add_lora",)),
            Hold("vllm.v1.worker.worker_base", "WorkerBase.add_lora", takes=("self", "lora_request")),
            Hold("vllm.v1.worker.worker_base", "WorkerBase.remove_lora", takes=("self", "lora_id")),
        ),
    ),
    Seam(
        "base rows", "worker",
        "rows of the base model have no adapter; vLLM's torch operators, used on CPUs, take the last slot's, "
        "and copy a slot's weights for every row",
        "0.33 is the oldest: it masks these rows; and vLLM multiplies the rows of one slot together",
        (
            Hold(_TORCH_OPS, "bgmv_shrink", takes=(
                "inputs", "lora_b_weights", "output_tensor", "lora_indices_tensor", "scaling")),
            Hold(_TORCH_OPS, "bgmv_expand", takes=(
                "inputs", "lora_b_weights", "output_tensor", "lora_indices_tensor", "add_inputs")),
            Hold(_TORCH_OPS, "bgmv_expand_slice", takes=(
                "inputs", "lora_b_weights", "output_tensor", "lora_indices_tensor", "slice_offset",
                "slice_size", "add_inputs")),
            Hold(_TORCH_OPS, "sgmv_shrink", reads=("bgmv_shrink",)),
            Hold(_TORCH_OPS, "sgmv_expand", reads=("bgmv_expand",)),
            Hold(_TORCH_OPS, "sgmv_expand_slice", reads=("bgmv_expand_slice",)),
            Hold(_PUNICA, "bgmv_shrink"),
            Hold(_PUNICA, "bgmv_expand"),
            Hold(_PUNICA, "bgmv_expand_slice"),
            Hold(_PUNICA, "PunicaWrapperCPU._shrink_decode", reads=("bgmv_shrink",)),
            Hold(_PUNICA, "PunicaWrapperCPU._expand_decode", reads=("bgmv_expand",)),
            Hold(_PUNICA, "PunicaWrapperCPU._expand_slice_decode", reads=("bgmv_expand_slice",)),
        ),
    ),
    Seam(
        "head", "worker",
        "no adapter changes the head; on CPUs vLLM adds its empty slots, and a request for its prompt's "
        "log-probabilities ends the engine there",
        "vLLM's CPU wrapper takes the rows of prompts",
        (
            Hold(_PUNICA, "PunicaWrapperCPU.add_lora_logits",
                 takes=("self", "y", "x", "lora_a_stacked", "lora_b_stacked", "scale", "...")),
            Hold("vllm.lora.layers.logits_processor", "LogitsProcessorWithLoRA._get_logits",
                 reads=("add_lora_logits", "can_update_inplace")),
        ),
    ),
    Seam(
        "clean blocks", "worker",
        "on CPUs blocks of the key-value cache are zeroed before they are used again: attention reads past "
        "the end of a sequence, and NaN that one request left there would be another's",
        "vLLM's attention on CPUs leaves out what is behind the end",
        (
            Hold("vllm.v1.kv_cache_interface", "KVCacheConfig.needs_kv_cache_zeroing"),
            Hold("vllm.platforms", "__getattr__"),
            Hold("vllm.platforms.interface", "Platform.is_cpu", takes=("self",)),
            Hold("vllm.v1.core.sched.scheduler", "Scheduler.__init__", stores=("needs_kv_cache_zeroing",)),
            Hold("vllm.v1.worker.cpu_model_runner", "CPUModelRunner._zero_block_ids",
                 takes=("self", "block_ids")),
        ),
    ),
    Seam(
        "versions", "worker",
        "two versions of a name in one batch are two adapters; vLLM compares names only",
        "vLLM compares ids",
        (
            Hold("vllm.lora.request", "LoRARequest.__eq__", reads=("lora_name",)),
            Hold("vllm.lora.request", "LoRARequest.__hash__", reads=("lora_name",)),
        ),
    ),
    Seam(
        "mixes", "worker",
        "a series for every mix of adapters that ever ran together; only the newest is kept",
        "vLLM removes old ones",
        (
            Hold("vllm.v1.metrics.loggers", "PrometheusStatLogger.__init__", stores=("gauge_lora_info",)),
            Hold("vllm.v1.metrics.loggers", "PrometheusStatLogger.record",
                 reads=("gauge_lora_info", "labels")),
        ),
    ),
    Seam(
        "request", "worker",
        "requests are rewritten to name the published copy",
        "never: public",
        (
            Hold("vllm.lora.request", "LoRARequest",
                 fields=("lora_name", "lora_int_id", "lora_path", "load_inplace")),
        ),
    ),
    Seam(
        "settings", "worker",
        "what the gate is told about the model, and vLLM's own loading routes, which must be shut",
        "never: public",
        (
            Hold("vllm.config.vllm", "VllmConfig", fields=(
                "additional_config", "instance_id", "model_config", "load_config", "lora_config",
                "weight_transfer_config")),
            Hold("vllm.config.model", "ModelConfig", fields=("model", "revision")),
            Hold("vllm.config.lora", "LoRAConfig", fields=("lora_dtype", "max_lora_rank")),
            Hold("vllm.config.load", "LoadConfig", fields=("load_format",)),
            Hold("vllm.envs", "VLLM_ALLOW_RUNTIME_LORA_UPDATING"),
            Hold("vllm", "envs"),
        ),
    ),
    Seam(
        "attest", "worker",
        "a method that each worker gets, by which the API side asks whether it is guarded",
        "vLLM has a plugin RPC",
        (
            Hold("vllm.v1.worker.worker_base", "WorkerBase.__init__", stores=("model_runner",)),
            Hold("vllm.v1.engine.core", "EngineCore.collective_rpc",
                 takes=("self", "method", "timeout", "args", "kwargs")),
        ),
    ),
    Seam(
        "all engines", "server",
        "collective_rpc gives the first data-parallel engine's answer only",
        "it gives all; from 0.32 call_utility_all_async does",
        (
            Hold("vllm.v1.engine.core_client", "AsyncMPClient._call_utility_async",
                 takes=("self", "method", "args", "engine")),
            Hold("vllm.v1.engine.core_client", "MPClient.__init__", stores=("core_engines",)),
            Hold("vllm.v1.engine.async_llm", "AsyncLLM.__init__", stores=("engine_core",)),
        ),
    ),
    Seam(
        "in flight", "server",
        "weights are freed when their last request has ended",
        "remove_lora waits itself",
        (
            Hold("vllm.v1.engine.async_llm", "AsyncLLM.__init__", stores=("output_processor",)),
            Hold("vllm.v1.engine.output_processor", "OutputProcessor.__init__", stores=("request_states",)),
            Hold("vllm.v1.engine.output_processor", "RequestState.__init__", stores=("lora_request",)),
        ),
    ),
    Seam(
        "pool", "server",
        "weights are loaded before anybody asks for them, and freed",
        "never: public",
        (
            Hold("vllm.v1.engine.async_llm", "AsyncLLM.add_lora", takes=("self", "lora_request")),
            Hold("vllm.v1.engine.async_llm", "AsyncLLM.remove_lora", takes=("self", "lora_id")),
        ),
    ),
    Seam(
        "serving map", "server",
        "replaced by one in which each caller finds only what he may use",
        "vLLM asks a plugin who may use a model",
        (
            Hold("vllm.entrypoints.openai.models.serving", "OpenAIServingModels.__init__",
                 stores=("lora_requests",)),
            Hold("vllm.entrypoints.openai.models.serving", "OpenAIServingModels.show_available_models",
                 reads=("lora_requests",)),
            Hold("vllm.entrypoints.openai.models.serving", "OpenAIServingModels.is_base_model",
                 takes=("self", "model_name")),
            Hold("vllm.entrypoints.serve.engine.serving", "BaseServing._check_model",
                 reads=("lora_requests",)),
            Hold("vllm.entrypoints.serve.engine.serving", "BaseServing._maybe_get_adapters",
                 reads=("lora_requests",)),
            Hold(_STATE, "init_app_state", stores=("openai_serving_models",),
                 older=Hold(_SERVER_0_28, "init_app_state", stores=("openai_serving_models",))),
        ),
    ),
    Seam(
        "middleware", "server",
        "callers are told apart outside of vLLM's key check, whose list of keys gets one more",
        "vLLM lets plugins authenticate",
        (
            Hold(_MIDDLEWARE, "init_entrypoints_middleware",
                 reads=("AuthenticationMiddleware", "api_key", "middleware"),
                 older=Hold(_SERVER_0_28, "build_app",
                            reads=("AuthenticationMiddleware", "api_key", "middleware"))),
        ),
    ),
    Seam(
        "endpoint plugin", "server",
        "our routes and the state behind them",
        "never: public",
        (
            Hold("vllm.plugins.endpoint_plugins.interface", "EndpointPlugin.attach_router",
                 takes=("self", "app")),
            Hold("vllm.plugins.endpoint_plugins.interface", "EndpointPlugin.init_state",
                 takes=("self", "engine_client", "state", "args")),
            Hold("vllm.plugins", "load_endpoint_plugins", takes=("supported_tasks",)),
            Hold("vllm.entrypoints.launchers.app", "build_app", stores=("args",),
                 older=Hold(_SERVER_0_28, "build_app", stores=("args",))),
        ),
    ),
    Seam(
        "metrics", "server",
        "GET /metrics shows vLLM's registry and ours",
        "never: public",
        (Hold("vllm.v1.metrics.prometheus", "get_prometheus_registry", takes=()),),
    ),
    Seam(
        "serve command", "command",
        "vLLM's own command, which also starts several API servers",
        "its console script works on CPU builds",
        (
            Hold("vllm.entrypoints.cli.serve", "ServeSubcommand.subparser_init",
                 takes=("self", "subparsers")),
            Hold("vllm.entrypoints.cli.serve", "ServeSubcommand.validate", takes=("self", "args")),
            Hold("vllm.entrypoints.cli.serve", "ServeSubcommand.cmd", takes=("args",)),
            Hold("vllm.utils.argparse_utils", "FlexibleArgumentParser"),
        ),
    ),
)  # fmt: skip
