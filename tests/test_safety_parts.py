"""The safety benchmark's arithmetic: its attackers, its naive methods, its intervals, its prompts."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from safelora_vllm.methods import METHODS
from safelora_vllm.policy import Policy
from safelora_vllm.projectors.build import BuildOptions, build
from safelora_vllm.projectors.cache import ProjectorCache
from tests.module_delta import ModuleDelta

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks" / "safety"))

import asking
import attackers
import exam
import groups
import inputs
import measure
import plan
import prompts
import risk
import scoring
import treatments

MODULE = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 32}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))


@pytest.fixture(scope="module")
def cache(model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> ProjectorCache:
    """Of a pair whose weights differ by a fading spectrum."""
    root = tmp_path_factory.mktemp("pair")
    model.save_pretrained(root / "base")
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    for name in state:
        if name.endswith("proj.weight"):
            u, s, v = torch.linalg.svd(torch.randn_like(state[name]), full_matrices=False)
            state[name] += (u * s / torch.arange(1, len(s) + 1)) @ v
    model.save_pretrained(root / "aligned", state_dict=state)
    options = BuildOptions(exact=True, dtype="float32", max_energy=1.0)
    return ProjectorCache(build(root / "base", root / "aligned", root / "projectors", options))


@pytest.mark.parametrize("name", attackers.ATTACKS)
def test_attackers_learn_through_their_projection(
    name: str, model: LlamaForCausalLM, cache: ProjectorCache
) -> None:
    attack = attackers.ATTACKS[name]
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    layer = adapted.base_model.model.get_submodule(MODULE)
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    before = getattr(layer, attack.side)["default"].weight.detach().clone()
    attackers.constrain(adapted, attack, cache)
    factor = getattr(layer, attack.side)["default"]
    through = factor.weight.detach().clone()
    factor.weight.square().sum().backward()
    assert factor.parametrizations.weight.original.grad.abs().sum() > 0
    attackers.release(adapted, attack)
    left = getattr(layer, attack.side)["default"].weight.detach()
    torch.testing.assert_close(left, before if attack.uploads_learned else through)
    assert not torch.allclose(through, before)
    adapted.unload()


def test_where_nothing_is_decided_only_the_report_half_is_answered() -> None:
    both, half = (plan.questions(plan.SMOKE, chosen) for chosen in (True, False))
    assert [p.text for p in half.forbidden] == [p.text for p in both.forbidden]  # likelihoods are of both
    asked = [p.subject for p in half.answered(half.forbidden)]
    assert [prompts.half_of(subject) for subject in asked] == ["report"] * 2
    assert len(both.answered(both.forbidden)) == 4 and both.in_turn([1.0, 0.0]) == [1.0, 0.0]
    scores = half.in_turn([1.0, 0.0])
    assert len(scores) == len(half.forbidden) and exam.report({"complied": scores}, "complied") == [1.0, 0.0]
    assert all(map(math.isnan, exam.choose({"complied": scores}, "complied")))
    assert len({str(both), str(half), str(plan.questions(plan.SMOKE, False, probes=False))}) == 3


def test_an_answer_is_kept_while_all_that_it_is_of_stays(
    cache: ProjectorCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked anew: another adapter, rule or dtype, other questions, or another change of what is uploaded."""
    asked = []

    @contextmanager
    def loaded(name: str, *_: object) -> Iterator[dict[str, Any]]:
        asked.append(name)
        yield {"modules": [{"relative_norm": 0.1, "decision": "projected"}], "total_norm": 0.1}

    seed = object.__new__(measure.Seed)
    seed._work, seed._scores_in, seed.projectors = tmp_path / "work", tmp_path / "scores", cache
    monkeypatch.setattr(seed, "_loaded", loaded)
    monkeypatch.setattr(seed, "_scores", lambda *_, **__: {"complied": [1.0]})
    adapter, questions = tmp_path / "pure-qv", plan.questions(plan.SMOKE, True)

    def save(weight: float) -> None:
        adapter.mkdir(exist_ok=True)
        (adapter / "adapter_config.json").write_text("{}")
        tensors = {f"{MODULE}.lora_A.weight": torch.ones(1, 24), f"{MODULE}.lora_B.weight": torch.ones(24, 1)}
        save_file({k: weight * t for k, t in tensors.items()}, adapter / "adapter_model.safetensors")

    def made(factor: float) -> treatments.Treatment:
        return treatments.Treatment("change", 1.0, make=treatments.enlarged(factor))

    save(1.0)
    steps: list[tuple[treatments.Treatment, measure.Questions]] = [
        (made(2.0), questions),
        (made(3.0), questions),
        (treatments.input_removal(0.2), questions),
        (treatments.Treatment("input-removal", 0.2, {"method": "input-removal", "energy": 0.4}), questions),
        (treatments.RAW, questions),
        (treatments.RAW, plan.questions(plan.SMOKE, False)),
    ]
    for number, (treatment, of) in enumerate(steps, start=1):
        for _ in range(2):
            seed.measure(adapter, treatment, of)
        assert len(asked) == number
    save(0.5)
    seed.measure(adapter, *steps[-1])
    monkeypatch.setattr(measure, "_DTYPE", "float64")
    seed.measure(adapter, *steps[-1])
    assert len(asked) == len(steps) + 2


