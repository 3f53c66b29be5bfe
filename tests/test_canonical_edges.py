"""Vetting of tensors, and the canonical files: sentences, bounds and exact values, in memory."""

from __future__ import annotations

import io
import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load, save
from torch import Tensor

from safelora_vllm.adapters import canonical
from safelora_vllm.adapters.canonical import canonical_files, vet
from safelora_vllm.adapters.read import CONFIG, WEIGHTS, Limits, RawAdapter
from safelora_vllm.errors import AdapterRefused
from safelora_vllm.projectors.manifest import ModuleEntry
from safelora_vllm.safetensors_header import TensorHeader, read_header
from tests.tiny import key

# d_out and d_in; the two-digit names sort behind the others.
SHAPES = {"l.2.q": (6, 5), "l.10.q": (6, 5), "l.1.k": (3, 4), "l.1.v": (3, 4)}
MODULES = {name: ModuleEntry(name, shape, "dense", 1.0, 1.0, 0.5, "x") for name, shape in SHAPES.items()}
Tensors = dict[str, Tensor]
Told = list[tuple[str, str]]


def raw(tensors: Tensors, **changes: Any) -> RawAdapter:
    """An adapter of rank 2 and scale 2, as it is read."""
    weights = save(tensors)
    _, header = read_header(io.BytesIO(weights), len(weights), 2**20)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **changes}
    return RawAdapter(config, header, b"", weights, "")


def factors(rank: int, *names: str, shapes: dict[str, tuple[int, int]] = SHAPES) -> Tensors:
    """Both tensors of these modules (default: all), of ones."""
    found = {}
    for name in names or shapes:
        rows, columns = shapes.get(name, (6, 5))
        found[key(name, "A")], found[key(name, "B")] = torch.ones(rank, columns), torch.ones(rows, rank)
    return found


def told(adapter: RawAdapter, limits: Limits | None = None) -> Told:
    """Codes and sentences of the refusal."""
    with pytest.raises(AdapterRefused) as caught:
        vet(adapter, MODULES, limits or Limits())
    return [(reason.code, reason.message) for reason in caught.value.reasons]


# --- what passes


def test_weights_are_float32_with_the_scale_inside_b_and_in_the_order_of_names() -> None:
    config = {"rank_pattern": {"k": 1}, "alpha_pattern": {"l.10.q": 3}}
    tensors = factors(2) | factors(1, "l.1.k")
    tensors[key("l.2.q", "A")] = torch.arange(10.0).reshape(2, 5)
    weights = vet(raw({name: tensor.half() for name, tensor in tensors.items()}, **config), MODULES, Limits())
    assert list(weights) == ["l.1.k", "l.1.v", "l.2.q", "l.10.q"]
    assert {tensor.dtype for pair in weights.values() for tensor in pair} == {torch.float32}
    for module, scale in {"l.1.k": 4.0, "l.1.v": 2.0, "l.2.q": 2.0, "l.10.q": 1.5}.items():
        a, b = weights[module]
        assert torch.equal(a, tensors[key(module, "A")])
        assert torch.equal(b, scale * tensors[key(module, "B")])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_smallest_normal_values_pass(dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in factors(2, "l.2.q").items()}
    tiny = torch.finfo(dtype).tiny
    for value in (tiny, -tiny, 0.0, -0.0, torch.finfo(dtype).max):
        tensors[key("l.2.q", "B")][0, 0] = value
        assert list(vet(raw(tensors), MODULES, Limits())) == ["l.2.q"]


def test_the_largest_rank_and_the_most_bytes_that_pass() -> None:
    # All modules padded to rank 3, in bytes of float32: 4 · 3 · (5+6 + 5+6 + 4+3 + 4+3).
    adapter = raw(factors(2) | factors(3, "l.1.k"), rank_pattern={"k": 3})
    assert len(vet(adapter, MODULES, Limits(weights_bytes=432, max_rank=3))) == 4
    half = raw({n: t.half() if ".q." in n else t for n, t in factors(2).items()})  # 2 · (2·22 + 4·14)
    assert len(vet(half, MODULES, Limits(weights_bytes=200, max_rank=2))) == 4
    assert told(half, Limits(weights_bytes=199)) == [
        (
            "too_large",
            "padded to its largest rank 2 it takes 200 bytes, allowed are 199; train it with one rank",
        )
    ]
    assert told(adapter, Limits(weights_bytes=431)) == [
        (
            "too_large",
            "padded to its largest rank 3 it takes 432 bytes, allowed are 431; train it with one rank",
        )
    ]
    (code, text), *_ = told(adapter, Limits(max_rank=2))
    assert (code, text) == ("rank_too_large", "l.1.k: rank 3, allowed are 2 (--max-lora-rank)")


