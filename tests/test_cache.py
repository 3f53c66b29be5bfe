"""The cache format and its reader."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from safelora_vllm.errors import PolicyError, ProjectorCacheError
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.projectors.checkpoint import Checkpoint
from safelora_vllm.projectors.manifest import parse_manifest
from safelora_vllm.projectors.placement import Placement
from tests.tiny import Pair, module_shapes

_MANIFEST_KEYS = [
    "format", "version", "base", "aligned", "dtype", "max_energy", "unchanged_modules", "shards", "modules",
]  # fmt: skip
_ENTRY_KEYS = ["name", "shape", "form", "norm", "aligned_norm", "null_similarity", "shard"]


@pytest.fixture
def folder(build_cache: Callable[[str, str], Path], tmp_path: Path) -> Path:
    """A copy of the float32 cache that a test may damage."""
    return Path(shutil.copytree(build_cache("float32", "auto"), tmp_path / "cache"))


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest in place."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_the_manifest_has_these_keys_and_no_others(folder: Path, pair: Pair) -> None:
    text = (folder / "manifest.json").read_bytes()
    manifest = json.loads(text)
    assert list(manifest) == _MANIFEST_KEYS
    assert (manifest["format"], manifest["version"]) == ("safelora-projectors", 2)
    assert (manifest["dtype"], manifest["max_energy"]) == ("float32", 0.95)
    assert all(list(entry) == _ENTRY_KEYS for entry in manifest["modules"])
    assert {e["name"]: tuple(e["shape"]) for e in manifest["modules"]} == module_shapes()
    for side, model in (("base", pair.base), ("aligned", pair.aligned)):
        identity = Checkpoint(model)
        assert manifest[side] == {"fingerprint": identity.fingerprint(), "sha256": identity.digest()}
    for name, shard in manifest["shards"].items():
        assert shard["sha256"] == hashlib.sha256((folder / name).read_bytes()).hexdigest()
    assert ProjectorCache(folder).id == hashlib.sha256(text).hexdigest()
    others = {"manifest.json", "models.json", "aligned.samples"}
    assert {file.name for file in folder.iterdir()} == {*others, *manifest["shards"]}


def test_verify_accepts_what_the_build_wrote_and_finds_a_flipped_byte(folder: Path) -> None:
    ProjectorCache(folder).verify()
    shard = next(folder.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ProjectorCacheError, match=rf"{shard.name} .* its bytes are not those"):
        ProjectorCache(folder).verify()


def test_a_missing_shard_is_found_by_verify_and_at_its_use(folder: Path) -> None:
    shard = next(folder.glob("*.safetensors"))
    shard.unlink()
    cache = ProjectorCache(folder)
    with pytest.raises(ProjectorCacheError, match="No such file"):
        cache.verify()
    name = next(iter(cache.modules))
    with pytest.raises(ProjectorCacheError, match="Restore it or build the cache again"):
        cache.projector(name).apply(torch.zeros(cache.modules[name].shape[0], 1))


@pytest.mark.parametrize(("name", "value"), [("version", 1), ("version", 4), ("format", "other")])
def test_another_format_or_version_is_refused(name: str, value: object, folder: Path) -> None:
    rewrite(folder, lambda manifest: manifest.update({name: value}))
    told = r"this release reads safelora-projectors version 2 or 3\. Build it again"
    with pytest.raises(ProjectorCacheError, match=told):
        ProjectorCache(folder)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[" * 100_000, "[]", "null", '"text"', "\\xff", '{"format": "x"}'],
    ids=lambda text: text[:9],
)
def test_a_damaged_manifest_is_refused(text: str, folder: Path) -> None:
    (folder / "manifest.json").write_text(text)
    with pytest.raises(ProjectorCacheError, match=r"manifest\.json is damaged"):
        ProjectorCache(folder)


@pytest.mark.parametrize("name", sorted({*_MANIFEST_KEYS} - {"base", "dtype", "max_energy"}))
def test_a_manifest_without_a_key_that_is_used_is_refused(name: str, folder: Path) -> None:
    rewrite(folder, lambda manifest: manifest.pop(name))
    with pytest.raises(ProjectorCacheError, match="is damaged"):
        ProjectorCache(folder)


@pytest.mark.parametrize("name", _ENTRY_KEYS)
def test_a_module_entry_without_a_key_is_refused(name: str, folder: Path) -> None:
    rewrite(folder, lambda manifest: manifest["modules"][0].pop(name))
    with pytest.raises(ProjectorCacheError, match="is damaged"):
        ProjectorCache(folder)


_ENTRY_VALUES: dict[str, list[Any]] = {
    "name": [5, None, ["x"]],
    "shape": [
        [0, 96], [96, 0], [96, -1], [2**31, 96], [96, 2**31], [96.0, 96], [True, 96], [96], [96, 96, 1], 96,
    ],
    "form": ["sparse", "", None],
    "shard": ["other.safetensors", "manifest.json", "", None],
    "later": [1],
    **{
        figure: [math.nan, math.inf, -1e-9, -1, True, "1", None]
        for figure in ("norm", "aligned_norm", "null_similarity")
    },
}  # fmt: skip
_SHARD_VALUES: dict[str, list[Any]] = {
    "tensor_bytes": [-1, 1.0, True, "1", None], "sha256": [5, None], "later": [1],
}  # fmt: skip
_MANIFEST_VALUES: dict[str, list[Any]] = {
    "aligned": ["x", {"fingerprint": 5}, {"fingerprint": None}, {}],
    "unchanged_modules": [[5], None, [["x"]]],
    "modules": [{"x": 1}, [1]],
    "shards": [[], {"x": 1}],
}


@pytest.mark.parametrize(
    ("where", "name", "value"),
    [
        (where, name, value)
        for where, table in (("module", _ENTRY_VALUES), ("shard", _SHARD_VALUES), ("top", _MANIFEST_VALUES))
        for name, values in table.items()
        for value in values
    ],
    ids=str,
)
def test_a_manifest_with_another_value_is_refused(
    where: str, name: str, value: Any, cache: ProjectorCache
) -> None:
    manifest = json.loads((cache.folder / "manifest.json").read_bytes())
    places = {"module": manifest["modules"][-1], "shard": next(iter(manifest["shards"].values()))}
    places.get(where, manifest)[name] = value
    with pytest.raises(ProjectorCacheError, match=r"manifest\.json is damaged .*; build the cache again"):
        parse_manifest(json.dumps(manifest).encode(), cache.folder)


def test_the_largest_and_smallest_values_of_a_manifest(cache: ProjectorCache) -> None:
    manifest = json.loads((cache.folder / "manifest.json").read_bytes())
    entry, shard = manifest["modules"][0], next(iter(manifest["shards"].values()))
    entry |= {"shape": [1, 2**31 - 1], "norm": 0, "aligned_norm": 0.0, "null_similarity": 1e308}
    shard["tensor_bytes"] = 0
    found = parse_manifest(json.dumps(manifest).encode(), cache.folder).modules[entry["name"]]
    assert (found.shape, found.norm, found.aligned_norm) == ((1, 2**31 - 1), 0, 0.0)


def test_a_module_that_is_there_twice_is_refused(folder: Path) -> None:
    """With other figures, either of which could be the wrong one."""
    rewrite(folder, lambda manifest: manifest["modules"].append({**manifest["modules"][0], "norm": 1.0}))
    with pytest.raises(ProjectorCacheError, match=r"is damaged .*twice"):
        ProjectorCache(folder)


@pytest.mark.parametrize("place", ["../{}", "./{}", "{}/", "more/{}", "/{}", "..//{}"])
def test_a_shard_elsewhere_is_refused(place: str, folder: Path) -> None:
    """Though the file is there, with the bytes that the manifest names."""
    shard = next(folder.glob("*.safetensors")).name
    (folder / "more").mkdir()
    shutil.copy(folder / shard, folder.parent)
    shutil.copy(folder / shard, folder / "more")
    name = place.format(f"{folder.parent}/{shard}"[1:] if place == "/{}" else shard)

    def move(manifest: dict[str, Any]) -> None:
        manifest["shards"][name] = manifest["shards"].pop(shard)
        for entry in manifest["modules"]:
            entry["shard"] = name if entry["shard"] == shard else entry["shard"]

    rewrite(folder, move)
    with pytest.raises(ProjectorCacheError, match="is no file beside the manifest"):
        ProjectorCache(folder)


def test_no_cache_there_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ProjectorCacheError, match=r"no projector cache in .*safelora-vllm build"):
        ProjectorCache(tmp_path / "none")


def test_only_the_aligned_model_may_be_served(cache: ProjectorCache, pair: Pair) -> None:
    cache.check_model(Checkpoint(pair.aligned).fingerprint(), pair.aligned)
    with pytest.raises(
        ProjectorCacheError, match=r"is not the aligned model .* Give that model, .*, not its base"
    ):
        cache.check_model(Checkpoint(pair.base).fingerprint(), pair.base)


@pytest.mark.parametrize("side", ["input_basis", "output_basis"])
def test_energy_up_to_what_was_kept(side: str, cache: ProjectorCache) -> None:
    for name in cache.modules:
        basis = getattr(cache.projector(name), side)
        kept = basis(0.95)
        assert 0 < basis(0.5).shape[1] < kept.shape[1]
        assert torch.equal(basis(0.5), kept[:, : basis(0.5).shape[1]]) and basis(0.0).shape[1] == 0
        # Orthonormal columns, in float32.
        assert torch.allclose(kept.T @ kept, torch.eye(kept.shape[1]), atol=1e-5)
        with pytest.raises(PolicyError, match=r"Build it again with a `max_energy` of 0\.999 or more"):
            basis(0.999)


def test_a_share_that_is_reached_up_to_rounding_is_reached(cache: ProjectorCache) -> None:
    """A share is a sum of float64 values, whose last digits depend on the machine: 1e-9 is left to them."""
    for name in cache.modules:
        projector = cache.projector(name)
        for k, share in enumerate(projector.energies.tolist(), start=1):
            assert [projector.directions(share + d, clipped=True) for d in (-5e-10, 0.0, 5e-10)] == [k] * 3
        first, second = projector.energies[:2].tolist()
        assert second - first > 1e-8
        assert [projector.directions(first + d) for d in (5e-9, -5e-9)] == [2, 1]
        assert projector.directions(1e-12) == 1 and projector.directions(0.0) == 0


@pytest.mark.parametrize("form", ["dense", "factored"])
def test_both_bases_are_the_first_singular_vectors(
    form: str, build_cache: Callable[[str, str], Path], pair: Pair
) -> None:
    """Of wide, square and tall modules, column by column, with the same energies."""
    cache = ProjectorCache(build_cache("bfloat16", form))
    assert {(d_out > d_in) - (d_out < d_in) for d_out, d_in in module_shapes().values()} == {-1, 0, 1}
    for name, entry in cache.modules.items():
        projector = cache.projector(name)
        left, sizes, right = torch.linalg.svd(pair.v(name), full_matrices=False)
        shares = (sizes**2).cumsum(0) / (sizes**2).sum()
        k = int((shares < 0.95).sum()) + 1
        assert projector.directions(0.95) == k
        energy = cache.tensor(f"{name}.energy", entry.shard, torch.device("cpu"))
        assert energy.dtype == torch.float64
        assert torch.allclose(energy, shares[:k], rtol=0, atol=1e-12)  # float64 on both sides
        for found, exact in ((projector.output_basis(0.95), left), (projector.input_basis(0.95), right.T)):
            assert found.dtype == torch.float32
            overlap = (found.double() * exact[:, :k]).sum(0).abs()
            # Rounded to float32, 6e-8 per value, after float64 with gaps between the squared sizes.
            assert torch.allclose(overlap, torch.ones(k, dtype=torch.float64), rtol=0, atol=1e-6)


def test_only_the_directions_of_a_policy_are_held_and_more_are_read(folder: Path) -> None:
    whole, some = ProjectorCache(folder), ProjectorCache(folder)
    whole.load("cpu")
    some.load("cpu", None, 0.3, 0.0)
    assert some.resident_bytes()["device"] < whole.resident_bytes()["device"]
    for name in whole.modules:
        for energy in (0.2, 0.3, 0.8):
            bases = [
                (projector.input_basis(energy), projector.output_basis(energy))
                for projector in (whole.projector(name), some.projector(name))
            ]
            assert all(torch.equal(a, b) for a, b in zip(*bases, strict=True))


def test_a_damaged_shard_is_noticed_at_its_first_use(folder: Path) -> None:
    cache = ProjectorCache(folder)
    name, entry = next(iter(cache.modules.items()))
    shard = folder / entry.shard
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ProjectorCacheError, match="its bytes are not those that the build wrote"):
        cache.projector(name).apply(torch.ones(entry.shape[0], 1))


@pytest.mark.parametrize("keep", [False, True])
def test_a_shard_damaged_while_serving_is_noticed_or_does_not_matter(folder: Path, keep: bool) -> None:
    """What stays on disk is verified again when its file changes; what is in memory is not read again."""
    cache = ProjectorCache(folder)
    cache.verify()
    cache.load("cpu", None if keep else Placement(0, 0, 0, 0, 0, 0, frozenset(), frozenset()))
    name, entry = next(iter(cache.modules.items()))
    b = torch.ones(entry.shape[0], 2)
    before, shard = cache.projector(name).apply(b), folder / entry.shard
    intact = shard.read_bytes()
    with shard.open("r+b") as file:  # in place, as a failing disk would
        file.seek(len(intact) - 9)
        file.write(b"\x7f\x7f\x7f")
    if keep:
        shard.write_bytes(intact[:100])
        assert torch.equal(cache.projector(name).apply(b), before)
        return
    for damage in (shard.read_bytes(), intact[:-8], intact[:100], b""):
        shard.write_bytes(damage)
        with pytest.raises(ProjectorCacheError, match="bytes are not those"):
            cache.projector(name).apply(b)
    shard.unlink()
    with pytest.raises(ProjectorCacheError, match="No such file"):
        cache.projector(name).apply(b)
    shard.write_bytes(intact)
    assert torch.equal(cache.projector(name).apply(b), before)
