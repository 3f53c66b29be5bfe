"""The folder of a projector cache while it is built: its place, its modes, its room, and its end."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from safelora_vllm.errors import CheckpointError, UsageError
from safelora_vllm.projectors import build as module
from safelora_vllm.projectors import partial_cache
from safelora_vllm.projectors.build import BuildOptions, build, select_modules
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.projectors.checkpoint import Checkpoint
from safelora_vllm.projectors.manifest import natural_order
from tests.tiny import Pair, module_shapes, write_checkpoint

ONE, NORM = ("q_proj",), "model.norm.weight"


def test_it_appears_whole_below_folders_that_are_missing_and_others_can_read_it(
    pair: Pair, tmp_path: Path
) -> None:
    before = os.umask(0o077)
    try:
        out = build(pair.base, pair.aligned, tmp_path / "a" / "b" / "cache", BuildOptions(modules=ONE))
    finally:
        os.umask(before)
    assert out.stat().st_mode & 0o7777 == 0o755, "the gate may be another user"
    assert [path.name for path in out.parent.iterdir()] == ["cache"]
    ProjectorCache(out).verify()


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), RuntimeError("of the device"), OSError("odd")], ids=repr
)
def test_whatever_ends_a_build_leaves_nothing(
    error: BaseException, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(module, "build_module", fail)
    with pytest.raises(type(error)) as told:
        build(pair.base, pair.aligned, tmp_path / "cache")
    assert told.value is error
    assert not list(tmp_path.iterdir())


def test_while_it_is_built_its_name_says_whose_it_is(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next build knows by it what a killed one left; it is hidden, and never taken for a cache.

    It differs for other modules, options and models. Nobody else may change what is in it.
    """
    seen: list[str] = []

    def fail(_: object, file: Path) -> None:
        assert file.parent.stat().st_mode & 0o7777 == 0o700
        seen.append(file.parent.name)
        raise ZeroDivisionError

    monkeypatch.setattr(partial_cache, "save_file", fail)
    other = write_checkpoint(tmp_path / "other", {**pair.after, NORM: pair.after[NORM] + 1})
    first = pair.base, pair.aligned, BuildOptions(modules=ONE)
    for base, aligned, options in (
        first, first, (pair.base, pair.aligned, BuildOptions(modules=("v_proj",))),
        (pair.base, pair.aligned, BuildOptions(modules=ONE, max_energy=0.5)), (pair.base, other, first[2]),
    ):  # fmt: skip
        with pytest.raises(ZeroDivisionError):
            build(base, aligned, tmp_path / "cache", options)
    assert all(re.fullmatch(r"\.cache\.partial-[0-9a-f]{32}", name) for name in seen)
    assert seen[0] == seen[1] and len(set(seen[1:])) == len(seen[1:]) == 4


def test_folders_of_other_builds_stay(pair: Pair, tmp_path: Path) -> None:
    """Those of the same place, which no build goes on with, are removed. A file is not one of them."""
    others = {
        ".other.partial-x",
        "x.cache.partial-x",
        "cache.partial-x",
        ".cache.partialx",
        ".cache.partial-x",
    }
    for name in (*others, f".cache.partial-{'0' * 32}", ".cache.partial-123-abc", ".cache.partial-123"):
        (tmp_path / name).mkdir()
    (file := tmp_path / ".cache.partial-file").touch()
    build(pair.base, pair.aligned, tmp_path / "cache", BuildOptions(modules=ONE))
    assert {path.name for path in tmp_path.iterdir()} == {"cache", file.name, *others}


