"""Tensor, data and pipeline parallel engines: every rank is guarded and holds its share of what was vetted.

On two cores, with a small random Llama. Pipeline stages only load here: vanilla vLLM 0.32 starts two of
them on CPUs, but its engine ends at the first request, with or without the guard. So none generates.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from safetensors.torch import load_file, save_file
from server import ADMIN_KEY, guarded, running

from safelora_vllm.integration.attestation import Attestation
from safelora_vllm.integration.server.metrics import Known, expose
from safelora_vllm.integration.server.traffic import OUTCOMES
from tests.server import slots
from tests.server.conftest import UNI, client, metric_samples, samples_of, say, upload
from tests.server.slots import Adapter, Engine
from tests.server.small_models import Pair, make_adapter, make_pair

TWO_CORES = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
RANKS = (0, 1)
CHOSEN = 5  # of 14 modules are projected, so that both decisions have to be right on each rank
ADAPTERS: dict[str, dict[str, Any]] = {
    "wide": {"r": 4, "lora_alpha": 8, "rank_pattern": {"v_proj": 8}, "alpha_pattern": {"up_proj": 2}},
    "narrow": {"r": 2, "lora_alpha": 2, "target_modules": ["k_proj", "o_proj", "up_proj"]},
    "late": {"r": 8, "lora_alpha": 4, "use_rslora": True},
}
REQUESTS = 32
BODY: dict[str, Any] = {
    "model": "wide", "prompt": "The capital of France is", "max_tokens": 8, "temperature": 0,
    "ignore_eos": True,
}  # fmt: skip
TOLERANCE = slots.TOLERANCE[torch.float32]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def made(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Adapter]:
    """The adapters, and one with a NaN."""
    root = tmp_path_factory.mktemp("parallel-adapters")
    made = {
        name: make_adapter(root / name, pair.weights, pair.aligned, seed, **case)
        for seed, (name, case) in enumerate({**ADAPTERS, "bad": ADAPTERS["narrow"]}.items())
    }
    weights = load_file(root / "bad" / "adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] = float("nan")
    save_file(weights, root / "bad" / "adapter_model.safetensors")
    return made


class Steps:
    """Steps of an engine, by name, and after `run` their answers by the same names."""

    def __init__(self, engine: Engine, root: Path, made: dict[str, Adapter]) -> None:
        self.engine, self.root, self.made = engine, root, made
        self._places: dict[str, int] = {}
        self._answers: list[Any] = []

    def add(self, name: str, *step: Any) -> None:
        """A step whose answer is wanted."""
        assert name not in self._places
        self._places[name] = self.engine.add(*step)

    def load(self, name: str, adapter: str) -> None:
        """Load an adapter by request."""
        self.add(name, "load", *self.request(adapter))

    def read(self, name: str, adapter: str) -> None:
        """Read an adapter's slots on all ranks."""
        self.add(name, "slots", self.request(adapter)[1], str(self.root / name))

    def request(self, adapter: str) -> tuple[str, int, str]:
        """Name, id and path for vLLM."""
        return adapter, list(self.made).index(adapter) + 1, str(self.made[adapter].folder)

    def run(self, env: dict[str, str]) -> None:
        (self._answers,) = slots.run([self.engine], self.root, env, seconds=300)

    def __getitem__(self, name: str) -> Any:
        return self._answers[self._places[name]]

    @property
    def log(self) -> str:
        return (self.root / "engine.log").read_text(errors="replace")

    @property
    def store(self) -> Path:
        return self.root / "store"