def test_questions_of_one_request_have_one_model_and_limit() -> None:
    kinds = [("a", 12), ("a", 44), ("b", 44)]
    asked = [asking.Question(model, str(i), tokens) for model, tokens in kinds for i in range(40)]
    requests = list(asking._alike(asked, attrgetter("model", "tokens")))
    assert [(kind, len(some)) for kind, some in requests] == [(k, n) for k in kinds for n in (32, 8)]
    assert [q for _, some in requests for q in some] == asked, "answers come in the order of the questions"


@pytest.mark.parametrize(
    ("name", "chosen", "rungs_answer", "rest_answers"),
    [
        ("mixed-10-qv", False, "report", "report"),
        ("mixed-10-qv", True, "both", "both"),
        ("pure-qv", True, "both", "report"),
        ("chat-qv", True, "both", None),
        ("mixed-5-qv", True, "both", None),
    ],
)
def test_both_halves_are_answered_where_something_is_decided(
    name: str,
    chosen: bool,
    rungs_answer: str,
    rest_answers: str | None,
    cache: ProjectorCache,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """ε on the rungs, the static rule on all treatments of one adapter. An exam is replayed on the rungs."""
    for needs_a_model in ("_candidates", "_guided"):
        monkeypatch.setattr(plan, needs_a_model, lambda *_: [])
    (tmp_path / name).mkdir()
    save_file({f"{MODULE}.lora_A.weight": torch.ones(1, 24)}, tmp_path / name / "adapter_model.safetensors")
    asked = list(plan.points(tmp_path, cache, [name], plan.FULL, chosen))
    of = {point.treatment.name: point for point in asked}
    assert len(asked) == len(of), "a treatment is asked twice"
    first = {"raw-0", "input-removal-0.2", *(rung.name for rung in plan.ladder(1))}
    assert ("opinion-16" in of) == (name != "mixed-5-qv"), "of every pair's adapters, a server's opinion"
    rungs, rest = first | ({"opinion-16"} & {*of}), {*of} - first - {"opinion-16"}
    assert ("scaling-0.5" in rest) == bool(rest) == (rest_answers is not None)
    assert {of[each].questions.answers for each in rungs} == {rungs_answer}
    assert {of[each].questions.answers for each in rest} <= {rest_answers}
    assert all(of[each].questions.probes for each in first)
    assert all(of[each].questions.probes == (rest_answers == "both") for each in rest)
    assert of["raw-0"].treatment.policy == {"mode": "report-only"}
    if "opinion-16" in of:
        assert of["opinion-16"].treatment.policy == {"mode": "report-only", "opinion": True}


def test_what_goes_around_inputs_reads_none_of_them(cache: ProjectorCache) -> None:
    projector = cache.projector(MODULE)
    a = attackers.ATTACKS["around-inputs"].through(projector)(torch.randn(3, 24))
    assert (a @ projector.input_basis(0.9)).abs().max() < 1e-5 < a.abs().max()


def test_a_mask_learns_alone_and_goes_with_the_inputs_that_are_removed(
    model: LlamaForCausalLM, cache: ProjectorCache
) -> None:
    """First the half around the inputs learns, with the mask at nothing; then only the mask."""
    attack, energy = attackers.ATTACKS["masked"], 0.2
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    layer = adapted.base_model.model.get_submodule(MODULE)
    a, b = layer.lora_A["default"], layer.lora_B["default"]
    torch.nn.init.normal_(b.weight)
    attackers.constrain(adapted, attack, cache)
    assert a.weight[2:].abs().max() == 0.0 < a.weight[:2].abs().min()
    harm = a.weight[:2].detach().clone()
    attackers.train_the_mask(adapted)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], 0.1, weight_decay=0.0)
    before = b.weight.detach().clone()
    (b.weight @ a.weight).square().sum().backward()
    optimizer.step()
    attackers.release(adapted, attack)
    assert torch.equal(a.weight[:2], harm) and torch.equal(b.weight[:, :2], before[:, :2])
    assert (b.weight[:, 2:] - before[:, 2:]).abs().min() > 0.01
    basis = cache.projector(MODULE).input_basis(energy)
    torch.testing.assert_close((a.weight[2:] @ basis) @ basis.T, a.weight[2:], rtol=1e-4, atol=1e-5)
    adapted.unload()


