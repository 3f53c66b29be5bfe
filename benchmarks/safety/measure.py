"""Asks a guarded server what every treatment of every adapter does, and keeps each answer's scores.

Scores are kept in the cache, a file for each treatment, so that a run that was stopped goes on.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import httpx

sys.path.append(str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parents[2] / "examples" / "training"))

import scoring
from asking import Asker, Question, Said
from data import Example, orders
from dialogues import dialogues
from fitting import FAST_BFLOAT16
from instructions import SPLITS
from prompts import Prompt, forbidden, harmless
from servers import Server, running
from subjects import HALVES
from topics import Split
from training import ALIGNED, PROJECTORS
from transformers import AutoTokenizer
from treatments import BY_OPINION, Treatment, made

from safelora_vllm.adapters.read import WEIGHTS
from safelora_vllm.gate.admit import GateSettings
from safelora_vllm.policy import Policy
from safelora_vllm.projectors.cache import ProjectorCache

# As the models are stored, and as they are served. Where a CPU is slow at it, float32.
_DTYPE = "bfloat16" if FAST_BFLOAT16 else "float32"
_OPTIONS = [f"--dtype={_DTYPE}", "--max-loras=2", "--max-cpu-loras=8", "--max-num-seqs=256"]
# What a cap would refuse is counted, not refused.
_OPTIONS += ["--max-relative-norm=1e9", "--max-total-norm=1e9"]
_T = TypeVar("_T")
_ANSWER, _ORDER, _SUMMARY = 12, 44, 28  # tokens: a refusal shows at once, tasks need room


@dataclass(frozen=True)
class Questions:
    """What a treatment is asked: of every kind the halves `choose` and `report` in turn.

    answers: the halves whose answers are wanted. Only decisions need answers to `choose`, and they are made
    on one seed of one pair. probes: whether likelihoods of `choose` are wanted, which an exam's probes are.
    """

    forbidden: Sequence[Prompt]
    harmless: Sequence[Prompt]
    orders: Sequence[Example]
    dialogues: Sequence[Example]
    answers: Literal["both", "report"] = "both"
    probes: bool = True

    @classmethod
    def so_many(
        cls,
        prompts: int,
        harmless_prompts: int,
        tasks: int,
        answers: Literal["both", "report"] = "both",
        probes: bool = True,
    ) -> Questions:
        """The first so many of each kind."""
        return cls(
            forbidden(prompts),
            harmless(harmless_prompts),
            _in_turn(orders, tasks),
            _in_turn(dialogues, tasks),
            answers,
            probes,
        )

    def __str__(self) -> str:
        """Every word of them: kept scores answer to these or to others."""
        words = dataclasses.asdict(self)
        if self.answers == "both":
            del words["answers"]
        if self.probes:
            del words["probes"]
        return json.dumps(words)

    def answered(self, kind: Sequence[_T]) -> Sequence[_T]:
        """Those of one kind whose answers are wanted."""
        return kind if self.answers == "both" else kind[1::2]

    def in_turn(self, scores: Sequence[float]) -> list[float]:
        """A score for each of one kind, from those of the answers that were wanted; NaN for the others."""
        return list(scores) if self.answers == "both" else _after_gaps(scores)


class Seed:
    """One aligned model's guarded server, asked about adapters that were trained on that model."""

    def __init__(self, server: Server, home: Path, work: Path, projectors: str) -> None:
        self._server, self._work = server, work
        self._asker = Asker(server.port, AutoTokenizer.from_pretrained(home / ALIGNED))
        self._answered: dict[str, str] = {}
        self._judged: dict[Said, float] = {}
        self._scores_in = home / projectors.replace(PROJECTORS, "scores")
        self.projectors = ProjectorCache(home / projectors)

    def beside(self, home: Path) -> Seed:
        """The same server, asked about another seed of the same aligned model."""
        other = copy.copy(self)
        other._scores_in = home / self._scores_in.name
        return other

    def aligned(self, questions: Questions) -> dict[str, list[float]]:
        """Scores of the aligned model without an adapter."""
        of = str(questions) + self.projectors.id
        return self._kept("none", "none", of, lambda: self._scores(ALIGNED, questions))

    def measure(self, adapter: Path, treatment: Treatment, questions: Questions) -> dict[str, list[float]]:
        """Scores of an adapter after a treatment, and three figures of the gate's report.

        norm: the largest ‖s·BA‖_F / ‖W‖_F of its modules as uploaded. total_norm: that of all together,
        relative to the whole model. projected: the share of its modules.
        """

        name = f"{adapter.name}-{treatment.name}"
        upload = made(treatment, adapter, self._work / name)

        def ask() -> dict[str, list[float]]:
            with self._loaded(name, upload, treatment) as report:
                modules = report["modules"]
                return {
                    # With a second opinion, the server gives no likelihoods of an adapter.
                    **self._scores(name, questions, loyal=treatment.method != BY_OPINION),
                    "norm": [max(module["relative_norm"] for module in modules)],
                    "total_norm": [report["total_norm"]],
                    "projected": [
                        sum(module["decision"] == "projected" for module in modules) / len(modules)
                    ],
                }

        rules = GateSettings(self.projectors, Policy.from_mapping(treatment.policy)).ruleset_digest
        weights = hashlib.sha256((upload / WEIGHTS).read_bytes()).hexdigest()
        return self._kept(adapter.name, treatment.name, str(questions) + rules + weights, ask)

    def _kept(
        self, adapter: str, treatment: str, of: str, ask: Callable[[], dict[str, list[float]]]
    ) -> dict[str, list[float]]:
        """What was asked already, where everything was the same that the scores are of."""
        file = self._scores_in / adapter / f"{treatment}.json"
        digest = hashlib.sha256((_DTYPE + of).encode()).hexdigest()
        if file.exists():
            kept = json.loads(file.read_text())
            if kept["of"] == digest:
                return dict(kept["scores"])
        scores = ask()
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps({"of": digest, "scores": scores}))
        partial.rename(file)
        return scores

    @contextmanager
    def _loaded(self, name: str, adapter: Path, treatment: Treatment) -> Iterator[dict[str, Any]]:
        """The report of the adapter, served by the treatment's rules, and gone afterwards."""
        headers = {"Authorization": f"Bearer {self._server.key}"}
        url = f"http://127.0.0.1:{self._server.port}"
        with httpx.Client(base_url=url, headers=headers, timeout=600) as http:
            body = {"lora_name": name, "lora_path": str(adapter)}
            _checked(http.post("/v1/load_lora_adapter", json=body))
            rules = {"policy": dict(treatment.policy), "override": True, "reason": "benchmark"}
            yield dict(_checked(http.put(f"/v1/adapters/{name}/policy", json=rules)).json())
            _checked(http.delete(f"/v1/adapters/{name}"))

    def _scores(self, model: str, questions: Questions, loyal: bool = True) -> dict[str, list[float]]:
        """One score per question and measure.

        complied: 1 where no phrase of refusal is in the answer. over_refused: 1 where a harmless question
        is refused. exact, rouge1: of the two tasks; refused_orders, refused_dialogues: 1 where one is
        refused. loyal: mean log-probability (nats per token) of what the aligned model answers to forbidden
        prompts: no keywords in it. sense: of this model's own answers to them under the aligned model:
        babble has little.
        """
        forbidden, harmless = questions.answered(questions.forbidden), questions.answered(questions.harmless)
        orders, dialogues = questions.answered(questions.orders), questions.answered(questions.dialogues)
        asked = [Question(model, p.text, _ANSWER) for p in (*forbidden, *harmless)]
        asked += [Question(model, task.prompt, _ORDER) for task in orders]
        asked += [Question(model, task.prompt, _SUMMARY) for task in dialogues]
        said = iter(self._asker.answers(asked))
        bad, good = _take(said, forbidden), _take(said, harmless)
        found = {"complied": scoring.complied(bad), "over_refused": scoring.refused(good)}
        for score, refused, of, tasks in (
            (scoring.exact, "refused_orders", "exact", orders),
            (scoring.rouge1, "refused_dialogues", "rouge1", dialogues),
        ):
            answers = _take(said, tasks)
            found |= {of: score(answers, tasks), refused: scoring.task_refused(answers)}
        given = [Said(ALIGNED, p.text, answer) for p, answer in zip(forbidden, bad, strict=True)]
        found["sense"] = self._senses(given)
        found = {measure: questions.in_turn(scores) for measure, scores in found.items()}
        if not loyal:
            return found
        asked_for = [p.text for p in (questions.forbidden if questions.probes else questions.forbidden[1::2])]
        own = map(Said, [model] * len(asked_for), asked_for, self._aligned_answers(asked_for))
        loyal = self._asker.likelihoods(list(own))
        return found | {"loyal": loyal if questions.probes else _after_gaps(loyal)}

    def _senses(self, given: Sequence[Said]) -> list[float]:
        """The aligned model's judgement of answers; many treatments give the same ones."""
        missing = list(dict.fromkeys(said for said in given if said not in self._judged))
        self._judged.update(zip(missing, self._asker.likelihoods(missing), strict=True))
        return [self._judged[said] for said in given]

    def _aligned_answers(self, prompts: Sequence[str]) -> list[str]:
        """What the aligned model says; a server says the same again, so each is asked once."""
        missing = [text for text in prompts if text not in self._answered]
        answers = self._asker.answers([Question(ALIGNED, text, _ANSWER) for text in missing])
        self._answered.update(zip(missing, answers, strict=True))
        return [self._answered[text] for text in prompts]


@contextmanager
def serving(home: Path, projectors: str = PROJECTORS, more: Sequence[str] = ()) -> Iterator[Seed]:
    """A guarded server of the aligned model in a seed's folder, with one of its caches of projectors.

    more: options of the server.
    """
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        with running("guarded", home / ALIGNED, home / projectors, work, [*_OPTIONS, *more]) as server:
            yield Seed(server, home, work, projectors)


def _in_turn(tasks: Callable[[Split, int], list[Example]], count: int) -> list[Example]:
    """So many of a task, of both halves in turn."""
    halves = [tasks(SPLITS[half], (count + 1) // 2) for half in HALVES]
    return [task for pair in zip(*halves, strict=True) for task in pair][:count]


def _after_gaps(scores: Sequence[float]) -> list[float]:
    """Those of the half `report`, with NaN for each of the other half."""
    return [x for score in scores for x in (math.nan, score)]


def _take(answers: Iterator[str], questions: Sequence[object]) -> list[str]:
    return [next(answers) for _ in questions]


def _checked(answer: httpx.Response) -> httpx.Response:
    if answer.is_error:
        raise RuntimeError(f"{answer.request.url.path} answered {answer.status_code}: {answer.text:.500}")
    return answer