@pytest.fixture(scope="module")
def tensor(pair: Pair, made: dict[str, Adapter], tmp_path_factory: pytest.TempPathFactory) -> Steps:
    """Two ranks that share each layer, and all that is asked of them."""
    root = tmp_path_factory.mktemp("tensor")
    policy = {"method": "safe-lora", "select": "number", "number": CHOSEN}
    options = slots.options(
        pair.projectors,
        root / "store",
        policy,
        tensor_parallel_size=2,
        max_loras=2,
        dtype="float32",
        max_lora_rank=8,
    )
    steps = Steps(Engine(str(pair.aligned), options), root, made)
    steps.add("attested", "rpc", "safelora_attest")
    for name in ("wide", "narrow"):
        steps.load(name, name)
    for name in ("wide", "narrow"):  # both are in the pool
        steps.read(f"{name} slots", name)
    steps.add("metrics", "gate", "metrics")
    steps.add("counted", "rpc", "safelora_attest")
    steps.add("said", "say", *steps.request("wide"))
    steps.load("refused", "bad")
    steps.add("attested after a refusal", "rpc", "safelora_attest")
    for rank in RANKS:
        steps.add(f"break {rank}", "rpc", "break_store", rank, True)
        steps.load(f"failed on {rank}", "late")
        steps.add(f"attested after {rank}", "rpc", "safelora_attest")
        steps.add(f"pools after {rank}", "rpc", "list_loras")
        steps.add(f"mend {rank}", "rpc", "break_store", rank, False)
    steps.add("said after", "say", *steps.request("wide"))
    steps.load("late", "late")
    steps.read("late slots", "late")
    steps.add("removed", "rpc", "remove_lora", steps.request("late")[1])
    steps.add("break in a step", "rpc", "break_store", 1, True)
    steps.add("said in a step", "say", *steps.request("late"))
    steps.add("attested after a step", "rpc", "safelora_attest")
    steps.run(TWO_CORES)
    return steps


def check_slots(steps: Steps, pair: Pair, name: str, adapter: str) -> None:
    """Each rank's share, against the published copy and against the float64 projection."""
    original, weights = steps.made[adapter], pair.weights
    chosen = slots.least_similar(original, weights, CHOSEN)
    published = slots.published(steps.store, original.folder)
    assert [answer["rank"] for answer in steps[name]] == list(RANKS)
    for rank in RANKS:
        found = slots.read(steps.root / name, rank)
        assert slots.from_published(found, published, rank, 2) == 0.0
        assert slots.from_projection(found, original, weights, rank, 2, chosen) < TOLERANCE
        assert steps[name][rank]["elsewhere"] == 0.0


def guarded_ranks(answers: Any) -> bool:
    """Both ranks attest the same rules."""
    rules = {(answer["projectors"], answer["policy"]) for answer in answers}
    return len(answers) == 2 and len(rules) == 1 and all(answer["guarded"] for answer in answers)


def test_both_ranks_attest(tensor: Steps) -> None:
    assert guarded_ranks(tensor["attested"])
    assert len({answer["socket"] for answer in tensor["attested"]}) == 1, "one gate"


@pytest.mark.parametrize("name", ["wide", "narrow"])
def test_each_rank_holds_its_share(tensor: Steps, pair: Pair, name: str) -> None:
    assert tensor[name] is True
    check_slots(tensor, pair, f"{name} slots", name)


def test_projection_is_done_once_for_all_ranks(tensor: Steps) -> None:
    counts = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(tensor["metrics"])
        for sample in family.samples
    }
    assert counts["safelora_gate_cache_total", "miss"] == 2, "one for each of two adapters"
    assert counts["safelora_gate_cache_total", "hit"] == 2, "the other rank's question"
    assert counts["safelora_stage_seconds_count", "project"] == 2
    assert tensor.log.count("starting the gate") == 1
    # The two that were read then, and the one that was loaded later.
    assert len(list((tensor.store / "published").iterdir())) == 3


