"""Building caches: what comes out, what is refused, and what is left when it goes wrong."""

from __future__ import annotations

import errno
import re
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor

from safelora_vllm.cli.main import main
from safelora_vllm.errors import CheckpointError, UsageError
from safelora_vllm.projectors import build as module
from safelora_vllm.projectors import partial_cache
from safelora_vllm.projectors.build import BuildOptions, build
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.projectors.checkpoint import Checkpoint
from tests import reference
from tests.tiny import LLAMA, Q0, UP0, Pair, aligned_weights, base_weights, module_shapes, write_checkpoint

Make = Callable[..., Path]


@pytest.fixture
def make(pair: Pair, tmp_path: Path) -> Make:
    """Build the pair's cache, with another base or aligned checkpoint where given."""

    def run(base: Path | None = None, aligned: Path | None = None, **options: Any) -> Path:
        return build(base or pair.base, aligned or pair.aligned, tmp_path / "cache", BuildOptions(**options))

    return run


def spoiled(folder: Path, side: str, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A checkpoint of the pair after a change of its state."""
    state = base_weights() if side == "base" else aligned_weights(base_weights())
    change(state)
    return write_checkpoint(folder / "spoiled", state)


@pytest.mark.parametrize(
    ("dtype", "form"), [("float32", "dense"), ("bfloat16", "factored"), ("float16", "auto")]
)
def test_the_command_builds_what_the_function_builds(
    dtype: str, form: str, make: Make, pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "by-command"
    options = ["--out", str(out), "--exact", "--dtype", dtype, "--form", form]
    assert main(["build", "--base", str(pair.base), "--aligned", str(pair.aligned), *options]) == 0
    assert str(out) in capsys.readouterr().out
    by_command, by_function = ProjectorCache(out), ProjectorCache(make(exact=True, dtype=dtype, form=form))
    assert by_command.id == by_function.id
    assert set(by_command.modules) == set(module_shapes())
    forms = {e.form for e in by_command.modules.values()}
    assert forms == ({form} if form != "auto" else {"dense", "factored"})
    for entry in by_command.modules.values():
        name = "projector" if entry.form == "dense" else "delta"
        stored = by_command.tensor(f"{entry.name}.{name}", entry.shard, torch.device("cpu"))
        assert str(stored.dtype) == f"torch.{dtype}"
        v = pair.v(entry.name)
        exact = reference.operator(v) if entry.form == "dense" else v
        # Computed in float64 and rounded once; float16 also has an absolute smallest step.
        assert torch.allclose(stored.double(), exact, rtol=torch.finfo(stored.dtype).eps, atol=6e-8)


def test_the_automatic_form_is_the_cheaper_product(make: Make) -> None:
    for entry in ProjectorCache(make(exact=True)).modules.values():
        assert entry.form == ("dense" if entry.shape[0] <= entry.shape[1] else "factored")


def test_a_sharded_checkpoint_gives_the_same_cache(make: Make, pair: Pair, tmp_path: Path) -> None:
    single = ProjectorCache(build(pair.base, pair.aligned, tmp_path / "single"))
    base = write_checkpoint(tmp_path / "base", pair.before, shards=3)
    aligned = write_checkpoint(tmp_path / "aligned", pair.after, shards=4)
    assert ProjectorCache(make(base, aligned)).id == single.id


def test_modules_by_their_last_part_or_whole_name(make: Make) -> None:
    cache = ProjectorCache(make(modules=("v_proj", Q0)))
    assert list(cache.modules) == [Q0, *(f"model.layers.{i}.self_attn.v_proj" for i in range(2))]


def test_many_small_shards_hold_the_same(make: Make, pair: Pair, tmp_path: Path, monkeypatch: Any) -> None:
    options = BuildOptions(exact=True)
    whole = ProjectorCache(build(pair.base, pair.aligned, tmp_path / "whole", options))
    monkeypatch.setattr(module, "_SHARD_BYTES", 30_000)
    split = ProjectorCache(make(exact=True))
    split.verify()
    assert len(list(split.folder.glob("*.safetensors"))) > 4
    b = torch.randn(96, 4)
    assert torch.equal(split.projector(Q0).apply(b), whole.projector(Q0).apply(b))


def test_unchanged_modules_are_listed_and_have_no_projector(make: Make, pair: Pair, tmp_path: Path) -> None:
    weight = f"{UP0}.weight"
    aligned = spoiled(tmp_path, "aligned", lambda state: state.update({weight: pair.before[weight]}))
    cache = ProjectorCache(make(aligned=aligned))
    assert cache.unchanged == {UP0} and UP0 not in cache.modules
    assert len(cache.modules) == len(module_shapes()) - 1


_IDENTICAL = r"identical weights \(V = 0\).*before alignment as the base"


@pytest.mark.parametrize("how", ["same", "link", "copy", "sharded"])
def test_identical_models(
    how: str, make: Make, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = pair.aligned if how == "same" else tmp_path / "base"
    if how == "link":
        base.symlink_to(pair.aligned)
    elif how == "copy":
        shutil.copytree(pair.aligned, base)
    elif how == "sharded":
        write_checkpoint(base, pair.after, shards=3)
    monkeypatch.setattr(module, "build_module", lambda *_: pytest.fail("worked"))
    if how in ("same", "link"):
        monkeypatch.setattr(module.Checkpoint, "raw", lambda *_: pytest.fail("read"))
    with pytest.raises(CheckpointError, match=_IDENTICAL):
        make(base=base)
    assert not list(tmp_path.glob("*cache*"))  # neither the folder nor a hidden part of it


def test_models_that_differ_where_no_sample_is_taken(make: Make, pair: Pair, tmp_path: Path) -> None:
    """Equal fingerprints are no proof: all of both is compared then."""

    def change(state: dict[str, Tensor]) -> None:
        state[f"{UP0}.weight"][3, 3] += 1.0

    base = spoiled(tmp_path, "aligned", change)
    assert Checkpoint(base).fingerprint() == Checkpoint(pair.aligned).fingerprint()
    assert set(ProjectorCache(make(base=base)).modules) == {UP0}


def test_models_that_differ_only_in_what_has_no_projector(make: Make, tmp_path: Path) -> None:
    base = spoiled(tmp_path, "aligned", lambda state: state["lm_head.weight"].add_(1.0))
    with pytest.raises(CheckpointError, match=_IDENTICAL):
        make(base=base)
    assert not list(tmp_path.glob("*cache*"))


_UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("side", ["base", "aligned"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(side: str, bad: float, make: Make, tmp_path: Path) -> None:
    folder = spoiled(tmp_path, side, lambda state: state[_UP].fill_(bad))
    with pytest.raises(CheckpointError, match=rf"{_UP} has NaN or infinite values"):
        make(**{side: folder})
    assert not list(tmp_path.glob("*cache*"))


def test_a_quantised_checkpoint(make: Make, tmp_path: Path) -> None:
    folder = spoiled(tmp_path, "aligned", lambda state: state.update({_UP: state[_UP].to(torch.int8)}))
    with pytest.raises(CheckpointError, match=r"is I8; .* unquantised"):
        make(aligned=folder)


def test_a_module_that_the_base_lacks(make: Make, tmp_path: Path) -> None:
    folder = spoiled(tmp_path, "base", lambda state: state.pop(_UP))
    with pytest.raises(CheckpointError, match=rf"has no {_UP}, which .* has"):
        make(base=folder)


def test_a_module_that_the_aligned_model_lacks(make: Make, tmp_path: Path) -> None:
    folder = spoiled(tmp_path, "aligned", lambda state: state.pop(_UP))
    with pytest.raises(CheckpointError, match=rf"has no {_UP}, which .* has"):
        make(aligned=folder)


def test_shapes_that_differ(make: Make, tmp_path: Path) -> None:
    folder = spoiled(tmp_path, "base", lambda state: state.update({_UP: torch.randn(100, 96)}))
    with pytest.raises(CheckpointError, match=r"is \(100, 96\) in the base and \(144, 96\) in the aligned"):
        make(base=folder)


def test_architectures_that_differ_or_are_transposed(make: Make, pair: Pair, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "mistral", pair.before, config={**LLAMA, "model_type": "mistral"})
    with pytest.raises(CheckpointError, match=r"different architectures: .* is mistral, .* is llama"):
        make(base=other)
    gpt2 = write_checkpoint(tmp_path / "gpt2", pair.before, config={"model_type": "gpt2"})
    with pytest.raises(CheckpointError, match="transposed"):
        make(base=gpt2, aligned=gpt2)


def test_modules_that_are_not_there(make: Make) -> None:
    with pytest.raises(
        CheckpointError, match=r"no linear layers named \['qkv'\]; it has \['down_proj', 'gate"
    ):
        make(modules=("q_proj", "qkv"))
    for part in ("lm_head", "embed_tokens", "norm", "proj"):
        with pytest.raises(CheckpointError, match="no linear layers named"):
            make(modules=(part,))


def test_an_existing_folder_is_not_touched(make: Make, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    with pytest.raises(UsageError, match="exists: remove it, or give another folder as `out`"):
        make()
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize(
    "options", [{"dtype": "int8"}, {"form": "sparse"}, {"max_energy": 0.0}, {"max_energy": 1.1}], ids=str
)
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=rf"`{next(iter(options))}` is "):
        BuildOptions(**options)


def test_a_disk_that_is_too_small_is_known_before_the_work(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(10**6, 10**6 - 1000, 1000))
    monkeypatch.setattr(module, "build_module", lambda *_: pytest.fail("worked"))
    with pytest.raises(UsageError, match=r"needs up to [\d,]{6,} bytes, .* has 1,000 free"):
        make()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", ["auto", "dense", "factored"])
def test_the_room_that_is_asked_for_is_enough_and_not_twice_what_is_needed(
    form: str, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a V whose singular values are about equal; where a few hold most, less is needed."""
    usage, free = namedtuple("usage", "total used free"), 1
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(10**9, 0, free))
    with pytest.raises(UsageError, match=r"or give fewer `modules` or a smaller `max_energy`") as refused:
        make(exact=True, form=form, modules=(Q0,))
    found = re.search(r"up to ([\d,]+) bytes", str(refused.value))
    assert found is not None
    asked = free = int(found[1].replace(",", ""))
    cache = ProjectorCache(make(exact=True, form=form, modules=(Q0,)))
    assert asked / 2 < cache.resident_bytes()["disk"] <= asked


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.ENOSPC, "Auf dem Gerät ist kein Speicherplatz mehr verfügbar"),
        # What safetensors really raises: its own class, the system's words in its message.
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["os", "os in another language", "safetensors"],
)
def test_a_disk_that_fills_up_during_the_work(
    error: Exception, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr(partial_cache, "save_file", full)
    with pytest.raises(UsageError, match="no room left on the disk"):
        make()
    assert not list(tmp_path.iterdir())


def test_leftovers_of_other_builds_go(make: Make, tmp_path: Path) -> None:
    """Of a release before the lock, of other options, and a file in their place."""
    for name in (".cache.partial-123-abc", f".cache.partial-{'0' * 32}"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").touch()
    (tmp_path / ".cache.partial-file").touch()
    ProjectorCache(make()).verify()
    assert {path.name for path in tmp_path.iterdir()} == {"cache", ".cache.partial-file"}


def test_an_aligned_module_of_zeros(make: Make, tmp_path: Path) -> None:
    folder = spoiled(tmp_path, "aligned", lambda state: state[_UP].zero_())
    cache = ProjectorCache(make(aligned=folder))
    name = _UP.removesuffix(".weight")
    assert name in cache.unchanged and name not in cache.modules, "no adapter has a size relative to it"
