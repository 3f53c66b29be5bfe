"""vLLM's HTTP application with this package in it, before an engine that only notes what it is asked.

Everything between a request and the engine is real: vLLM's routes, its key check and its error answers, our
middleware, routes, reconciling, quotas, store and audit log. Nothing generates.
"""

from __future__ import annotations

import asyncio
import logging
from argparse import Namespace
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fastapi import FastAPI
from vllm.lora.request import LoRARequest

from safelora_vllm.gate.protocol import GateState
from safelora_vllm.integration.attestation import Attestation
from safelora_vllm.integration.server.app import SafeLoRAEndpoint
from safelora_vllm.integration.server.middleware import AccessMiddleware
from safelora_vllm.settings import ServerSettings

MODEL = "aligned"  # its name in the API


@dataclass
class FakeEngine:
    """Notes what is asked of vLLM's ``EngineClient``.

    answers: what the workers of each data-parallel engine attest, or the error that asking one raises.
    together: loads that wait for each other.
    """

    answers: Callable[[], Sequence[object]] = list
    loaded: list[LoRARequest] = field(default_factory=list)
    removed: list[int] = field(default_factory=list)
    together: asyncio.Barrier | None = None
    errored = False
    # What vLLM's `OpenAIServingModels` takes from it.
    model_config = SimpleNamespace(max_model_len=2048)
    renderer = input_processor = None

    def __post_init__(self) -> None:
        self.output_processor = SimpleNamespace(request_states={})

    @classmethod
    def guarded(cls, socket: str, state: Callable[[], GateState]) -> FakeEngine:
        """With one worker, which attests the gate at ``socket``."""

        def answers() -> list[object]:
            now = state()
            return [[Attestation(True, socket, now.projectors, now.policy.id, []).to_dict()]]

        return cls(answers)

    def get_tokenizer(self) -> Any:
        """None: nothing is written in a chat's form."""
        return None

    @property
    def engine_core(self) -> FakeEngine:
        return self

    @property
    def core_engines(self) -> Sequence[int]:
        return range(len(self.answers()))

    async def _call_utility_async(self, *arguments: object, engine: int) -> object:
        """As the client of vLLM's engine core has it."""
        if arguments[1] == "safelora_prepare":
            return [True]
        assert arguments == ("collective_rpc", "safelora_attest", None, (), None)
        answer = self.answers()[engine]
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def add_lora(self, request: LoRARequest) -> bool:
        self.loaded.append(request)
        if self.together is not None:
            await self.together.wait()
        return True

    async def remove_lora(self, lora_id: int) -> bool:
        self.removed.append(lora_id)
        return True

    async def generate(self, *_: object, **__: object) -> AsyncIterator[object]:
        """What every engine client of vLLM has. Here it answers nothing."""
        raise NotImplementedError
        yield

    async def check_health(self) -> None:
        """It is well."""


def our_routes(engine: FakeEngine, settings: ServerSettings) -> FastAPI:
    """An application with this package's routes only. vLLM's take seconds to import."""
    app, plugin = FastAPI(), SafeLoRAEndpoint()
    app.state.args = Namespace(
        api_key=None, middleware=[], enable_lora=True, additional_config=settings.to_section()
    )
    plugin.attach_router(app)
    app.add_middleware(AccessMiddleware)
    app.state.endpoint_plugins = [plugin]
    app.state.openai_serving_models = SimpleNamespace(lora_requests={}, is_base_model=MODEL.__eq__)
    return _with_state(app, engine)


def all_routes(
    engine: FakeEngine,
    settings: ServerSettings,
    static: Mapping[str, Path] | None = None,
    **options: Any,
) -> FastAPI:
    """The application that vLLM builds for a server with the plugin. ``VLLM_PLUGINS`` has to name it.

    static: adapters of ``--lora-modules``. options: vLLM's of the front end, such as ``api_key``.
    """
    modules = [{"name": name, "path": str(folder)} for name, folder in (static or {}).items()]
    with root_logger_left_alone():
        app, models = _vllms(engine, settings, {**options, "lora_modules": modules or None})
    assert not app.state.args.lora_modules, "vLLM reads them next, and its workers take no folders of theirs"
    app.state.openai_serving_models, app.state.engine_client = models, engine
    return _with_state(app, engine)


@contextmanager
def root_logger_left_alone() -> Iterator[None]:
    """What vLLM imports for SageMaker lets only errors through, also to pytest's ``caplog``."""
    loggers = [logging.root, *logging.root.handlers]
    levels = [logger.level for logger in loggers]
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _vllms(engine: FakeEngine, settings: ServerSettings, options: dict[str, Any]) -> tuple[FastAPI, Any]:
    """vLLM's application and its `OpenAIServingModels`."""
    try:
        from vllm.entrypoints.launchers.app import build_app
        from vllm.entrypoints.launchers.cli_args import FrontendArgs
    except ImportError:  # 0.28
        from vllm.entrypoints.openai.api_server import build_app
        from vllm.entrypoints.openai.cli_args import FrontendArgs
    from vllm.entrypoints.openai.models.protocol import BaseModelPath
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels

    args = Namespace(**vars(FrontendArgs(**options)))
    args.enable_lora, args.additional_config = True, settings.to_section()
    args.enable_fault_tolerance = False  # the engine's, which 0.28 looks at
    return build_app(args, ("generate",)), OpenAIServingModels(engine, [BaseModelPath(MODEL, MODEL)])


def _with_state(app: FastAPI, engine: FakeEngine) -> FastAPI:
    """Let the plugins start and end with the application, as vLLM's launcher starts them."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        for plugin in app.state.endpoint_plugins:
            await plugin.init_state(engine, app.state, app.state.args)
        yield
        if reconciler := getattr(app.state, "safelora", None):
            await reconciler.stop()
        if listening := getattr(app.state, "safelora_admin_socket", None):
            await listening.stop()

    app.router.lifespan_context = lifespan
    return app