def test_the_ranks_of_an_engine_count_once(tensor: Steps) -> None:
    """Requests and tokens are counted where they arrive, which knows no ranks."""
    ranks = Attestation.from_answers(tensor["counted"])
    known = Known(workers={"guarded": len(ranks)}, pools=[rank.pool for rank in ranks])
    samples = samples_of(expose(known))
    assert samples["safelora_workers", frozenset({("state", "guarded")})] == 2
    engine = ("engine", "0")
    assert samples["safelora_lora_loads_total", frozenset({engine, ("when", "request")})] == 2
    assert samples["safelora_lora_loads_total", frozenset({engine, ("when", "step")})] == 0
    assert samples["safelora_lora_adapter_load_seconds_count", frozenset({engine})] == 2
    assert samples["safelora_num_gpu_loaded_lora_adapters", frozenset({engine})] == 2
    assert samples["safelora_max_gpu_lora_adapters", frozenset({engine})] == 2
    assert {dict(labels)["engine"] for _, labels in samples if "engine" in dict(labels)} == {"0"}
    after = Attestation.from_answers(tensor["attested after a step"])
    assert [rank.pool.failed_steps for rank in after] == [0, 1]


def test_a_refused_adapter_costs_nobody_else(tensor: Steps) -> None:
    """vLLM's own way leaves an answer unread, which the next question gets."""
    assert "non_finite" in tensor["refused"]["error"]
    assert guarded_ranks(tensor["attested after a refusal"])


@pytest.mark.parametrize("rank", RANKS)
def test_a_rank_that_cannot_load(tensor: Steps, rank: int) -> None:
    """Neither a deadlock nor half an adapter: an error, and no rank keeps it."""
    assert "missing or damaged" in tensor[f"failed on {rank}"]["error"]
    assert guarded_ranks(tensor[f"attested after {rank}"])
    late = tensor.request("late")[1]
    assert all(late not in pool for pool in tensor[f"pools after {rank}"])
    assert tensor["said after"] == tensor["said"]


def test_loading_works_again(tensor: Steps, pair: Pair) -> None:
    assert tensor["late"] is True
    check_slots(tensor, pair, "late slots", "late")


def test_a_rank_that_cannot_load_in_a_step(tensor: Steps) -> None:
    """The engine lives, and the rank says what it lost: the API side then withdraws the adapter."""
    assert len(tensor["said in a step"]) > 0
    path = tensor.request("late")[2]
    assert guarded_ranks(tensor["attested after a step"])
    assert [answer["lost"] for answer in tensor["attested after a step"]] == [[], [path]]


def loads(samples: Mapping[tuple[str, frozenset[tuple[str, str]]], float]) -> dict[str, float]:
    """Engine → adapters that it has loaded, where there are any."""
    found: dict[str, float] = {}
    for (name, labels), value in samples.items():
        if name == "safelora_lora_loads_total" and value:
            found[dict(labels)["engine"]] = found.get(dict(labels)["engine"], 0) + value
    return found


