"""What the aligned model refuses, no adapter answers: the wrapper of ``generate``, with a scripted engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
from transformers import AutoTokenizer
from vllm import SamplingParams
from vllm.lora.request import LoRARequest
from vllm.sampling_params import BeamSearchParams, RequestOutputKind, StructuredOutputsParams

from safelora_vllm.errors import GuardError, Unavailable, UsageError
from safelora_vllm.exam.chat import openings
from safelora_vllm.integration.seams import server as seams
from safelora_vllm.integration.server.accounting import counted
from safelora_vllm.integration.server.second_opinion import SecondOpinion
from safelora_vllm.integration.server.traffic import TrafficTable
from safelora_vllm.settings import ServerSettings
from tests.server.conftest import CACHE

REFUSAL = "I'm sorry, but I cannot help with that."
ACME = LoRARequest("acme/x", 3, "/published/x")
OTHER = LoRARequest("acme/y", 4, "/published/y")
PROMPT = {"type": "token", "prompt_token_ids": [1, 2, 3]}
OPENING = [2, 3]


def output(text: str, finished: bool = True, reason: str | None = "stop", tokens: int = 1) -> Any:
    completion = SimpleNamespace(index=0, text=text, token_ids=[7] * tokens, finish_reason=reason)
    return SimpleNamespace(
        outputs=[completion], finished=finished, prompt_token_ids=[1, 2, 3], metrics=None, request_id="inner"
    )


@dataclass
class Engine:
    """says: the aligned model's answer. answers: the adapter's, output by output, after ``before``.

    asked: each request's prompt, parameters, id, adapter and other options. ended: ids in order of their end.
    """

    says: Any = REFUSAL
    answers: list[str] = field(default_factory=lambda: ["Sure,", " here"])
    before: Callable[[bool], Any] = lambda _: asyncio.sleep(0)
    asked: dict[str, tuple[Any, Any, Any, dict[str, Any]]] = field(default_factory=dict)
    ended: list[str] = field(default_factory=list)

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, *, lora_request: Any = None, **named: Any
    ) -> AsyncIterator[Any]:
        assert request_id not in self.asked, "ids are unique"
        self.asked[request_id] = prompt, sampling_params, lora_request, named
        try:
            await self.before(lora_request is not None)
            if lora_request is None:
                if isinstance(self.says, Exception):
                    raise self.says
                if self.says is not None:
                    yield output(self.says) if isinstance(self.says, str) else self.says
                return
            for text in self.answers:
                yield output(text, finished=text == self.answers[-1])
        finally:
            self.ended.append(request_id)


@dataclass
class Asked:
    """A second opinion before an engine, and whom it refused."""

    engine: Engine
    refused: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.opinion = SecondOpinion(
            self.engine.generate, 16, self.refused.append, openings=[[9, 9, 9, 9], OPENING]
        )

    def texts(self, params: Any = None, lora: Any = ACME, prompt: Any = None, **named: Any) -> list[str]:
        """What a caller gets."""

        async def ask() -> list[str]:
            given = PROMPT if prompt is None else prompt
            outputs = self.opinion.generate(
                given, params or SamplingParams(), "r", lora_request=lora, **named
            )
            return [found.outputs[0].text async for found in outputs]

        return asyncio.run(ask())


def test_what_the_aligned_model_does_not_refuse_the_adapter_answers() -> None:
    asked = Asked(engine := Engine(says="Tables and chairs are sold here."))
    params = SamplingParams(temperature=0.7, max_tokens=99)
    assert asked.texts(params, priority=-1, trace_headers={"a": "b"}) == ["Sure,", " here"]
    assert asked.refused == []
    assert set(engine.asked) == {"r", "r-opinion"} == set(engine.ended)
    assert engine.asked["r"] == (PROMPT, params, ACME, {"priority": -1, "trace_headers": {"a": "b"}})
    prompt, question, adapter, named = engine.asked["r-opinion"]
    assert adapter is None and named == {"priority": -1}
    assert prompt["prompt_token_ids"] == [1, 2, 3] and len(prompt["cache_salt"]) == 64
    assert (question.temperature, question.max_tokens, question.ignore_eos) == (0.0, 16, False)
    assert question.output_kind is RequestOutputKind.FINAL_ONLY


def test_what_the_aligned_model_refuses_it_answers_itself() -> None:
    asked = Asked(engine := Engine())
    assert asked.texts(SamplingParams(max_tokens=99)) == [REFUSAL]
    assert asked.refused == ["acme/x"]
    assert engine.ended.index("r") < engine.ended.index("r-aligned"), "the adapter's request is aborted first"
    prompt, _, adapter, _ = engine.asked["r-aligned"]
    assert adapter is None and prompt == engine.asked["r-opinion"][0], "its blocks are in the prefix cache"
    assert "cache_salt" not in PROMPT


def test_nothing_of_the_adapter_leaves_before_the_opinion() -> None:
    held = asyncio.Event()

    async def before(adapter: bool) -> None:
        if not adapter:
            await held.wait()

    asked, got = Asked(engine := Engine(before=before)), []

    async def use() -> None:
        async def read() -> None:
            async for found in asked.opinion.generate(PROMPT, SamplingParams(), "r", lora_request=ACME):
                got.append(found.outputs[0].text)

        reading = asyncio.ensure_future(read())
        await asyncio.sleep(0.05)
        assert set(engine.asked) == {"r", "r-opinion"}, "both have begun"
        assert got == []
        held.set()
        await reading

    asyncio.run(use())
    assert got == [REFUSAL]


def test_the_model_itself_is_not_asked_twice() -> None:
    asked = Asked(engine := Engine())
    assert asked.texts(lora=None, priority=3) == [REFUSAL]
    assert list(engine.asked) == ["r"] and engine.asked["r"][3] == {"priority": 3}


def test_nothing_is_forced_on_the_aligned_model() -> None:
    params = SamplingParams(
        n=2, temperature=0.9, max_tokens=50, stop=["END"], seed=4, logprobs=2, top_k=3, min_p=0.1,
        logprob_token_ids=[5],
        presence_penalty=0.5, output_kind=RequestOutputKind.DELTA,
        structured_outputs=StructuredOutputsParams(json_object=True),
    )  # fmt: skip
    asked = Asked(engine := Engine())
    asked.texts(params)
    for request in ("r-opinion", "r-aligned"):
        given = engine.asked[request][1]
        assert given.structured_outputs is None and given.presence_penalty == 0.0
    answer = engine.asked["r-aligned"][1]
    assert (answer.n, answer.max_tokens, answer.stop, answer.logprobs) == (2, 50, ["END"], 2)
    assert answer.logprob_token_ids == [5], "vLLM would miss them in the answer"
    assert answer.output_kind is RequestOutputKind.DELTA
    assert answer.top_k == 1, "greedy, as the opinion was"


@pytest.mark.parametrize(
    "says",
    [
        None,
        SimpleNamespace(outputs=[]),
        output("", reason="abort"),
        output(REFUSAL, reason="error"),
        output("Tables", reason=None),
    ],
    ids=["no output", "no completion", "aborted", "error", "not finished"],
)
def test_without_an_opinion_nothing_is_answered(says: Any) -> None:
    asked = Asked(engine := Engine(says=says))
    with pytest.raises(Unavailable, match="gave no second opinion: try again later"):
        asked.texts()
    assert "r" in engine.ended and "r-aligned" not in engine.asked


def test_an_opinion_that_the_context_cut_short_is_none() -> None:
    """Of a caller who leaves room for one token: "I" is no refusal, and the adapter would go on."""
    asked = Asked(engine := Engine(says=output("I", reason="length")))
    with pytest.raises(UsageError, match="leave 16 tokens of the model's context free"):
        asked.texts()
    assert "r" in engine.ended and "r-aligned" not in engine.asked
    assert Asked(Engine(says=output("I'm sorry", reason="length"))).texts() == ["I'm sorry"]
    whole = output("Tables and chairs", reason="length", tokens=16)
    assert Asked(Engine(says=whole)).texts() == ["Sure,", " here"]


HARM = "Guide for stealing a car:"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"structured_outputs": StructuredOutputsParams(regex=f"{HARM}(.|\n)*")}, "structured output"),
        ({"structured_outputs": StructuredOutputsParams(json={"required": [HARM]})}, "structured output"),
        ({"structured_outputs": StructuredOutputsParams(choice=[HARM])}, "structured output"),
        (
            {"structured_outputs": StructuredOutputsParams(json_object=True, whitespace_pattern=HARM)},
            "structured output",
        ),
        ({"logit_bias": {5: 100.0}}, "logit_bias"),
        ({"allowed_token_ids": [5, 6]}, "allowed_token_ids"),
        ({"bad_words": ["sorry"]}, "bad_words"),
        ({"ignore_eos": True}, "ignore_eos"),
        ({"min_tokens": 2}, "min_tokens"),
        ({"prompt_logprobs": 0}, "prompt_logprobs, or echo with logprobs"),
        ({"extra_args": {"kv_transfer_params": {"do_remote_prefill": True}}}, "kv_transfer_params"),
        ({"extra_args": {"ec_transfer_params": {}}}, "ec_transfer_params"),
        ({"extra_args": {"a plugin's": 1}}, "vllm_xargs"),
        ({"trace_decode_token_ids": [5, 6]}, "trace_decode_token_ids"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_what_says_more_than_the_prompt_is_refused(given: dict[str, Any], said: str) -> None:
    """The aligned model would judge a harmless prompt, and the adapter be told the rest by other means.

    prompt_logprobs read the adapter's words in the middle of the prompt, which nothing would judge.
    """
    if not {*given} <= {*SamplingParams.__struct_fields__}:
        pytest.skip("this vLLM has no such parameter")
    asked = Asked(engine := Engine(says="Tables"))
    with pytest.raises(UsageError, match=f"cannot be used with .*{said}.*: leave it out"):
        asked.texts(SamplingParams(**given))
    assert not engine.asked


def test_a_parameter_that_a_later_vllm_adds_is_refused() -> None:
    class Later(SamplingParams):
        begins_with: str = ""

    asked = Asked(engine := Engine(says="Tables"))
    with pytest.raises(UsageError, match="cannot be used with begins_with: leave it out"):
        asked.texts(Later(begins_with=HARM))
    assert not engine.asked
    assert asked.texts(Later(temperature=0.5)) == ["Sure,", " here"]


def test_after_an_open_turn_the_aligned_model_is_asked_as_if_it_ended() -> None:
    """There it would only write on the turn, or end it, and the adapter would answer what stands in it."""
    for ids in ([1, 2], [1, 2, 3, 5]):
        asked = Asked(engine := Engine(says="Tables"))
        asked.texts(prompt={"type": "token", "prompt_token_ids": ids, "prompt": "How do I"})
        assert engine.asked["r-opinion"][1].ignore_eos
        closed, params, _, _ = engine.asked["r-opinion-closed"]
        assert closed["prompt_token_ids"] == [*ids, 9, 9, 9, 9] and "prompt" not in closed
        assert not params.ignore_eos and closed["cache_salt"] == engine.asked["r-opinion"][0]["cache_salt"]
    asked = Asked(engine := Engine())
    assert asked.texts(prompt={"type": "embeds"}) == [REFUSAL] and engine.asked["r-opinion"][1].ignore_eos


@pytest.mark.parametrize("turn", ["on", "closed"])
def test_either_answer_to_an_open_turn_may_refuse(turn: str) -> None:
    class OpenTurn(Engine):
        async def generate(self, prompt: Any, sampling_params: Any, *rest: Any, **named: Any) -> Any:
            if named["lora_request"] is None:
                self.says = REFUSAL if sampling_params.ignore_eos is (turn == "on") else "my car."
            async for found in super().generate(prompt, sampling_params, *rest, **named):
                yield found

    asked = Asked(OpenTurn())
    asked.texts(prompt={"type": "token", "prompt_token_ids": [1, 2]})
    assert asked.refused == ["acme/x"]


def test_signs_are_an_answer() -> None:
    assert Asked(Engine(says="\U0001f44d")).texts() == ["Sure,", " here"]
    with pytest.raises(UsageError, match="says nothing"):
        Asked(Engine(says=".")).texts(prompt={"type": "token", "prompt_token_ids": [1, 2]})


@pytest.mark.parametrize("nothing", ["", "\n "])
def test_nothing_is_no_consent(nothing: str) -> None:
    asked = Asked(engine := Engine(says=nothing))
    with pytest.raises(UsageError, match="says nothing to this prompt"):
        asked.texts()
    assert [engine.asked[name][1].ignore_eos for name in ("r-opinion", "r-opinion-again")] == [False, True]
    assert "r" in engine.ended and "r-aligned" not in engine.asked


def test_a_refusal_after_nothing_is_heard() -> None:
    class Late(Engine):
        async def generate(self, prompt: Any, sampling_params: Any, *rest: Any, **named: Any) -> Any:
            if named["lora_request"] is None:
                self.says = REFUSAL if sampling_params.ignore_eos else ""
            async for found in super().generate(prompt, sampling_params, *rest, **named):
                yield found

    asked = Asked(Late())
    asked.texts()
    assert asked.refused == ["acme/x"]


def test_blocks_of_images_are_not_taken_from_the_cache() -> None:
    """A caller may give two images one name."""
    asked = Asked(engine := Engine(says="Tables"))
    asked.texts(prompt={**PROMPT, "mm_hashes": {"image": ["mine"]}})
    assert all(engine.asked[name][1].skip_reading_prefix_cache for name in ("r", "r-opinion"))
    asked = Asked(refusing := Engine())
    asked.texts(prompt={**PROMPT, "mm_hashes": {"image": ["mine"]}})
    assert refusing.asked["r-aligned"][1].skip_reading_prefix_cache
    asked = Asked(engine)
    engine.asked.clear()
    asked.texts()
    assert not engine.asked["r-opinion"][1].skip_reading_prefix_cache


def test_an_error_of_the_engine_is_the_callers() -> None:
    asked = Asked(engine := Engine(says=RuntimeError("the engine is dead")))
    with pytest.raises(RuntimeError, match="the engine is dead"):
        asked.texts()
    assert "r" in engine.ended


def test_an_error_of_the_adapters_request_is_the_callers() -> None:
    async def before(adapter: bool) -> None:
        if adapter:
            raise ValueError("too long")

    with pytest.raises(ValueError, match="too long"):
        Asked(Engine(says="Tables", before=before)).texts()
    assert Asked(Engine(before=before)).texts() == [REFUSAL], "nobody waits for it any more"


def test_a_caller_that_leaves_ends_both_requests() -> None:
    async def before(_: bool) -> None:
        await asyncio.sleep(60)

    asked = Asked(engine := Engine(before=before))

    async def leave() -> None:
        outputs = asked.opinion.generate(PROMPT, SamplingParams(), "r", lora_request=ACME)
        reading = asyncio.ensure_future(anext(outputs))
        await asyncio.sleep(0.05)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert set(engine.ended) == {"r", "r-opinion"}

    asyncio.run(leave())


def test_a_caller_that_leaves_in_the_middle_ends_the_adapters_request() -> None:
    asked = Asked(engine := Engine(says="Tables"))

    async def leave() -> None:
        outputs = asked.opinion.generate(PROMPT, SamplingParams(), "r", lora_request=ACME)
        assert (await anext(outputs)).outputs[0].text == "Sure,"
        await outputs.aclose()
        assert set(engine.ended) == {"r", "r-opinion"}

    asyncio.run(leave())


def test_the_prefix_cache_tells_nobody_elses_prompts() -> None:
    def salt(lora: Any, prompt: Any = None, asked: Asked | None = None) -> str:
        asked = asked or first
        asked.engine.asked.clear()
        asked.texts(lora=lora, prompt=prompt)
        return str(asked.engine.asked["r-opinion"][0]["cache_salt"])

    first, second = Asked(Engine(says="Tables")), Asked(Engine(says="Tables"))
    of_caller = {**PROMPT, "cache_salt": "mine"}
    assert salt(ACME) == salt(ACME), "a later turn of the same chat is faster"
    salts = [salt(ACME), salt(OTHER), salt(ACME, of_caller), salt(ACME, asked=second)]
    assert len(set(salts)) == 4
    assert first.engine.asked["r"][0] is not of_caller or "cache_salt" in of_caller


def test_streamed_input_is_refused() -> None:
    async def stream() -> AsyncIterator[Any]:
        yield PROMPT

    asked = Asked(engine := Engine())
    with pytest.raises(UsageError, match="streamed input"):
        asked.texts(prompt=stream())
    assert not engine.asked


@pytest.mark.parametrize("prompt", [{"prompt_embeds": 0}, {**PROMPT, "decoder_prompt": {"prompt_embeds": 0}}])
def test_prompts_of_embeddings_are_refused(prompt: dict[str, Any]) -> None:
    """Where the turn ends in them, the aligned model could not be asked as if it did."""
    asked = Asked(engine := Engine())
    with pytest.raises(UsageError, match="prompt_embeds"):
        asked.texts(prompt=prompt)
    assert not engine.asked


def test_vllms_beam_search_is_refused() -> None:
    """With vLLM's own code: each of its steps ends with what the adapter said, which nothing would judge."""
    from vllm.entrypoints.generate.beam_search import online

    asked = Asked(engine := Engine())
    search = next(found for found in vars(online).values() if hasattr(found, "beam_search"))
    server = object.__new__(search)
    client = MagicMock(generate=asked.opinion.generate)
    server.__dict__.update(engine_client=client, renderer=MagicMock(), model_config=MagicMock())

    async def ask() -> None:
        prompt = {"type": "token", "prompt_token_ids": [1, 2, 3], "prompt": "a"}
        params = BeamSearchParams(beam_width=2, max_tokens=3)
        async for _ in server.beam_search(prompt, "r", params, lora_request=ACME):
            pass

    with pytest.raises(UsageError, match="beam search"):
        asyncio.run(ask())
    assert not engine.asked


