"""What an opened projector cache keeps in memory, within which bounds, and what it reads again."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from safelora_vllm.errors import ProjectorCacheError
from safelora_vllm.projectors import cache as module
from safelora_vllm.projectors.cache import ProjectorCache, basis_bytes, columns_held
from safelora_vllm.projectors.placement import Demand, place
from safelora_vllm.projectors.projector import Parts
from tests.tiny import Pair, module_shapes


@pytest.fixture
def folder(build_cache: Callable[[str, str], Path], tmp_path: Path) -> Path:
    """A copy of the float32 cache that a test may damage."""
    return Path(shutil.copytree(build_cache("float32", "auto"), tmp_path / "cache"))


def held(cache: ProjectorCache) -> dict[str, torch.Tensor]:
    assert cache._held is not None
    return cache._held._tensors


def test_a_budget_is_used_up_to_its_last_byte_and_nothing_comes_after_what_does_not_fit(folder: Path) -> None:
    whole = ProjectorCache(folder)
    whole.load("cpu")
    sizes = {key: tensor.nbytes for key, tensor in held(whole).items()}
    kinds = ("energy", "input_basis", "output_basis", "projector", "delta")
    parts = [kinds.index(key.rpartition(".")[2]) for key in sizes]
    modules, total = len(module_shapes()), sum(sizes.values())
    assert len(sizes) == 4 * modules and parts[: 3 * modules] == sorted(parts[: 3 * modules])
    assert min(parts[3 * modules :]) == 3
    always, operators = list(sizes)[: 3 * modules], list(sizes)[3 * modules :]
    by_module = {key.rpartition(".")[0]: sizes[key] for key in operators}
    demand = Demand(sum(sizes[key] for key in always), by_module, working=0)
    order, tried = sorted(operators, key=sizes.__getitem__), []
    for number in range(modules):  # all of them fit sooner: then nothing needs a buffer
        exactly = demand.fixed + demand.passing + sum(sizes[key] for key in order[:number])
        for budget, count in ((exactly, number), (exactly - 1, number - 1)):
            if demand.least <= budget < demand.whole:
                cache = ProjectorCache(folder)
                cache.load("cpu", place(demand, budget))
                assert set(held(cache)) == {*always, *order[:count]}
                disk = sum(sizes[key] for key in order[count:])
                assert cache.resident_bytes() == {"device": total - disk, "host": 0, "disk": disk}
                tried.append(count)
    assert len(set(tried)) > modules // 2
    last = ProjectorCache(folder)
    last.load("cpu", place(demand, demand.whole))
    assert set(held(last)) == set(sizes)


def test_energies_stay_in_host_memory(folder: Path) -> None:
    cache = ProjectorCache(folder)
    cache.load("meta")
    where = {key.rpartition(".")[2]: tensor.device.type for key, tensor in held(cache).items()}
    assert where.pop("energy") == "cpu" and set(where.values()) == {"meta"}
    tiers = cache.resident_bytes()
    assert set(tiers) == {"device", "host", "disk"} and tiers["disk"] == 0
    assert tiers["host"] == 8 * sum(len(cache.projector(name).energies) for name in cache.modules)


@pytest.mark.parametrize("columns", [None, 2])
def test_what_is_read_has_memory_of_its_own_and_no_more(columns: int | None, folder: Path) -> None:
    cache = ProjectorCache(folder)
    name, entry = next(iter(cache.modules.items()))
    tensor = cache._shards.read(f"{name}.input_basis", entry.shard, columns)
    assert tensor.untyped_storage().nbytes() == tensor.nbytes
    assert columns is None or tensor.shape[1] == columns
    mapped = Path("/proc/self/maps").read_text()
    assert str(folder / entry.shard) not in mapped


def test_a_shard_that_is_replaced_while_it_is_verified_is_verified_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, digest = ProjectorCache(folder), hashlib.file_digest
    name, entry = next(iter(cache.modules.items()))
    shard, looks = folder / entry.shard, []

    def replaced(file: Any, kind: str) -> Any:
        found = digest(file, kind)
        if not looks:
            other = folder / "other"
            other.write_bytes(b"other" + shard.read_bytes()[5:])
            other.replace(shard)
        looks.append(1)
        return found

    monkeypatch.setattr(hashlib, "file_digest", replaced)
    cache.verify()
    with pytest.raises(ProjectorCacheError, match="its bytes are not those that the build wrote"):
        cache.projector(name).apply(torch.ones(entry.shape[0], 1))


def test_a_shard_is_hashed_once_as_long_as_its_file_stays(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, digest, looks = ProjectorCache(folder), hashlib.file_digest, []
    monkeypatch.setattr(hashlib, "file_digest", lambda *given: looks.append(1) or digest(*given))
    name, entry = next(iter(cache.modules.items()))
    for _ in range(3):
        cache.projector(name).apply(torch.ones(entry.shape[0], 1))
    assert len(looks) == 1
    os.utime(folder / entry.shard)
    cache.projector(name).apply(torch.ones(entry.shape[0], 1))
    assert len(looks) == 2


@pytest.mark.parametrize("damage", ["missing", "no header"])
def test_sizes_of_a_damaged_shard_are_told(damage: str, folder: Path) -> None:
    cache = ProjectorCache(folder)
    shard = folder / next(iter(cache._manifest.shards))
    if damage == "missing":
        shard.unlink()
    else:
        shard.write_bytes(b"x")
    with pytest.raises(ProjectorCacheError, match=rf"shard {shard.name} of the projector cache .* be used"):
        cache.tensor_bytes()


def test_a_tensor_that_a_shard_lacks_is_told_with_the_shard(folder: Path) -> None:
    cache = ProjectorCache(folder)
    shard = next(iter(cache._manifest.shards))
    with pytest.raises(ProjectorCacheError, match=f"shard {shard} of the projector cache"):
        cache.tensor("no.tensor", shard, torch.device("cpu"))


def test_spectra_are_kept_for_their_modules_energy_and_device_and_are_bounded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SPECTRA", 2)
    cache, cpu = ProjectorCache(folder), torch.device("cpu")
    group = cache.in_groups(cache.modules)[0]
    names = tuple(group)
    first = cache.group_spectrum(names, 0.2, cpu)
    assert cache.group_spectrum(names, 0.2, cpu) is first
    more = cache.group_spectrum(names, 0.9, cpu)
    assert more.taken.shape[-1] > first.taken.shape[-1]
    assert cache.group_spectrum(names, 0.9, torch.device("meta")).taken.device.type == "meta"
    assert len(cache._spectra) == 2 and (names, 0.2, cpu) not in cache._spectra, "the oldest went"
    assert len(cache.group_spectrum(names[:1], 0.9, cpu).modules) == 1


def test_sizes_of_bases_are_the_largest_and_are_kept_by_what_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ProjectorCache(folder)
    for parts in (
        Parts(False, 0.2, 0.4),
        Parts(False, 0.9, 0.4),
        Parts(False, 0.2, 0.9),
        Parts(True, 0.0, 0.0),
    ):
        for names in cache.in_groups(cache.modules):
            each = [
                basis_bytes(
                    cache.modules[name].shape,
                    *(
                        cache.projector(name).directions(energy, clipped=True)
                        for energy in (parts.input_energy, parts.output_energy)
                    ),
                )
                for name in names
            ]
            assert cache.basis_bytes(names, parts) == cache.basis_bytes(names[::-1], parts) == max(each)
    monkeypatch.setattr(module, "_REMEMBERED", 3)
    for names in cache.in_groups(cache.modules):
        cache.basis_bytes(names, Parts(False, 0.3, 0.3))
        assert len(cache._basis_bytes) <= 3


def test_the_bytes_of_copied_bases() -> None:
    """R in float32 with d_in rows, L in float64 with d_out."""
    assert basis_bytes((10, 100), 3, 5) == 3 * 100 * 4 + 5 * 10 * 8


@pytest.mark.parametrize(
    ("counts", "kept", "held"),
    [([1, 3], [3, 5], [3, 3]), ([1, 3], [2, 5], [1, 3]), ([2, 2], [2, 2], [2, 2]), ([0, 1], [1, 1], [1, 1])],
)
def test_columns_that_are_held(counts: list[int], kept: list[int], held: list[int]) -> None:
    assert columns_held(counts, kept) == held


def test_the_norm_of_all_modules(cache: ProjectorCache, pair: Pair) -> None:
    norms = [float(pair.w(name).norm()) for name in module_shapes()]
    assert cache.aligned_norm == pytest.approx(math.sqrt(sum(norm**2 for norm in norms)), rel=1e-12)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({"name": "org/m", "revision": "v1"}, ("org/m", "v1")),
        ({"name": "org/m", "revision": None}, ("org/m", None)),
        ({"name": "org/m", "revision": ""}, ("org/m", None)),
        ({"name": "org/m"}, None),
        ("org/m", None),
    ],
    ids=str,
)
def test_the_aligned_model_that_a_cache_was_made_for(given: Any, found: Any, folder: Path) -> None:
    other = {"name": "org/base", "revision": "v9"}
    (folder / "models.json").write_text(json.dumps({"base": other, "aligned": given}))
    model = ProjectorCache(folder).aligned_model
    assert (None if model is None else (model.name, model.revision)) == found


def test_one_module_without_an_operator_makes_a_cache_thin(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    assert not ProjectorCache(folder).thin
    manifest["modules"][3]["form"] = "thin"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert ProjectorCache(folder).thin