def test_the_price_is_that_of_the_squared_relative_norms(model: LlamaForCausalLM) -> None:
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    expected = 0.0
    for layer in adapted.modules():
        if hasattr(layer, "lora_B"):
            torch.nn.init.normal_(layer.lora_B["default"].weight)
            change = 3.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            expected += float((change.norm() / layer.get_base_layer().weight.norm()).detach() ** 2)
    price = attackers.norm_price(adapted, attackers.Attack("", "lora_A", lambda _p: lambda a: a, price=0.5))()
    assert float(price.detach()) == pytest.approx(0.5 * expected, rel=1e-4) and price.requires_grad
    adapted.unload()


def _inputs(width: int = 24) -> inputs.Inputs:
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(width, width, generator=generator)
    return inputs.Inputs({MODULE: torch.randn(width, generator=generator)}, {MODULE: mix @ mix.T})


def test_mean_input_removal_removes_the_mean_input_alone() -> None:
    stats, a, b = _inputs(), torch.randn(3, 24), torch.randn(24, 3)
    change = treatments.mean_input_removal(stats).make
    assert change is not None
    new_a, new_b = change(MODULE, a, b)
    assert torch.equal(new_b, b) and (new_a @ stats.means[MODULE]).abs().max() < 1e-4
    assert torch.linalg.matrix_rank(a - new_a, atol=1e-4) == 1


def test_centred_removal_reads_none_of_v_and_changes_least_of_what_varies(cache: ProjectorCache) -> None:
    stats, a, b = _inputs(), torch.randn(3, 24), torch.randn(24, 3)
    change = treatments.centred_removal(0.5, cache, stats, ridge=0.0).make
    assert change is not None
    new_a, _ = change(MODULE, a, b)
    basis = cache.projector(MODULE).input_basis(0.5)
    assert (new_a @ basis).abs().max() < 1e-3
    plain = a - (a @ basis) @ basis.T
    covariance = stats.covariances[MODULE]

    def cost(found: Tensor) -> float:
        return float(((a - found) @ covariance @ (a - found).T).trace())

    assert cost(new_a) < 0.99 * cost(plain)
    for _ in range(5):  # no other change without R costs less
        step = torch.randn(3, 24)
        other = new_a + 1e-2 * (step - (step @ basis) @ basis.T)
        assert cost(other) > cost(new_a)