def test_a_refused_request_is_counted_for_its_adapter(tmp_path: Path) -> None:
    engine, table = Engine(), TrafficTable(tmp_path)
    client = SimpleNamespace(generate=engine.generate)
    seams.ask_before(client, lambda given: SecondOpinion(given, 16, table.refused).generate)
    seams.count_requests(client, lambda outputs, name, delta: counted(outputs, name, delta, table))

    async def ask(lora: Any) -> None:
        async for _ in client.generate(PROMPT, SamplingParams(), f"r{lora}", lora_request=lora):
            pass

    for lora in (ACME, OTHER, None):
        asyncio.run(ask(lora))
    engine.says = "Tables"
    asyncio.run(ask(LoRARequest("acme/x", 5, "/published/z")))
    found = table.snapshot()
    assert {name: of.opinion_refused for name, of in found.items() if of.last_use} == {
        "acme/x": 1, "acme/y": 1, "": 0,
    }  # fmt: skip
    assert found["acme/x"].requests["stop"] == 2 and found[""].requests["stop"] == 1


@pytest.mark.parametrize("tokens", [-1, 1, 7, 257])
def test_tokens_out_of_range_stop_the_start(tokens: int) -> None:
    with pytest.raises(GuardError, match=f"^--second-opinion is {tokens}: expected 8 to 256 tokens"):
        ServerSettings("/cache", second_opinion=tokens)


