"""What one tenant's request could do to the engine, or to the next request, where vLLM runs on a CPU."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server import slots
from tests.server.slots import Engine
from tests.server.small_models import make_pair

STEPS: dict[str, tuple[str, ...]] = {
    "clean": ("say",),
    "judged": ("judge",),
    "layers": ("rpc", "poison"),
    "zeroed": ("say",),
    "blocks as vLLM has them": ("leave_blocks",),
    "poisoned again": ("rpc", "poison"),
    "left": ("say",),
    "head as vLLM has it": ("leave_head",),
    "not judged": ("judge",),
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Each step's answer, of one engine with LoRA."""
    root = tmp_path_factory.mktemp("cpu")
    pair = make_pair(root / "llama", "llama")
    options = slots.options(pair.projectors, root / "store", {}, **slots.IN_PROCESS)
    engine = Engine(str(pair.aligned), options, list(STEPS.values()))
    (found,) = slots.run([engine], root, slots.ONE_PROCESS, 300.0)
    return dict(zip(STEPS, found, strict=True))


def test_another_requests_nan_is_zeroed(answers: dict[str, Any]) -> None:
    assert answers["layers"] == [2], "the cache of both layers was full of NaN"
    assert answers["zeroed"] == answers["clean"]


def test_vllm_still_reads_it(answers: dict[str, Any]) -> None:
    """Fails when vLLM's attention leaves it out itself: then the fix can go."""
    assert answers["left"] != answers["clean"]


def test_log_probabilities_of_prompts(answers: dict[str, Any]) -> None:
    """One for each token of each prompt, the first of which has none."""
    assert len(answers["judged"]) == 3 and answers["judged"] == sorted(answers["judged"])


def test_vllm_still_fails_on_them(answers: dict[str, Any]) -> None:
    """Fails when vLLM takes the right rows: then the fix can go."""
    assert "error" in answers["not judged"]