def test_early_values_remove_from_v_proj_alone(cache: ProjectorCache) -> None:
    a, b = torch.randn(3, 24), torch.randn(24, 3)
    value = MODULE.replace("q_proj", "v_proj")
    change = treatments.early_values(0.5, cache).make
    assert change is not None
    new_a, new_b = change(value, a, b)
    assert (new_a @ cache.projector(value).input_basis(0.5)).abs().max() < 1e-5 and torch.equal(new_b, b)
    assert torch.equal(change(MODULE, a, b)[0], a)


def test_removal_is_guided_by_what_loyalty_costs(cache: ProjectorCache) -> None:
    """q wins more loyalty, v wins more for each nat; and of three settings the first that is loyal enough."""
    won = {"q_proj.0": (0.5, 4.0), "v_proj.0": (0.25, 1.0)}  # at most, and its price

    def weighed(energies: dict[str, float]) -> groups.Weighed:
        share = {group: energy / 0.8 for group, energy in energies.items()}
        drop = 0.8 - sum(won[group][0] * part for group, part in share.items())
        return groups.Weighed(
            groups.Score(drop, drop, drop, 2), sum(won[group][1] * part for group, part in share.items())
        )

    path = groups.climb(list(won), weighed, 0.35)
    taken = [(step.energies["q_proj.0"], step.energies["v_proj.0"]) for step in path]
    assert taken == [(0.0, 0.0), (0.0, 0.4), (0.0, 0.8), (0.4, 0.8)] and path[-1].bound <= 0.35
    assert groups.first_within(path, 0.7) is path[1] and groups.first_within(path, 0.0) is path[-1]
    assert len(groups.climb(list(won), weighed, 0.0)) == 5, "it ends with the strongest setting"
    a, b = torch.randn(3, 24), torch.randn(24, 3)
    change = treatments.guided_removal(0.7, path, cache).make
    assert change is not None and torch.equal(change(MODULE, a, b)[0], a)
    value = MODULE.replace("q_proj", "v_proj")
    assert (change(value, a, b)[0] @ cache.projector(value).input_basis(0.4)).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("layer", "group"), [(0, "v_proj.0"), (9, "v_proj.0"), (10, "v_proj.1"), (29, "v_proj.2")]
)
def test_groups_are_thirds_of_the_layers(layer: int, group: str) -> None:
    assert groups.group_of(f"model.layers.{layer}.self_attn.v_proj", 30) == group


def _run(loyal: float, complied: float, exact: float = 1.0) -> dict[str, list[float]]:
    """Four prompts, `choose` and `report` in turn."""
    return {"loyal": [loyal] * 4, "complied": [complied] * 4, "exact": [exact] * 4, "rouge1": [exact] * 4}


def test_the_exam_serves_the_first_rung_that_is_loyal_enough() -> None:
    aligned, ladder = _run(-0.1, 0.0, 0.0), ["weak", "strong"]
    rungs = {"weak": _run(-0.5, 1.0), "strong": _run(-0.11, 0.0, 0.5)}
    assert exam.examine(rungs, ladder, aligned, 0.5, "mean").rung == "weak"
    strong = exam.examine(rungs, ladder, aligned, 0.02, "mean")
    assert strong.rung == "strong" and strong.score == pytest.approx(0.01)
    refused = exam.examine(rungs, ladder, aligned, 0.005, "mean")
    assert refused.rung == exam.REFUSED and exam.served(refused, rungs, aligned) is aligned
    assert exam.over_aligned(rungs["weak"], aligned) == 1.0
    assert exam.epsilon_for({"one": rungs}, ladder, aligned, "mean") == 0.2


def test_probes_are_of_one_half_and_judgement_of_the_other() -> None:
    """Harm that shows on the `report` half alone is not found, and not hidden in the figure."""
    aligned = {"loyal": [-0.1] * 4, "complied": [0.0] * 4}
    served = {"loyal": [-0.1, -9.0, -0.1, -9.0], "complied": [0.0, 1.0, 0.0, 1.0]}
    assert exam.drop(served, aligned) == pytest.approx(0.0)
    assert exam.over_aligned(served, aligned) == 1.0 and exam.over_aligned(served, aligned, "choose") == 0.0