def test_it_says_which_models_it_was_given(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(pair.base.parent)
    out = build(pair.base.name, pair.aligned.name, tmp_path / "cache", BuildOptions(modules=ONE))
    assert json.loads((out / "models.json").read_text()) == {
        "base": {"name": str(pair.base.resolve()), "revision": None},
        "aligned": {"name": str(pair.aligned.resolve()), "revision": None},
    }


def test_models_are_named_as_they_were_given_where_they_are_of_the_hub(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"org/base@v1": pair.base, "org/aligned": pair.aligned}
    monkeypatch.setattr(module, "Checkpoint", lambda model: Checkpoint(given[model]))
    out = build("org/base@v1", "org/aligned", tmp_path / "cache", BuildOptions(modules=ONE))
    assert json.loads((out / "models.json").read_text()) == {
        "base": {"name": "org/base", "revision": "v1"},
        "aligned": {"name": "org/aligned", "revision": None},
    }


@pytest.mark.parametrize(
    ("form", "exact"), [("auto", True), ("dense", True), ("factored", True), ("auto", False)]
)
def test_the_room_on_the_disk(
    form: str, exact: bool, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An element of 2 bytes; both bases in float32, and a share in float64 for each of their columns."""
    needed = 0
    for rows, cols in module_shapes().values():
        operator = {"auto": rows * min(rows, cols), "dense": rows * rows, "factored": rows * cols}[form]
        columns = math.ceil(0.5 * min(rows, cols))
        needed += (2 * operator if exact else 0) + columns * (4 * (rows + cols) + 8)
    assert len(set(module_shapes().values())) > 2

    class Started(Exception):
        """The disk was large enough."""

    def start(*_: object) -> None:
        raise Started

    monkeypatch.setattr(module, "build_module", start)
    usage = namedtuple("usage", "total used free")
    for free, ends in ((needed, Started), (needed - 1, UsageError)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage(0, 0, free))
        with pytest.raises(ends):
            options = BuildOptions(form=form, exact=exact, max_energy=0.5)
            build(pair.base, pair.aligned, tmp_path / "cache", options)


@pytest.mark.parametrize("energy", [1.0, 1e-6])
def test_the_ends_of_the_energies(energy: float) -> None:
    assert BuildOptions(max_energy=energy).max_energy == energy


@pytest.mark.parametrize("energy", [0.0, -0.1, 1.0 + 1e-9, float("nan"), float("inf")])
def test_energies_beyond_them(energy: float) -> None:
    with pytest.raises(UsageError, match=r"`max_energy` is .*: expected a share above 0 and at most 1"):
        BuildOptions(max_energy=energy)


def names_of(folder: Path, names: dict[str, tuple[int, ...]]) -> list[str]:
    """The modules that would be built of a model with tensors of these names and shapes."""
    state = {name: torch.ones(shape) for name, shape in names.items()}
    checkpoint = Checkpoint(write_checkpoint(folder, state))
    return select_modules(checkpoint, checkpoint, ())


SKIPPED = (
    "model.layers.0.mlp.gate", "model.layers.0.mlp.router", "model.layers.0.mlp.experts.0.up_proj",
    "model.layers.0.input_layernorm", "model.layers.0.conv1", "model.layers.0.rel_embed", "lm_head.0.x",
    "model.layers.0.q_proj.lora_A", "visual.blocks.0.attn.qkv", "vision_model.layers.0.fc1",
    "audio.layers.0.fc1", "tower.layers.0.fc1", "multi_modal.layers.0.fc1", "projector.0.linear",
    "connector.layers.0.fc", "resampler.layers.0.fc", "qformer.layer.0.fc", "merger.mlp.0.fc",
    "aligner.layers.0.fc", "talker.model.layers.0.mlp.fc", "token2wav.layers.0.fc", "codec.layers.0.fc",
    "tokenizer.layers.0.fc", "encoder.layers.0.fc", "protein_encoder.layers.0.fc", "vpm.layers.0.fc",
    "apm.layers.0.fc", "tts.layers.0.fc", "mlp1.0.fc",
)  # fmt: skip
TAKEN = (
    "model.layers.0.mlp.gate_proj", "model.layers.2.self_attn.q_proj", "model.layers.10.self_attn.q_proj",
    "transformer.h.0.mlp.c_fc",
)  # fmt: skip


def test_linear_layers_of_the_language_model_in_their_order(tmp_path: Path) -> None:
    shapes = {f"{name}.weight": (4, 4) for name in (*TAKEN[::-1], *SKIPPED)}
    shapes |= {"model.layers.0.stacked.weight": (2, 4, 4), "model.layers.0.flat.weight": (4,)}
    shapes |= {"model.layers.0.up_proj.bias": (4, 4), "model.head.weight": (4, 4)}
    assert names_of(tmp_path / "model", shapes) == list(TAKEN)


@pytest.mark.parametrize("name", SKIPPED)
def test_a_layer_that_is_not_of_it_by_itself(name: str, tmp_path: Path) -> None:
    """Each by itself: an adapter on it is refused, since there is nothing to compare it with."""
    with pytest.raises(CheckpointError, match="no linear layers in numbered blocks"):
        names_of(tmp_path / "model", {f"{name}.weight": (4, 4)})


@pytest.mark.parametrize("family", ["gpt2", "gpt_bigcode", "openai-gpt"])
def test_families_with_transposed_weights(family: str, pair: Pair, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", pair.after, config={"model_type": family})
    model = Checkpoint(folder)
    with pytest.raises(CheckpointError, match=f"^{family} models store transposed weights: not supported$"):
        select_modules(model, model, ())


def test_numbers_are_ordered_as_numbers_and_other_digits_as_letters() -> None:
    names = ["l.10.x", "l.9.x", "l.²", "l.1" + "0" * 5000, "l.a", "l.09.x"]
    assert sorted(names, key=natural_order) == [
        "l.1" + "0" * 5000, "l.a", "l.²", "l.09.x", "l.9.x", "l.10.x",
    ]  # fmt: skip
