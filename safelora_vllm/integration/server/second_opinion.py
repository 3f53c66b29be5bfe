"""A second opinion: what the aligned model refuses, no adapter answers.

Each request for an adapter is also given to the aligned model, greedily, for a few tokens. If they refuse,
the aligned model's refusal is served in the adapter's place. Both begin at once: an answer waits only for
what the opinion takes longer. A server does this for all adapters, or for those whose policy says so.

The served answer is a refusal wherever the aligned model's own answer to the same prompt begins as one,
whatever the adapter was trained on. Where it does not, nothing is promised.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from safelora_vllm.errors import Unavailable, UsageError
from safelora_vllm.exam.reference import refuses
from safelora_vllm.integration.server.registry import Registry

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

# Of a caller's sampling parameters, those that the aligned model's answer has too. Not what would force an
# answer on it: a grammar, allowed tokens, biases, a least length.
_KEPT = (
    "n", "max_tokens", "stop", "include_stop_str_in_output", "logprobs", "prompt_logprobs", "detokenize",
    "skip_special_tokens", "spaces_between_special_tokens", "output_kind",
)  # fmt: skip
# Blocks that another server computed: of a prompt that the aligned model would not see.
_ELSEWHERE = {"kv_transfer_params", "ec_transfer_params"}
_REMEMBERED = 4096  # copies that have had no opinion


class SecondOpinion:
    """Stands before an engine client's ``generate``, which every route of vLLM uses.

    Args:
        generate: the engine client's own.
        tokens: of the aligned model's answer that are looked at.
        refused: told the adapter's name where the aligned model refused.
        wanted: whether the requests for an adapter have an opinion. By default all have.
        ends: whether a request is one that ends without, as it began. It has an opinion where it can.
        can_read: whether vLLM gives text, and not tokens alone. Without it no opinion can be had.
    """

    def __init__(
        self,
        generate: Callable[..., Any],
        tokens: int,
        refused: Callable[[str], None],
        wanted: Callable[[LoRARequest], bool] = lambda _: True,
        can_read: bool = True,
        ends: Callable[[LoRARequest], bool] = lambda _: False,
    ) -> None:
        self._given, self._tokens, self._refused = generate, tokens, refused
        self._wanted, self._can_read, self._ends = wanted, can_read, ends
        self._secret = secrets.token_bytes(32)

    def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, *, lora_request: Any = None, **named: Any
    ) -> AsyncGenerator[Any, None]:
        """vLLM's outputs of one request: the adapter's, or the aligned model's where it refuses.

        Raises:
            UsageError: of an adapter, in a form that cannot be asked twice: beam search, streamed input, or
                blocks of another server. Or the prompt leaves no room for the opinion.
            Unavailable: the engine gave no opinion. Nothing is answered then.
        """
        if lora_request is None or not (
            self._wanted(lora_request) and self._has(prompt, sampling_params, lora_request)
        ):
            given: AsyncGenerator[Any, None] = self._given(
                prompt, sampling_params, request_id, lora_request=lora_request, **named
            )
            return given
        return self._judged(prompt, sampling_params, request_id, lora_request, named)

    def _has(self, prompt: Any, params: Any, adapter: LoRARequest) -> bool:
        """Whether a request that is to have an opinion has one: all but those that end without."""
        can = self._can_read and not _why_not(prompt, params)
        return can or not self._ends(adapter)

    async def _judged(
        self, prompt: Any, params: Any, request_id: str, adapter: Any, named: dict[str, Any]
    ) -> AsyncGenerator[Any, None]:
        if not self._can_read:
            raise Unavailable(
                "this adapter is served with a second opinion alone, which needs vLLM's tokenizer: start the "
                "server without --skip-tokenizer-init and --tokens-only"
            )
        if why := _why_not(prompt, params):
            raise UsageError(why)
        alone = {**prompt, "cache_salt": self._salt(adapter.lora_name, prompt.get("cache_salt"))}
        async with (
            aclosing(self._given(prompt, params, request_id, lora_request=adapter, **named)) as own,
            _begun(own) as first,
        ):
            if not await self._refuses(alone, f"{request_id}-opinion", named):
                with contextlib.suppress(StopAsyncIteration):
                    yield await first
                async for output in own:
                    yield output
                return
        self._refused(adapter.lora_name)
        answer = self._given(alone, _unforced(params), f"{request_id}-aligned", lora_request=None, **named)
        async with aclosing(answer):
            async for output in answer:
                yield output

    async def _refuses(self, prompt: Mapping[str, Any], request_id: str, named: Mapping[str, Any]) -> bool:
        """Whether the aligned model's answer begins as a refusal."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=0.0, max_tokens=self._tokens, output_kind=RequestOutputKind.FINAL_ONLY
        )
        urgency = {key: named[key] for key in ("priority", "data_parallel_rank") if key in named}
        last = None
        outputs = self._given(prompt, params, request_id, lora_request=None, **urgency)
        async with aclosing(outputs):
            async for output in outputs:
                last = output
        said = last.outputs[0] if last is not None and last.outputs else None
        if said is None or said.finish_reason not in ("stop", "length"):
            raise Unavailable("the aligned model gave no second opinion: try again later")
        if refuses(said.text):
            return True
        if said.finish_reason == "length" and len(said.token_ids) < self._tokens:
            # The context window cut it short: a refusal of which a word is missing is none.
            raise UsageError(
                f"the prompt leaves no room for a second opinion: leave {self._tokens} tokens of the model's "
                "context free"
            )
        return False

    def _salt(self, adapter: str, given: str | None) -> str:
        """For the aligned model's blocks of the prefix cache: whose prompts they are, other callers would
        learn from the time of their own requests to the model."""
        return hmac.new(self._secret, f"{adapter}\n{given or ''}".encode(), hashlib.sha256).hexdigest()