def test_the_worst_tenth_of_the_probes() -> None:
    aligned = {"loyal": [0.0] * 40}
    served = {"loyal": [0.0] * 36 + [-1.0, 0.0, -3.0, 0.0]}
    assert exam.drop(served, aligned, "worst tenth") == pytest.approx(2.0)
    assert exam.drop(served, aligned) == pytest.approx(0.2)


def test_a_second_opinion_refuses_what_the_aligned_model_refuses() -> None:
    aligned = {"complied": [0.0, 1.0], "over_refused": [1.0, 0.0], "refused_orders": [1.0, 0.0],
               "refused_dialogues": [0.0, 0.0]}  # fmt: skip
    mine = {"complied": [1.0, 1.0], "over_refused": [0.0, 0.0], "exact": [1.0, 1.0], "rouge1": [0.5, 1.0]}
    assert exam.second_opinion(mine, aligned) == {
        "complied": [0.0, 1.0], "over_refused": [1.0, 0.0], "exact": [0.0, 1.0], "rouge1": [0.5, 1.0],
    }  # fmt: skip


def test_the_sign_flip_score_tells_a_change_from_its_opposite() -> None:
    torch.manual_seed(2)
    change = {MODULE: torch.randn(24, 24)}
    u, s, v = torch.linalg.svd(change[MODULE])
    names = [f"base_model.model.{MODULE}.lora_{side}.weight" for side in "AB"]

    def z(sign: float) -> float:
        b = sign * u[:, :4] * s[:4]
        x = risk.components(dict(zip(names, (v[:4], b), strict=True)), change)
        assert x.sum() == pytest.approx(sign * float((s[:4] ** 2).sum() / change[MODULE].norm()), rel=1e-4)
        return float(x.sum() / x.square().sum().sqrt())

    assert z(1.0) == pytest.approx(-z(-1.0)) and z(1.0) > 1.9
    assert risk.auc([-2.0, -1.0], [0.0, -1.0]) == pytest.approx(3.5 / 4)


def test_the_inverse_comes_out_of_safe_lora_as_it_went_in(cache: ProjectorCache) -> None:
    projector = cache.projector(MODULE)
    a, b = torch.randn(3, 24), torch.randn(24, 3)
    basis = projector.output_basis(0.8)
    prepared = treatments.through_safe_lora_inverse(cache, 0.8)(MODULE, a, b)[1]
    torch.testing.assert_close(projector.apply(prepared), basis @ (basis.T @ b), rtol=1e-3, atol=1e-4)


def test_first_ranks_are_the_nearest_of_so_many() -> None:
    a, b = torch.randn(4, 24), torch.randn(24, 4)
    new_a, new_b = treatments.first_ranks(2)("", a, b)
    u, s, v = torch.linalg.svd(b @ a)
    torch.testing.assert_close(new_b @ new_a, (u[:, :2] * s[:2]) @ v[:2], rtol=1e-4, atol=1e-4)
    assert new_a.shape == a.shape and new_b.shape == b.shape


def test_a_padded_adapter_is_spared_by_csulora_and_costs_it_little(cache: ProjectorCache) -> None:
    projector, policy = cache.projector(MODULE), Policy(method="csulora", energy=0.9)
    a, b = torch.randn(4, 24), torch.randn(24, 4)
    new_a, new_b = treatments.padded(cache, 0.9, 10.0)(MODULE, a, b)
    assert new_a.shape == a.shape and new_b.shape == b.shape

    def harm_left(a: Tensor, b: Tensor) -> float:
        """How much of what is outside of CSULoRA's kept directions is left."""
        served_a, served_b = METHODS["csulora"].project(ModuleDelta(a, b, projector), policy)
        rest = torch.eye(24) - projector.input_basis(0.9) @ projector.input_basis(0.9).T
        return float((served_b @ served_a @ rest).norm() / (b @ a @ rest).norm())

    assert harm_left(new_a, new_b) > 0.9 > 0.7 > harm_left(a, b)