def test_data_parallel_engines(pair: Pair, made: dict[str, Adapter], tmp_path: Path) -> None:
    """Both are guarded and reported, share one gate, and answer alike with an adapter."""
    command = guarded(
        pair.aligned, pair.projectors, tmp_path / "store", "--method=safe-lora", "--select=number",
        f"--number={CHOSEN}", "--data-parallel-size=2",
        "--dtype=float32", "--max-lora-rank=8", "--max-model-len=256", UNI,
    )  # fmt: skip
    log = tmp_path / "server.log"
    with running(command, log, TWO_CORES) as server, client(server, ADMIN_KEY) as admin:
        assert upload(admin, "wide", made["wide"].folder).status_code == 201
        assert upload(admin, "bad", made["bad"].folder).status_code == 422
        aligned = say(admin, "aligned")

        def ask(_: int) -> tuple[str, int, int]:
            with client(server, ADMIN_KEY) as http:
                answer = http.post("/v1/completions", json=BODY).json()
                usage = answer["usage"]
                return answer["choices"][0]["text"], usage["prompt_tokens"], usage["completion_tokens"]

        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(ask, range(REQUESTS)))
        deadline = time.monotonic() + 90  # workers are asked every 30 s what they have loaded
        while not loads(samples := metric_samples(admin)) and time.monotonic() < deadline:
            time.sleep(1)
    said = {text for text, _, _ in answers}
    assert len(said) == 1 and said != {aligned}
    assert samples["safelora_workers", frozenset({("state", "guarded")})] == 2
    assert samples["safelora_workers", frozenset({("state", "unguarded")})] == 0
    assert samples["safelora_workers_expected", frozenset()] == 2
    assert samples["safelora_ready", frozenset()] == 1

    # Each request and token once, whichever engine it went to; and each engine's loads by themselves.
    wide = ("adapter", "wide")
    ended = {
        o: samples["safelora_adapter_requests_total", frozenset({wide, ("outcome", o)})] for o in OUTCOMES
    }
    assert ended == {**dict.fromkeys(OUTCOMES, 0), "length": REQUESTS}
    prompts, tokens = (sum(answer[at] for answer in answers) for at in (1, 2))
    assert tokens == REQUESTS * BODY["max_tokens"]
    assert samples["safelora_adapter_prompt_tokens_total", frozenset({wide})] == prompts
    assert samples["safelora_adapter_generation_tokens_total", frozenset({wide})] == tokens
    for histogram in ("time_to_first_token", "time_per_output_token"):
        assert samples[f"safelora_adapter_{histogram}_seconds_count", frozenset({wide})] == REQUESTS
    assert loads(samples) == {"0": 1, "1": 1}
    for engine in ("0", "1"):
        assert samples["safelora_num_gpu_loaded_lora_adapters", frozenset({("engine", engine)})] == 1
    assert samples["safelora_gate_cache_total", frozenset({("outcome", "miss")})] == 2  # wide, bad
    finished = {
        dict(labels)["engine"]: value
        for (name, labels), value in samples.items()
        if name == "vllm:request_success_total" and dict(labels)["finished_reason"] == "length"
    }
    assert len(finished) == 2 and all(finished.values()), "each engine has answered"
    assert sum(finished.values()) - REQUESTS in (0, 1), "vLLM counts as many, and the model's own one"
    assert log.read_text(errors="replace").count("starting the gate") == 1


@pytest.fixture(scope="module")
def pipeline(pair: Pair, made: dict[str, Adapter], tmp_path_factory: pytest.TempPathFactory) -> Steps:
    """Two stages of one layer each."""
    root = tmp_path_factory.mktemp("pipeline")
    policy = {"method": "safe-lora", "select": "number", "number": CHOSEN}
    options = slots.options(
        pair.projectors,
        root / "store",
        policy,
        pipeline_parallel_size=2,
        max_loras=2,
        dtype="float32",
        max_lora_rank=8,
    )
    steps = Steps(Engine(str(pair.aligned), options), root, made)
    steps.add("attested", "rpc", "safelora_attest")
    steps.load("wide", "wide")
    steps.load("refused", "bad")
    steps.read("slots", "wide")
    steps.add("attested after", "rpc", "safelora_attest")
    steps.run(TWO_CORES)
    return steps


def test_each_pipeline_stage_holds_its_layers(pipeline: Steps, pair: Pair) -> None:
    """Without generating: see above."""
    assert guarded_ranks(pipeline["attested"]) and guarded_ranks(pipeline["attested after"])
    assert pipeline["wide"] is True
    assert "non_finite" in pipeline["refused"]["error"]
    original, weights = pipeline.made["wide"], pair.weights
    chosen = slots.least_similar(original, weights, CHOSEN)
    stages = [slots.read(pipeline.root / "slots", rank) for rank in RANKS]
    assert [{re.findall(r"\.(\d+)\.", module)[0] for module in stage} for stage in stages] == [{"0"}, {"1"}]
    together = {**stages[0], **stages[1]}
    published = slots.published(pipeline.store, original.folder)
    assert slots.from_published(together, published) == 0.0
    assert slots.from_projection(together, original, weights, chosen=chosen) < TOLERANCE
    assert pipeline.log.count("starting the gate") == 1