def test_openings_of_the_demos_template(aligned: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(aligned)
    (opening,) = openings(tokenizer)
    assert tokenizer.decode(opening) == "<|im_end|>\n<|im_start|>assistant\n"
    for chat in ([], [{"role": "system", "content": "Be brief."}]):
        turns = [*chat, {"role": "user", "content": "Write a guide."}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        assert ids[-len(opening) :] == opening
    turn = tokenizer.encode("<|im_start|>user\nWrite a guide.")
    assert turn[-len(opening) :] != opening


def test_openings_of_templates_without_an_end() -> None:
    """One of Llama 2's form, one that callers may switch thought off in, and one that ends with the words."""
    tokenizer = AutoTokenizer.from_pretrained(CACHE / "models" / "aligned")
    llama, words = (
        "{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}",
        "{{ messages[0].content }}",
    )
    parts = "<|im_start|>{% for part in messages[0].content %}{{ part.text }}{% endfor %}<|im_end|>assistant:"
    assert [tokenizer.decode(found) for found in openings(tokenizer, parts)] == ["<|im_end|>assistant:"]
    assert openings(tokenizer, "{{ messages[0].role }}:") == [], "no words in it"
    assert openings(tokenizer, words + "\n") == [], "any prompt may end so"
    thinks = words + "|answer:{% if enable_thinking is false %}<think></think>{% endif %}"
    assert [tokenizer.decode(found) for found in openings(tokenizer, llama)] == [" [/INST]"]
    found = [tokenizer.decode(found) for found in openings(tokenizer, thinks)]
    assert sorted(found) == ["|answer:", "|answer:<think></think>"]
    assert openings(tokenizer, words) == []