class ByPolicy:
    """Whether what a request is for has an opinion by its policy; also where it is served no more."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._without = dict[str, None]()  # paths of which requests were answered without, the newest last

    def wanted(self, request: LoRARequest) -> bool:
        """Whether it has."""
        entry = self._registry.get(request.lora_name)
        served = entry.served if entry else None
        if served is None or served.request.lora_path != request.lora_path or served.report.policy.opinion:
            return True
        self._without.pop(request.lora_path, None)
        self._without[request.lora_path] = None
        if len(self._without) > _REMEMBERED:
            del self._without[next(iter(self._without))]
        return False

    def ends(self, request: LoRARequest) -> bool:
        """Whether it is for a copy that had no opinion and was replaced or removed meanwhile.

        A path names one policy. A search with beams, which vLLM asks step by step, ends as it began.
        """
        return request.lora_path in self._without


@contextlib.asynccontextmanager
async def _begun(outputs: AsyncGenerator[Any, None]) -> AsyncIterator[asyncio.Future[Any]]:
    """The first output, on its way. Where the block leaves it there, the request ends."""
    first = asyncio.ensure_future(anext(outputs))
    try:
        yield first
    finally:
        first.cancel()
        await asyncio.wait([first])
        if not first.cancelled():
            first.exception()  # whatever it was, nobody waits for it


def _why_not(prompt: Any, params: Any) -> str:
    """Why one question more would not be the same question; empty where it would."""
    if not isinstance(prompt, Mapping):
        return "an adapter with a second opinion cannot be used with streamed input"
    # A step of beam search: its prompt ends with what the adapter has said already.
    if params.max_tokens == 1 and params.logprobs and not params.detokenize:
        return "an adapter with a second opinion cannot be used with beam search: leave out use_beam_search"
    if not _ELSEWHERE.isdisjoint(params.extra_args or {}):
        return (
            "an adapter with a second opinion cannot be used with blocks of another server: leave out "
            f"{' and '.join(sorted(_ELSEWHERE))}"
        )
    return ""


def _unforced(params: Any) -> Any:
    """Sampling parameters for the aligned model's own answer: greedy, and with nothing forced on it."""
    from vllm import SamplingParams

    # Not temperature 0, with which vLLM refuses n above 1.
    return SamplingParams(temperature=1.0, top_k=1, **{name: getattr(params, name) for name in _KEPT})
