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
import copy
import hashlib
import hmac
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from safelora_vllm.errors import Unavailable, UsageError
from safelora_vllm.exam.reference import refuses
from safelora_vllm.integration.server.registry import Registry

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

# Of a caller's sampling parameters, those that the aligned model's answer has too.
_KEPT = (
    "n", "max_tokens", "stop", "include_stop_str_in_output", "logprobs", "logprob_token_ids", "flat_logprobs",
    "detokenize", "skip_special_tokens", "spaces_between_special_tokens", "output_kind",
)  # fmt: skip
# What else a caller may set. Any other parameter may say to the adapter what the prompt does not: what an
# answer has to begin with (a grammar, biases, banned words), that it goes on where it would end, or blocks
# of another prompt. Or it gives the adapter's words in the middle of the prompt (prompt_logprobs).
_TAKEN = {
    *_KEPT, "presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "watermarking",
    "top_p", "top_k", "min_p", "seed", "stop_token_ids", "stream_interval", "skip_clone",
    "output_text_buffer_length", "skip_reading_prefix_cache", "thinking_token_budget", "repetition_detection",
    "routed_experts_prompt_start",
}  # fmt: skip
# How callers know what they gave, where it is not by its own name.
_CALLERS_WORDS = {
    "structured_outputs": "structured output other than a JSON object: a json_schema, regex, choice or "
    "grammar, a tool_choice that names or requires a tool, strict tools, or parallel_tool_calls false",
    "prompt_logprobs": "prompt_logprobs, or echo with logprobs",
    "extra_args": "vllm_xargs, kv_transfer_params or ec_transfer_params",
}
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
        openings: the tokens before an answer, see `safelora_vllm.exam.chat.openings`. After any other
            prompt the aligned model may write on somebody's turn, or end it. So it is asked twice there:
            to write on to the last of the tokens, and to answer as if the turn ended.
    """

    def __init__(
        self,
        generate: Callable[..., Any],
        tokens: int,
        refused: Callable[[str], None],
        wanted: Callable[[LoRARequest], bool] = lambda _: True,
        can_read: bool = True,
        ends: Callable[[LoRARequest], bool] = lambda _: False,
        openings: Sequence[Sequence[int]] = (),
    ) -> None:
        self._given, self._tokens, self._refused = generate, tokens, refused
        self._openings = [list(opening) for opening in openings if opening]
        self._wanted, self._can_read, self._ends = wanted, can_read, ends
        self._secret = secrets.token_bytes(32)

    def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, *, lora_request: Any = None, **named: Any
    ) -> AsyncGenerator[Any, None]:
        """vLLM's outputs of one request: the adapter's, or the aligned model's where it refuses.

        Raises:
            UsageError: of an adapter, in a form that cannot be asked twice: beam search, streamed input, or
                parameters that say more than the prompt. Or the prompt leaves no room for the opinion, or
                the aligned model says nothing to it.
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
        if fresh := _names_images(prompt):
            params = copy.copy(params)
            params.skip_reading_prefix_cache = True
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
        unforced = _unforced(params, fresh)
        answer = self._given(alone, unforced, f"{request_id}-aligned", lora_request=None, **named)
        async with aclosing(answer):
            async for output in answer:
                yield output

    async def _refuses(self, prompt: Mapping[str, Any], request_id: str, named: Mapping[str, Any]) -> bool:
        """Whether the aligned model's answer begins as a refusal."""
        ids = prompt.get("prompt_token_ids")
        begins = any(list((ids or ())[-len(opening) :]) == opening for opening in self._openings)
        if begins:
            text = await self._said(prompt, request_id, named, goes_on=False)
            if text.strip():
                return refuses(text)
            request_id += "-again"
        text = await self._said(prompt, request_id, named, goes_on=True)
        if not refuses(text) and ids and self._openings and not begins:
            asked = {**prompt, "prompt_token_ids": [*ids, *self._openings[0]]}
            asked.pop("prompt", None)  # the same in words
            text = await self._said(asked, f"{request_id}-closed", named, goes_on=False)
        if not any(letter.isalnum() for letter in text):
            raise UsageError(
                "the aligned model says nothing to this prompt, so that this adapter has no second opinion: "
                "end the prompt where an answer begins, as a chat does"
            )
        return refuses(text)

    async def _said(
        self, prompt: Mapping[str, Any], request_id: str, named: Mapping[str, Any], goes_on: bool
    ) -> str:
        """The first tokens of the aligned model's answer. goes_on: also where it ends a turn before."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=0.0,
            max_tokens=self._tokens,
            output_kind=RequestOutputKind.FINAL_ONLY,
            ignore_eos=goes_on,
            skip_reading_prefix_cache=_names_images(prompt) or None,
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
        cut_short = said.finish_reason == "length" and len(said.token_ids) < self._tokens
        if cut_short and not refuses(said.text):
            # By the context window: a refusal of which a word is missing is none.
            raise UsageError(
                f"the prompt leaves no room for a second opinion: leave {self._tokens} tokens of the model's "
                "context free"
            )
        return str(said.text)

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
    if any("prompt_embeds" in part for part in (prompt, prompt.get("decoder_prompt") or {})):
        # The question as if the turn ended cannot be put: it needs the prompt's tokens.
        return "an adapter with a second opinion cannot be used with prompt_embeds: send text or tokens"
    # A step of beam search: its prompt ends with what the adapter has said already.
    if params.max_tokens == 1 and params.logprobs and not params.detokenize:
        return "an adapter with a second opinion cannot be used with beam search: leave out use_beam_search"
    if more := [_CALLERS_WORDS.get(name, name) for name in _set(params) if name not in _TAKEN]:
        return f"an adapter with a second opinion cannot be used with {'; '.join(more)}: leave it out"
    return ""


def _set(params: Any) -> list[str]:
    """The sampling parameters that have another value than vLLM's own."""
    usual = type(params)()
    names = [name for name in params.__struct_fields__ if not name.startswith("_")]
    return [name for name in names if _differs(getattr(params, name), getattr(usual, name))]


def _differs(value: Any, usual: Any) -> bool:
    if value is None or (isinstance(value, (list, dict, str)) and not value):
        return False
    if getattr(value, "json_object", None) and not getattr(value, "whitespace_pattern", None):
        return False  # a structured output without words of the caller
    return usual is None or bool(value != usual)


def _names_images(prompt: Mapping[str, Any]) -> bool:
    """Whether blocks of the prefix cache may be of another prompt: callers name images as they like."""
    return bool((prompt.get("decoder_prompt") or prompt).get("mm_hashes"))


def _unforced(params: Any, fresh: bool) -> Any:
    """Sampling parameters for the aligned model's own answer: greedy, and with nothing forced on it.

    fresh: whether it reads no blocks of the prefix cache.
    """
    from vllm import SamplingParams

    kept = {name: getattr(params, name) for name in _KEPT if hasattr(params, name)}
    # Not temperature 0, with which vLLM refuses n above 1.
    return SamplingParams(temperature=1.0, top_k=1, skip_reading_prefix_cache=fresh or None, **kept)
