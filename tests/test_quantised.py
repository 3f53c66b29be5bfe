"""Quantised copies of the aligned model: their values, which are recognised, and what is refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from safelora_vllm.errors import CheckpointError, ProjectorCacheError
from safelora_vllm.projectors.build import build
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.projectors.checkpoint import Checkpoint
from safelora_vllm.projectors.samples import SAMPLES, columns
from safelora_vllm.served_model import check_served_model
from safelora_vllm.served_model.check import Comparison
from safelora_vllm.served_model.forms import read
from safelora_vllm.served_model.stored import Place, Stored
from tests import quantised
from tests.tiny import LLAMA, UP0, Pair, aligned_weights, base_weights, module_shapes, write_checkpoint

GROUP = 16
FORMS = quantised.forms(GROUP)
MODULES = list(module_shapes())
GUESSED = "is not a copy of the aligned model"
Change = Callable[[dict[str, Tensor]], object]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[ProjectorCache, Pair]:
    """A pair whose V is large enough for the few weights of a tiny model, and its cache."""
    folder = tmp_path_factory.mktemp("pair")
    before = base_weights()
    after = aligned_weights(before, step=0.2)
    base = write_checkpoint(folder / "base", before)
    pair = Pair(base, write_checkpoint(folder / "aligned", after), before, after)
    return ProjectorCache(build(base, pair.aligned, folder / "cache")), pair


@pytest.fixture
def copy(tmp_path: Path, made: tuple[ProjectorCache, Pair]) -> Callable[..., Path]:
    """Write a model in a form, with weights and tensors changed."""

    def write(
        form: str = "GPTQ, 4 bits", state: dict[str, Tensor] | None = None, change: Change | None = None,
        config: dict[str, Any] | None = None, quantise: Any = None,
    ) -> Path:  # fmt: skip
        if form.startswith("bitsandbytes"):
            pytest.importorskip("bitsandbytes")
        if form.startswith("compressed"):
            pytest.importorskip("compressed_tensors")
        found, own = FORMS[form]
        folder = tmp_path / f"copy-{len(list(tmp_path.iterdir()))}"
        quantised.write(
            folder,
            made[1].after if state is None else state,
            MODULES,
            LLAMA,
            config or found,
            quantise or own,
        )
        if change is not None:
            tensors = load_file(folder / "model.safetensors")
            change(tensors)
            save_file(tensors, folder / "model.safetensors")
        return folder

    return write


def everywhere(folder: Path, module: str) -> tuple[Stored, Tensor]:
    """What is stored of a module, and in which columns: all of them, one a sample."""
    shape = module_shapes()[module]
    where = columns(b"seed", module, *shape)
    return read(Place(Checkpoint(folder), module, shape, where)), where


def theirs(form: str, folder: Path, module: str) -> Tensor:
    """The same by the library's own code, or by the formula in plain loops."""
    parts = {
        name.removeprefix(f"{module}."): tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
        if name.startswith(f"{module}.")
    }
    if form.startswith("bitsandbytes, int8"):
        return parts["weight"].double() * parts["SCB"].double()[:, None] / 127
    if form.startswith("bitsandbytes"):
        import bitsandbytes.functional as bnb

        state = bnb.QuantState.from_dict(
            {name: tensor for name, tensor in parts.items() if name != "weight"}, device=torch.device("cpu")
        )
        # On a CPU the library is wrong where a row is not whole blocks: the blocks are given as rows.
        shape, state.shape = (
            state.shape,
            torch.Size((len(parts["weight"]) * 2 // state.blocksize, state.blocksize)),
        )
        return bnb.dequantize_4bit(parts["weight"], state).double().reshape(shape)
    if form.startswith("compressed-tensors, 4"):
        from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

        rows, width = parts["weight_shape"].tolist()
        codes = unpack_from_int32(parts["weight_packed"], 4, torch.Size((rows, width))).double()
        scale = parts["weight_scale"].double()
        if (zero := parts.get("weight_zero_point")) is not None:
            shape = torch.Size(scale.shape)
            codes = codes - unpack_from_int32(zero, 4, shape, packed_dim=0).double().repeat_interleave(
                GROUP, 1
            )
        return codes * scale.repeat_interleave(GROUP, 1)
    if form.startswith("compressed-tensors"):
        return parts["weight"].double() * parts["weight_scale"].double()
    rows, width = module_shapes()[module]
    order = (0, 4, 1, 5, 2, 6, 3, 7)
    found = torch.zeros(rows, width, dtype=torch.float64)
    for i in range(rows):
        for j in range(width):
            g = j // GROUP
            if form.startswith("AWQ"):
                shift = 4 * order[i % 8]
                q, z = (int(parts[n][k, i // 8]) >> shift & 15 for n, k in (("qweight", j), ("qzeros", g)))
            else:
                q = int(parts["qweight"][j // 8, i]) >> 4 * (j % 8) & 15
                z = (int(parts["qzeros"][g, i // 8]) >> 4 * (i % 8) & 15) + 1
            found[i, j] = (q - z) * float(parts["scales"][g, i])
    return found


@pytest.mark.parametrize("form", FORMS)
def test_values_are_those_of_the_library(form: str, copy: Callable[..., Path]) -> None:
    folder, module = copy(form), MODULES[1]
    stored, where = everywhere(folder, module)
    expected = theirs(form, folder, module).gather(1, where)
    # bitsandbytes computes in float32, the others are exact.
    assert (stored.values - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("form", FORMS)
def test_a_copy_is_served(
    form: str, copy: Callable[..., Path], made: tuple[ProjectorCache, Pair], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "vllm.safelora.served"):
        found = check_served_model(made[0], copy(form))
    assert isinstance(found, Comparison) and found.rounded and abs(found.position) < 0.1
    assert found.weights == len(MODULES) + 2 and "copy of the aligned one" in caplog.text
    assert check_served_model(made[0], copy(form), quick=True) is not None


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("quick", [False, True])
def test_a_copy_of_the_base_is_not(
    form: str, quick: bool, copy: Callable[..., Path], made: tuple[ProjectorCache, Pair]
) -> None:
    cache, pair = made
    if quick:  # one tiny layer does not tell them apart in every form; a whole model does
        with pytest.raises(ProjectorCacheError, match=GUESSED):
            check_served_model(cache, copy(form, {n: t + 0.5 for n, t in pair.after.items()}), quick=True)
        return
    with pytest.raises(ProjectorCacheError, match=rf"{GUESSED}: .*\d+% of the way .* the base"):
        check_served_model(cache, copy(form, pair.before))


def test_the_model_itself_needs_no_samples(made: tuple[ProjectorCache, Pair], tmp_path: Path) -> None:
    cache, pair = made
    assert check_served_model(cache, pair.aligned) is None
    halved = {name: tensor.half() for name, tensor in pair.after.items()}
    converted = check_served_model(cache, write_checkpoint(tmp_path / "half", halved, shards=2))
    assert converted is not None and converted.form == "F16" and converted.rounded
    with pytest.raises(ProjectorCacheError, match=GUESSED):
        check_served_model(cache, pair.base)


def test_a_cache_without_samples_says_what_to_do(
    made: tuple[ProjectorCache, Pair], copy: Callable[..., Path], tmp_path: Path
) -> None:
    cache, pair = made
    older = tmp_path / "older"
    older.mkdir()
    for file in cache.folder.iterdir():
        if file.name != SAMPLES:
            (older / file.name).write_bytes(file.read_bytes())
    assert ProjectorCache(older).id == cache.id, "they are no part of its identity"
    assert check_served_model(ProjectorCache(older), pair.aligned) is None
    with pytest.raises(ProjectorCacheError, match=r"no samples .* build it again, .*`trust_served_model`"):
        check_served_model(ProjectorCache(older), copy())
    (older / SAMPLES).write_bytes((cache.folder / SAMPLES).read_bytes()[:-1])
    with pytest.raises(ProjectorCacheError, match=r"aligned.samples is damaged"):
        check_served_model(ProjectorCache(older), copy())
    other = {"format": "safelora-samples", "version": "1", "seed": "00", "aligned": "f" * 64, "shapes": "{}"}
    save_file({"x": torch.zeros(1)}, older / SAMPLES, other)
    with pytest.raises(ProjectorCacheError, match="of the model ffffffffffff: expected"):
        check_served_model(ProjectorCache(older), copy())


@pytest.mark.parametrize("form", ["bitsandbytes, NF4", "bitsandbytes, int8"])
def test_what_rounding_does_not_explain(
    form: str, copy: Callable[..., Path], made: tuple[ProjectorCache, Pair]
) -> None:
    """bitsandbytes rounds to the nearest only: a small change of one weight is seen."""
    state = dict(made[1].after)
    noise = torch.randn(state[f"{UP0}.weight"].shape, generator=torch.Generator().manual_seed(5))
    state[f"{UP0}.weight"] = state[f"{UP0}.weight"] * (1 + 0.1 * noise)
    with pytest.raises(ProjectorCacheError, match=rf"1 of 16 weights differ .*{UP0}, .*% is expected"):
        check_served_model(made[0], copy(form, state))


def test_calibrated_copies_are_served_with_a_warning(
    copy: Callable[..., Path], made: tuple[ProjectorCache, Pair], caplog: pytest.LogCaptureFixture
) -> None:
    """Of a form whose tools round to other values than the nearest, up to a limit."""

    def elsewhere(share: float) -> dict[str, Tensor]:
        generator, state = torch.Generator().manual_seed(3), dict(made[1].after)
        for module in MODULES:
            weight = state[f"{module}.weight"]
            noise = torch.randn(weight.shape, generator=generator)
            state[f"{module}.weight"] = weight + share * noise * weight.norm() / noise.norm()
        return state

    found = check_served_model(made[0], copy(state=elsewhere(0.06)))
    assert found is not None and not found.rounded and found.ratio > 1.2
    assert [r.levelname for r in caplog.records] == ["WARNING"] and "smaller changes" in caplog.text
    with pytest.raises(ProjectorCacheError, match=GUESSED):
        check_served_model(made[0], copy(state=elsewhere(0.4)))


def rescaled(state: dict[str, Tensor], undone: bool = True) -> dict[str, Tensor]:
    """As AWQ does it: factors in the columns, and their inverses in what gives the inputs."""
    generator, state = torch.Generator().manual_seed(9), dict(state)

    def factors(name: str) -> Tensor:
        return torch.exp(0.5 * torch.randn(state[name].shape[1], generator=generator))

    for layer in ("model.layers.0", "model.layers.1"):
        for norm, readers in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            s = factors(f"{layer}.{readers[0]}.weight")
            state[f"{layer}.{norm}.weight"] = state[f"{layer}.{norm}.weight"] / s
            for reader in readers:
                state[f"{layer}.{reader}.weight"] = state[f"{layer}.{reader}.weight"] * s
        s = factors(f"{layer}.mlp.down_proj.weight")
        state[f"{layer}.mlp.up_proj.weight"] = state[f"{layer}.mlp.up_proj.weight"] / s[:, None]
        if undone:
            state[f"{layer}.mlp.down_proj.weight"] = state[f"{layer}.mlp.down_proj.weight"] * s
    return state


@pytest.mark.parametrize("form", ["AWQ, 4 bits", "compressed-tensors, int8"])
def test_factors_that_were_moved_between_layers(
    form: str, copy: Callable[..., Path], made: tuple[ProjectorCache, Pair]
) -> None:
    found = check_served_model(made[0], copy(form, rescaled(made[1].after)))
    assert found is not None and abs(found.position) < 0.25
    with pytest.raises(ProjectorCacheError, match=GUESSED):
        check_served_model(made[0], copy(form, rescaled(made[1].before)))
    with pytest.raises(ProjectorCacheError, match=GUESSED):
        check_served_model(made[0], copy(form, rescaled(made[1].after, undone=False)))


def test_the_second_version_of_gptq(copy: Callable[..., Path], made: tuple[ProjectorCache, Pair]) -> None:
    def second(weight: Tensor) -> quantised.Parts:
        return quantised.gptq(*quantised.round_groups(weight, 8, GROUP, True), bits=8, first=False)

    config = {**quantised.GPTQ, "bits": 8, "checkpoint_format": "gptq_v2"}
    found = check_served_model(made[0], copy(quantise=second, config=config))
    assert found is not None and found.form == "GPTQ, 8 bits and F32" and found.error < 0.01


def test_biases_of_zeros_and_scales_of_activations_are_no_weights(
    copy: Callable[..., Path], made: tuple[ProjectorCache, Pair]
) -> None:
    def more(tensors: dict[str, Tensor]) -> None:
        tensors |= {f"{UP0}.bias": torch.zeros(144), f"{UP0}.input_scale": torch.ones(())}

    assert check_served_model(made[0], copy(change=more)) is not None


UNREAD = {
    "a bias": (lambda t: t.update({f"{UP0}.bias": torch.ones(144)}), rf"has besides 1 tensors.*{UP0}\.bias"),
    "a layer more": (lambda t: t.update({"model.layers.9.x.weight": torch.ones(2, 2)}), "has besides 1 tens"),
    "a layer less": (lambda t: [t.pop(n) for n in list(t) if n.startswith(UP0)], rf"lacks 1 tensors.*{UP0}"),
    "a norm": (lambda t: t["model.norm.weight"].mul_(1.1), r"model\.norm\.weight.* differs"),
    "a norm of a layer": (
        lambda t: t["model.layers.0.input_layernorm.weight"].mul_(-1), "input_layernorm.* differs"
    ),
    "embeddings": (lambda t: t["model.embed_tokens.weight"].mul_(1.1), "embed_tokens, F32"),
    "NaN": (lambda t: t[f"{UP0}.scales"].mul_(torch.nan), "NaN or infinite"),
    "no scales": (lambda t: t.pop(f"{UP0}.scales"), rf"no tensor {UP0}\.scales"),
    "scales of another shape": (
        lambda t: t.update({f"{UP0}.scales": torch.ones(6, 8)}), r"expected .*\(6, 144\)\. This form cannot"
    ),
    "zeros of another shape": (
        lambda t: t.update({f"{UP0}.qzeros": torch.ones(6, 8, dtype=torch.int32)}), "expected .*cannot be"
    ),
    "columns in another order": (
        lambda t: t[f"{UP0}.g_idx"].copy_(t[f"{UP0}.g_idx"].flip(0)), r"another order \(g_idx\).*cannot be"
    ),
    "other zero points": (
        lambda t: t[f"{UP0}.qzeros"].add_(1), "zero points other than 8, which vLLM does not read.*cannot be"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNREAD)
def test_what_no_copy_has(case: str, copy: Callable[..., Path], made: tuple[ProjectorCache, Pair]) -> None:
    change, match = UNREAD[case]
    with pytest.raises((ProjectorCacheError, CheckpointError), match=match):
        check_served_model(made[0], copy(change=change))


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({**quantised.GPTQ, "quant_method": "new"}, "packed as `qweight` by 'new'"),
        ({**quantised.GPTQ, "bits": 3}, "packed in 3 bits"),
        ({**quantised.GPTQ, "bits": 2}, "packed in 2 bits"),
        ({**quantised.GPTQ, "dynamic": {"-:.*": {}}}, "GPTQ with a dynamic"),
        ({**quantised.GPTQ, "group_size": 7}, "groups of 7 of 96 columns"),
        ({**quantised.AWQ, "zero_point": False}, "AWQ without zero points"),
        ({**quantised.AWQ, "version": "gemv"}, "AWQ gemv"),
        ({}, "packed as `qweight` by ''"),
    ],
)
def test_forms_that_are_not_read(
    config: dict[str, Any], found: str, copy: Callable[..., Path], made: tuple[ProjectorCache, Pair]
) -> None:
    folder = copy()
    (folder / "config.json").write_text(json.dumps({**LLAMA, "quantization_config": config}))
    with pytest.raises(CheckpointError, match=rf"{found}.*cannot be compared.*`trust_served_model`"):
        check_served_model(made[0], folder)


def test_samples_are_in_columns_that_nobody_else_knows(
    made: tuple[ProjectorCache, Pair], tmp_path: Path
) -> None:
    cache, pair = made
    again = ProjectorCache(build(pair.base, pair.aligned, tmp_path / "again"))
    one, other = cache.samples(), again.samples()
    assert one is not None and other is not None and again.id == cache.id and one.seed != other.seed
    assert (again.folder / SAMPLES).stat().st_mode & 0o077 == 0
    name = f"{UP0}.weight"
    where = columns(one.seed, name, *one.shapes[name])
    assert torch.equal(one.values(name), pair.w(UP0).gather(1, where))
    assert not torch.equal(where, columns(other.seed, name, *one.shapes[name]))
    change = one.change(name)
    assert change is not None and torch.allclose(change, pair.v(UP0).gather(1, where), rtol=2**-8)