# --- what is refused

OTHER = {"l.2.q": (6, 9), "l.10.q": (6, 9), "l.1.k": (9, 4)}
LACK = "no projector, so the delta could not be projected"
PLAIN = "not an A or B of plain LoRA; expected are names like base_model.model.MODULE.lora_A.weight"
ONE = torch.ones(1)
Q = "l.2.q"


def odd(**changes: Tensor) -> Tensors:
    """The sound tensors of one module with others in place of A or B."""
    return factors(2, Q) | {key(Q, side): tensor for side, tensor in changes.items()}


TOLD: dict[str, tuple[Tensors, Told]] = {
    "nothing": ({}, [("empty", f"{WEIGHTS} holds no tensors")]),
    **{
        f"feature-{name}": (factors(2) | {name: ONE}, [(code, f"'{name}': {PLAIN}")])
        for name, code in {
            "a.lora_embedding_A": "embedding", "a.lora_magnitude_vector": "dora", "a.lora_bias": "bias",
            "a.modules_to_save.weight": "modules_to_save", "a.original_module.weight": "modules_to_save",
            "a.trainable_tokens_delta": "trainable_tokens", "a.bias": "bias", "a.weight": "unknown_tensor",
        }.items()
    },
    **{
        f"name-{number}": (factors(2) | {name: ONE}, [("unknown_tensor", f"{name!r}: {PLAIN}")])
        for number, name in enumerate((
            "l.2.q.lora_A.weight", "base_model.model.l.2.q.lora_A", "base_model.model.l.2.q.lora_C.weight",
            "base_model.model..lora_A", "xbase_model.model.l.2.q.lora_A.weight",
            "base_model.model.l.2.q.lora_A.weight.x", "base_model.model.l-2.lora_A.weight",
        ))
    },
    "names-in-order": (
        factors(2) | {name: torch.ones(1) for name in ("x.10", "x.9", "x.1", "w.bias")},
        [("bias", f"'w.bias': {PLAIN}"), ("unknown_tensor", f"'x.1', 'x.9', 'x.10': {PLAIN}")],
    ),
    "unpaired": (
        {name: tensor for name, tensor in factors(2).items()
         if name not in (key("l.10.q", "A"), key("l.2.q", "A"), key("l.1.k", "B"))},
        [("unpaired", "l.1.k: lora_A without its counterpart"),
         ("unpaired", "l.2.q, l.10.q: lora_B without its counterpart")],
    ),
    "no-projector": (factors(2, "l.1.k", "l.2.q", "m.9", "m.10"), [("no_projector", f"m.9, m.10: {LACK}")]),
    "few-projectors": (
        factors(2, "l.2.q", "m.9", "m.10"),
        [("no_projector", "2 of 3 modules have no projector: m.9, m.10. The projector cache has l.2.q, "
          "l.10.q, l.1.k and 1 more. The adapter looks made for another model, or the cache was built for "
          "other modules")],
    ),
    "other-model": (
        factors(2, *OTHER, shapes=OTHER) | factors(2, "l.1.v"),
        [("shape", "the adapter looks made for another model: 3 of 4 modules do not fit, such as l.1.k: "
          "B·A has the shape (9, 4), the model's weight (3, 4)")],
    ),
    "other-model-and-other-faults": (
        factors(2, *OTHER, shapes=OTHER) | factors(3, "l.1.v")
        | factors(2, "m.1", "m.2", "m.3", "m.4", "m.5"),
        [("shape", "the adapter looks made for another model: 3 of 4 modules do not fit, such as l.1.k: "
          "B·A has the shape (9, 4), the model's weight (3, 4)"),
         ("rank_mismatch", "l.1.v: rank 3, its config says 2"),
         ("no_projector", f"m.1, m.2, m.3 and 2 more: {LACK}")],
    ),
    "half-of-another-model": (
        factors(2, "l.2.q", "l.10.q", shapes=OTHER) | factors(2, "l.1.v") | factors(3, "l.1.k"),
        [("shape", "l.2.q, l.10.q: B·A has the shape (6, 9), the model's weight (6, 5)"),
         ("rank_mismatch", "l.1.k: rank 3, its config says 2")],
    ),
    "rank": (factors(3, Q), [("rank_mismatch", f"{Q}: rank 3, its config says 2")]),
    "lower-rank": (factors(1, Q), [("rank_mismatch", f"{Q}: rank 1, its config says 2")]),
    **{
        f"shape-{number}": (
            odd(A=a, B=b),
            [("shape", f"{Q}: A {tuple(a.shape)} and B {tuple(b.shape)} are not matrices of one rank")],
        )
        for number, (a, b) in enumerate((
            (torch.ones(5), torch.ones(6, 2)), (torch.ones(2, 5), torch.ones(6)),
            (torch.ones(2, 5, 1), torch.ones(6, 2)), (torch.ones(2, 5), torch.ones(6, 2, 1)),
            (torch.ones(3, 5), torch.ones(6, 2)), (torch.ones(0, 5), torch.ones(6, 0)),
        ))
    },
    "dtype-a": (odd(A=torch.ones(2, 5).double()), [("dtype", f"{Q}: F64; save it as one of F32, F16, BF16")]),
    "dtype-b": (
        odd(B=torch.ones(6, 2, dtype=torch.int8)), [("dtype", f"{Q}: I8; save it as one of F32, F16, BF16")]
    ),
    "nan": (
        odd(B=torch.full((6, 2), float("nan"))), [("non_finite", f"{key(Q, 'B')}: NaN or infinite values")]
    ),
    "values": (
        {
            name: tensor * (float("-inf") if ".q." in name else 1e-40 if ".k." in name else 1)
            for name, tensor in factors(2).items()
        } | {key("l.1.v", "A"): torch.full((2, 4), 1e-40).bfloat16()},
        [("subnormal", f"{key('l.1.k', 'A')}, {key('l.1.k', 'B')}, {key('l.1.v', 'A')}: subnormal values, "
          "which slow processors down; set them to zero"),
         ("non_finite", f"{key('l.2.q', 'A')}, {key('l.2.q', 'B')}, {key('l.10.q', 'A')} and 1 more: NaN or "
          "infinite values")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TOLD)
def test_the_sentences(name: str) -> None:
    tensors, expected = TOLD[name]
    assert told(raw(tensors)) == expected


def test_faults_of_config_names_shapes_and_cover_are_told_together() -> None:
    tensors = factors(3, "l.1.k", "l.2.q") | factors(2, "m.1") | {"x": ONE}
    assert [code for code, _ in told(raw(tensors))] == ["unknown_tensor", "rank_mismatch", "no_projector"]
    # Without a sound config nothing is known of ranks.
    found = [code for code, _ in told(raw(tensors, use_dora=True))]
    assert found == ["dora", "unknown_tensor", "no_projector"]
    assert [code for code, _ in told(raw(factors(2), use_dora=True))] == ["dora"]
    _, (_, text) = told(raw(factors(2, "l.2.q", "m.9", "m.10"), use_dora=True))
    assert text.startswith("2 of 3 modules have no projector: m.9, m.10. The projector cache has ")


def test_float16_may_have_subnormal_values_others_not() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        value = torch.finfo(dtype).tiny / 2
        tensors = odd(A=torch.full((2, 5), value, dtype=dtype))
        if dtype == torch.float16:
            assert list(vet(raw(tensors), MODULES, Limits())) == [Q]
        else:
            assert [code for code, _ in told(raw(tensors))] == ["subnormal"]


def test_ranks_are_compared_with_the_bound_before_the_config() -> None:
    (found,) = told(raw(factors(7, Q)), Limits(max_rank=6))
    assert found == ("rank_too_large", f"{Q}: rank 7, allowed are 6 (--max-lora-rank)")


def test_modules_that_vllm_would_leave_out_without_a_word() -> None:
    others = Limits(target_modules=("k_proj", "o"))
    (found,) = told(raw(factors(2, Q)), others)
    assert found == (
        "not_targeted", f"{Q}: no adapter may change it here: --lora-target-modules has k_proj, o"
    )  # fmt: skip
    assert list(vet(raw(factors(2, Q)), MODULES, Limits(target_modules=(Q.rpartition(".")[2],)))) == [Q]


def test_weights_that_the_library_does_not_load() -> None:
    sound = raw(factors(2, Q))
    broken = RawAdapter(sound.config, sound.header, b"", sound.weights[:-1], "")
    ((code, text),) = told(broken)
    assert code == "weights_malformed" and text.startswith(f"{WEIGHTS} cannot be loaded: ")
    assert len(text) > len(f"{WEIGHTS} cannot be loaded: ") + 5
    odd_header = RawAdapter(sound.config, {"x": TensorHeader("F32", (1,))}, b"", sound.weights, "")
    assert told(odd_header) == [("unknown_tensor", f"'x': {PLAIN}")], (
        "what is judged is the header that was read"
    )


# --- the two files


def golden(dtype: torch.dtype, **options: str) -> tuple[dict[str, Any], Tensors, bytes]:
    """The files of two modules of rank 1 and 2."""
    weights = {
        "l.2.q": (torch.tensor([[1.0, 2.0, 7.0]]), torch.tensor([[3.0], [4.0]])),
        "l.1.k": (torch.eye(2), torch.tensor([[5.0, 6.0]])),
    }
    files = canonical_files(weights, "org/model", dtype, **options)
    assert list(files) == [CONFIG, WEIGHTS]
    return json.loads(files[CONFIG]), load(files[WEIGHTS]), files[CONFIG]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_canonical_files(dtype: torch.dtype) -> None:
    config, tensors, text = golden(dtype)
    expected = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["l.1.k", "l.2.q"], "bias": "none",
        "task_type": "CAUSAL_LM", "base_model_name_or_path": "org/model",
    }  # fmt: skip
    assert list(config.items()) == list(expected.items()) and text == json.dumps(expected, indent=1).encode()
    assert golden(dtype, revision="")[0] == expected
    assert list(golden(dtype, revision="v1")[0].items()) == [*expected.items(), ("revision", "v1")]
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {
        key("l.2.q", "A"): [[1.0, 2.0, 7.0], [0.0, 0.0, 0.0]],
        key("l.2.q", "B"): [[3.0, 0.0], [4.0, 0.0]],
        key("l.1.k", "A"): [[1.0, 0.0], [0.0, 1.0]],
        key("l.1.k", "B"): [[5.0, 6.0]],
    }
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}


