"""What one request leaves in the key-value cache is not another's to read."""

from __future__ import annotations

import pytest

from tests.server import slots
from tests.server.slots import Engine
from tests.server.small_models import make_pair

Said = dict[str, list[int]]


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> Said:
    """Greedy tokens: on clean blocks, on blocks that held NaN, and on such blocks as vLLM leaves them."""
    root = tmp_path_factory.mktemp("blocks")
    pair = make_pair(root / "llama", "llama")
    options = slots.options(pair.projectors, root / "store", {}, **slots.IN_PROCESS)
    engine = Engine(str(pair.aligned), options)
    places = {"clean": engine.add("say")}
    layers = engine.add("rpc", "poison")
    places["zeroed"] = engine.add("say")
    engine.add("leave_blocks")
    engine.add("rpc", "poison")
    places["left"] = engine.add("say")
    (answers,) = slots.run([engine], root, slots.ONE_PROCESS, 300.0)
    assert answers[layers] == [2], (root / "engine.log").read_text(errors="replace")[-3000:]
    return {name: answers[place] for name, place in places.items()}


def test_another_requests_nan_is_zeroed(said: Said) -> None:
    assert said["zeroed"] == said["clean"]


def test_vllm_still_reads_it(said: Said) -> None:
    """Fails when vLLM's attention leaves it out itself: then the seam can go."""
    assert said["left"] != said["clean"]