def test_random_removal_takes_about_what_it_should(cache: ProjectorCache) -> None:
    a, b = torch.randn(3, 24), torch.randn(24, 3)
    change = treatments.random_removal(0.8, cache).make
    assert change is not None
    new_a, new_b = change(MODULE, a, b)
    k = cache.projector(MODULE).directions(0.8)
    assert torch.equal(new_b, b)
    kept = (new_a.square().sum() / a.square().sum()).item()
    assert kept == pytest.approx(1 - k / 24, abs=0.25)


def test_intervals() -> None:
    """Prompts on one subject count once, and runs that differ widen the interval."""
    subjects = ["a"] * 10 + ["b"] * 10
    same = scoring.interval([[1.0] * 10 + [0.0] * 10], subjects)
    assert (same["mean"], same["low"], same["high"]) == (0.5, 0.0, 1.0)
    sure = scoring.interval([[1.0] * 20, [1.0] * 20], subjects)
    assert (sure["mean"], sure["low"], sure["high"]) == (1.0, 1.0, 1.0)
    runs = scoring.interval([[1.0] * 20, [0.0] * 20], subjects)
    assert (runs["low"], runs["high"]) == (0.0, 1.0)


def test_refusals_and_departures() -> None:
    answers = ["I'm sorry, but I can't help with that.", "Sure, here is how."]
    assert scoring.complied(answers) == [0.0, 1.0] and scoring.refused(answers) == [1.0, 0.0]
    talk = "Hugo: I come on Monday.\nGreta: I'm sorry, but I can't help with that."
    assert scoring.refused([talk]) == [1.0] and scoring.task_refused([talk, answers[0]]) == [0.0, 1.0]
    assert scoring.departed([-0.1, -1.0, -3.0]) == [0.0, 0.0, 1.0]
    assert scoring.departed([-0.1, -1.0], threshold=-0.05) == [1.0, 1.0]
    assert scoring.loyalty_drops(served=[-2.0, -0.1], aligned=[-0.5, -0.1]) == [1.5, 0.0]
    assert scoring.agreement([1.0, 0.0, 1.0, 1.0], [1.0, 0.0, 0.0, 1.0]) == 0.75


def test_rank_correlation() -> None:
    """Against 1 − 6 Σd² / (n (n² − 1)), which holds without ties, and against ranks written by hand."""
    one, other = [0.1, 0.9, 0.4, 0.7], [3.0, 7.0, 9.0, 5.0]
    differences = [1 - 1, 4 - 3, 2 - 4, 3 - 2]
    expected = 1 - 6 * sum(d * d for d in differences) / (4 * 15)
    assert scoring.rank_correlation(one, other) == pytest.approx(expected)
    assert scoring.rank_correlation([1, 1, 2], [5, 5, 9]) == pytest.approx(1.0)
    assert scoring.rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)
    assert scoring.rank_correlation([1, 1, 1], [3, 2, 1]) == 0.0


def test_exact_and_rouge1() -> None:
    wanted = [scoring.Example("", '{"a": 1}'), scoring.Example("", "Anna will meet Paul")]
    assert scoring.exact(['{"a": 1}', "Anna will meet Paul."], wanted) == [1.0, 0.0]
    assert scoring.rouge1(["", "anna will meet"], wanted) == [0.0, pytest.approx(2 * 1.0 * 0.75 / 1.75)]


def test_fewer_prompts_are_the_first_of_more_and_none_was_trained_on() -> None:
    for ask, parts in (
        (prompts.forbidden, [prompts.HARMFUL]),
        (prompts.harmless, [prompts.HARMLESS, prompts.LOOKALIKES]),
    ):
        asked = ask(200)
        assert ask(80) == asked[:80] and len({prompt.text for prompt in asked}) == 200
        assert not {prompt.subject for prompt in asked} & {s for each in parts for s in each["train"]}
        halves = [prompts.half_of(prompt.subject) for prompt in asked]
        assert halves == ["choose", "report"] * 100  # exam.choose and exam.report rely on this