def test_the_canonical_weights_say_that_they_are_of_torch(tmp_path: Any) -> None:
    """Without it transformers refuses the file."""
    weights = {Q: (torch.ones(4, 3).T[:1].expand(1, 4), torch.ones(1, 6).T.requires_grad_())}
    path = tmp_path / WEIGHTS
    path.write_bytes(canonical_files(weights, "", torch.float32)[WEIGHTS])
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("side", "AB")
def test_values_that_do_not_fit_the_dtype(side: str) -> None:
    for value, dtype in ((70_000.0, torch.float16), (3.4e38, torch.bfloat16)):
        pair = [torch.ones(1, 1), torch.ones(1, 1)]
        pair["AB".index(side)][0, 0] = value
        with pytest.raises(AdapterRefused) as caught:
            canonical_files({"l.0": (torch.ones(1, 1), torch.ones(1, 1)), Q: (pair[0], pair[1])}, "", dtype)
        (reason,) = caught.value.reasons
        expected = ("non_finite", f"{Q}: lora_{side} does not fit into {dtype}")
        assert (reason.code, reason.message) == expected


_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_BITS = dict.fromkeys(_DTYPES, (torch.int16, 2**16)) | {torch.float32: (torch.int32, 2**32)}


@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
@given(data=st.data())
def test_a_flaw_is_what_the_floats_say(dtype: torch.dtype, data: st.DataObject) -> None:
    """Of any bits, most of them near zero, the smallest normal value, and infinity."""
    whole, count = _BITS[dtype]
    values = torch.tensor([0.0, torch.finfo(dtype).tiny, math.inf], dtype=dtype)
    edges = values.view(whole).tolist()
    near = st.builds(lambda edge, by: max(0, edge + by), st.sampled_from(edges), st.integers(-2, 2))
    unsigned = st.one_of(near, st.integers(0, count // 2 - 1))
    signed = st.builds(lambda size, negative: size - negative * count // 2, unsigned, st.booleans())
    bits = data.draw(st.lists(signed, min_size=1))
    values = torch.tensor(bits, dtype=whole).view(dtype)
    sizes = values.double().abs()
    expected = None
    if not sizes.isfinite().all():
        expected = "non_finite"
    elif dtype != torch.float16 and ((sizes > 0) & (sizes < torch.finfo(dtype).tiny)).any():
        expected = "subnormal"
    assert canonical._flaw(values) == expected


@pytest.mark.parametrize("place", [0, 6, 7, 8, 19])
@pytest.mark.parametrize(
    ("value", "flaw"), [(math.nan, "non_finite"), (-math.inf, "non_finite"), (1e-40, "subnormal")]
)
def test_a_flaw_is_found_in_every_block(
    place: int, value: float, flaw: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(canonical, "_BLOCK", 7)
    values = torch.ones(4, 5)
    assert canonical._flaw(values) is None
    values.view(-1)[place] = value
    assert canonical._flaw(values) == canonical._flaw(values.T) == flaw
    values.view(-1)[10] = math.inf  # in the middle block: it counts for more than a subnormal before it
    assert canonical._flaw(values) == "non_finite"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_largest_subnormal_value_is_one_and_the_next_is_not(dtype: torch.dtype) -> None:
    normal = torch.tensor([torch.finfo(dtype).tiny], dtype=dtype)
    below = (normal.view(_BITS[dtype][0]) - 1).view(dtype)
    assert canonical._flaw(normal) is None and canonical._flaw(below) == "subnormal"
