"""What a refusal says: one sentence for each cause, and whether the adapter is another model's."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from safelora_vllm.errors import AdapterRefused, CheckpointError
from safelora_vllm.gate.admit import GateSettings
from safelora_vllm.projectors.manifest import natural_order
from safelora_vllm.projectors.weight_files import read_header
from safelora_vllm.safetensors_header import LONGEST_SIGN, other_format
from safelora_vllm.safetensors_header import read_header as read_weights
from safelora_vllm.store import PublishedStore
from tests.refusing import judge
from tests.tiny import Q0, Draft, key, module_shapes, safetensors_bytes

CONFIG = "adapter_config.json"
V0, V1 = (f"model.layers.{layer}.self_attn.v_proj" for layer in range(2))
Said = Callable[[Draft], list[tuple[str, str]]]


@pytest.fixture
def said(tmp_path: Path, gate: GateSettings, store: PublishedStore) -> Said:
    """The refusal of a draft: codes and sentences."""

    def answer(draft: Draft) -> list[tuple[str, str]]:
        report = judge(draft.write(tmp_path / "adapter"), gate, store).report
        return [(reason.code, reason.message) for reason in report.reasons]

    return answer


def of_layers(count: int, modules: int = 0) -> Draft:
    """The sound adapter with the first ``modules`` modules moved to layers that the model does not have."""
    draft = Draft()
    for number, module in enumerate(list(module_shapes())[:modules]):
        draft.move(module, f"model.layers.{number + count}.self_attn.q_proj")
    return draft


# --- another model


def resized(*modules: str) -> Draft:
    """The sound adapter with the factors of a smaller model in these modules."""
    draft = Draft()
    for module in modules:
        draft.tensors[key(module, "A")] = torch.ones(4, 64)
        draft.tensors[key(module, "B")] = torch.ones(48, 4)
    return draft


@pytest.mark.parametrize("count", [8, 14])
def test_an_adapter_of_other_shapes_looks_made_for_another_model(count: int, said: Said) -> None:
    modules = sorted(module_shapes(), key=natural_order)
    assert said(resized(*modules[-count:])) == [
        (
            "shape",
            f"the adapter looks made for another model: {count} of 14 modules do not fit, such as "
            f"{modules[-count]}: B·A has the shape (48, 64), the model's weight "
            f"{module_shapes()[modules[-count]]}",
        )
    ]


def test_half_of_the_modules_are_not_most(said: Said) -> None:
    modules = [module for module in module_shapes() if not module.startswith("model.layers.0")]
    assert len(modules) == 7
    found = said(resized(*modules))
    assert {code for code, _ in found} == {"shape"} and not any("another model" in text for _, text in found)
    up = "model.layers.1.mlp.gate_proj, model.layers.1.mlp.up_proj"
    assert ("shape", f"{up}: B·A has the shape (48, 64), the model's weight (144, 96)") in found


def test_modules_without_a_projector_may_be_those_of_another_model(said: Said) -> None:
    ((code, text),) = said(of_layers(20, modules=8))
    assert code == "no_projector" and text == (
        "8 of 14 modules have no projector: model.layers.20.self_attn.q_proj, "
        "model.layers.21.self_attn.q_proj, model.layers.22.self_attn.q_proj and 5 more. The projector "
        "cache has model.layers.0.mlp.down_proj, model.layers.0.mlp.gate_proj, "
        "model.layers.0.mlp.up_proj and 11 more. The adapter looks made for "
        "another model, or the cache was built for other modules"
    )


def test_half_of_the_modules_without_a_projector_are_not_most(said: Said) -> None:
    # The names of layers 8 to 12 sort as numbers do.
    assert said(of_layers(8, modules=7)) == [
        (
            "no_projector",
            "model.layers.8.self_attn.q_proj, model.layers.9.self_attn.q_proj, "
            "model.layers.10.self_attn.q_proj and 4 more: no projector, so the delta could not be projected",
        )
    ]


def test_another_model_is_said_once(said: Said) -> None:
    """Of a larger model with more layers: neither its shapes nor most of its names are this model's."""
    draft = resized(*module_shapes())
    for layer in range(2, 6):
        for module in ("q_proj", "k_proj", "v_proj", "o_proj"):
            for side, shape in (("A", (4, 64)), ("B", (48, 4))):
                draft.tensors[key(f"model.layers.{layer}.self_attn.{module}", side)] = torch.ones(shape)
    (shape, first), (lacking, second) = said(draft)
    assert (shape, lacking) == ("shape", "no_projector")
    assert "14 of 14 modules do not fit" in first and "another model" not in second
    assert second.endswith("and 13 more: no projector, so the delta could not be projected")


# --- one sentence for each cause


def test_tensors_that_are_not_plain(said: Said) -> None:
    draft = Draft()
    for module in (V0, V1):
        for side in "AB":
            draft.rename(key(module, side), f"{module}.lora_{side}.weight")
    (code, text), *more = said(draft)
    assert code == "unknown_tensor" and not more
    assert text == (
        f"'{V0}.lora_A.weight', '{V0}.lora_B.weight', '{V1}.lora_A.weight' and 1 more: not an A or B of "
        "plain LoRA; expected are names like base_model.model.MODULE.lora_A.weight"
    )


def test_factors_without_the_other(said: Said) -> None:
    draft = Draft()
    for module in (V1, V0):
        del draft.tensors[key(module, "A")]
    del draft.tensors[key(Q0, "B")]
    assert said(draft) == [
        ("unpaired", f"{Q0}: lora_A without its counterpart"),
        ("unpaired", f"{V0}, {V1}: lora_B without its counterpart"),
    ]


def test_ranks_and_dtypes(said: Said) -> None:
    draft = Draft()
    for module in (V0, V1):
        draft.tensors[key(module, "A")] = torch.ones(6, 96)
        draft.tensors[key(module, "B")] = torch.ones(32, 6)
    draft.tensors[key(Q0, "A")] = draft.tensors[key(Q0, "A")].double()
    assert said(draft) == [
        ("dtype", f"{Q0}: F64; save it as one of F32, F16, BF16"),
        ("rank_mismatch", f"{V0}, {V1}: rank 6, its config says 4"),
    ]


def test_ranks_that_are_too_large_and_factors_of_two_ranks(said: Said) -> None:
    draft = Draft()
    draft.config["r"] = 513
    for module in module_shapes():
        rows, columns = module_shapes()[module]
        draft.tensors[key(module, "A")] = torch.ones(513, columns)
        draft.tensors[key(module, "B")] = torch.ones(rows, 513)
    draft.tensors[key(Q0, "B")] = torch.ones(96, 4)
    draft.tensors[key(V0, "B")] = torch.ones(32)
    assert sorted(said(draft)) == [
        (
            "rank_too_large",
            "model.layers.0.mlp.down_proj, model.layers.0.mlp.gate_proj, model.layers.0.mlp.up_proj and 9 "
            "more: rank 513, allowed are 512 (--max-lora-rank)",
        ),
        ("shape", f"{Q0}: A (513, 96) and B (96, 4) are not matrices of one rank"),
        ("shape", f"{V0}: A (513, 96) and B (32,) are not matrices of one rank"),
    ]


def test_factors_of_rank_0(said: Said) -> None:
    draft = Draft()
    draft.tensors[key(Q0, "A")], draft.tensors[key(Q0, "B")] = torch.ones(0, 96), torch.ones(96, 0)
    assert said(draft) == [("shape", f"{Q0}: A (0, 96) and B (96, 0) are not matrices of one rank")]


def test_values(said: Said) -> None:
    draft = Draft()
    for module in (V1, V0):
        draft.tensors[key(module, "A")][0, 0] = float("nan")
    draft.tensors[key(Q0, "B")][0, 0] = 1e-40
    assert said(draft) == [
        ("subnormal", f"{key(Q0, 'B')}: subnormal values, which slow processors down; set them to zero"),
        ("non_finite", f"{key(V0, 'A')}, {key(V1, 'A')}: NaN or infinite values"),
    ]


def test_keys_and_patterns_of_the_config(said: Said) -> None:
    draft = Draft()
    draft.config.update({"x3": 1, "x1": True, "x2": "y", "x0": 1, "empty": [], "zero": 0})
    draft.config["rank_pattern"] = {"a|b": 4, "q_proj": 4, "c*": 4}
    assert said(draft) == [
        (
            "unknown_config",
            "'x0', 'x1', 'x2' and 1 more: set in the config, but not known to this gate; remove it, or train "
            "without it",
        ),
        (
            "pattern",
            "'a|b', 'c*': not a valid name in rank_pattern: expected plain module names and suffixes",
        ),
    ]


def test_the_caps_name_the_largest_first_and_what_made_it_large(said: Said) -> None:
    draft = Draft()
    draft.tensors[key(V0, "B")] *= 100
    draft.tensors[key(V1, "B")] *= 1000
    draft.tensors[key(Q0, "B")] *= 50
    (norm, text), (total, whole) = said(draft)
    assert (norm, total) == ("relative_norm", "total_norm")
    assert text.startswith(f"{V1}, {V0}, {Q0}: the adapter is up to ")
    ending = "allowed are 1 (`max_{}`). A smaller lora_alpha makes {} smaller"
    assert text.endswith(f" times the module's weight, {ending.format('relative_norm', 'it')}")
    assert whole.endswith(ending.format("total_norm", "them"))


def test_one_module_over_the_cap(said: Said) -> None:
    draft = Draft()
    draft.tensors[key(V1, "B")] *= 4
    ((code, text),) = said(draft)
    assert code == "relative_norm" and text.startswith(f"{V1}: the adapter is 1.") and "up to" not in text


def test_ranks_that_cancel_in_several_modules(said: Said) -> None:
    draft = Draft()
    for module, share in ((V0, 1e-2), (V1, 0.0)):
        a, b = draft.tensors[key(module, "A")], draft.tensors[key(module, "B")]
        a[1:], b[:, 1:] = 0.0, 0.0
        a[1], b[:, 1] = a[0], (share - 1.0) * b[:, 0]
    ((code, text),) = said(draft)
    assert code == "cancellation"
    assert text.startswith(
        f"{V1}, {V0}: the ranks cancel each other to 0.0e+00 of their squared norm; 0.0015 is"
    )


# --- a file of another kind

KINDS = {
    "zip": (b"PK\x03\x04\x14\x00\x08\x08", "it is a file of torch.save"),
    "pickle": (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "it is a file of torch.save"),
    "pickle-2": (b"\x80\x02}q\x00.", "it is a file of torch.save"),
    "pickle-5": (b"\x80\x05\x95\x0b\x00\x00\x00", "it is a file of torch.save"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "it is a Git LFS pointer"),
    "html": (b"\n <!DOCTYPE HTML><html>", "it is a web page"),
    "html-plain": (b"<HTML>", "it is a web page"),
    "gzip": (b"\x1f\x8b\x08", "it is a gzip archive"),
    "gguf": (b"GGUF\x03\x00\x00\x00", "it is a GGUF file"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_another_kind_is_recognised(kind: str, tmp_path: Path) -> None:
    beginning, told = KINDS[kind]
    data = beginning.ljust(1000, b"\x01")
    with pytest.raises(AdapterRefused) as refused:
        read_weights(io.BytesIO(data), len(data), 8 * 2**20)
    (reason,) = refused.value.reasons
    assert reason.code == "weights_malformed"
    assert reason.message.startswith(f"the weights are not a whole safetensors file: {told}")
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"model.safetensors is not a whole safetensors file: {told}"):
        read_header(tmp_path / "model.safetensors")


def test_a_config_of_another_kind(tmp_path: Path, gate: GateSettings, store: PublishedStore) -> None:
    folder = Draft().write(tmp_path / "adapter")
    for text, told in ((KINDS["lfs"][0], "it is a Git LFS pointer, not the file. Run 'git lfs pull'"),
                       (b"{", "Expecting property name")):  # fmt: skip
        (folder / CONFIG).write_bytes(text)
        (reason,) = judge(folder, gate, store).report.reasons
        assert reason.code == "config_malformed"
        assert reason.message.startswith(f"{CONFIG} is not plain JSON: {told}")


def test_damaged_weights_are_not_taken_for_another_kind() -> None:
    """The length of the header is the first number of a sound file, and may begin as a pickle does."""
    for length in (640, 896):
        data = safetensors_bytes(b"{" * length)
        assert data.startswith((b"\x80\x02", b"\x80\x03"))
        assert other_format(data[:LONGEST_SIGN]) is None
        with pytest.raises(AdapterRefused, match="a whole safetensors file: Expecting"):
            read_weights(io.BytesIO(data), len(data), 1000)
    assert other_format(b"") is None


@pytest.mark.parametrize(
    ("names", "sorted_names"),
    [
        (["l.10.q", "l.9.q", "l.1.q"], ["l.1.q", "l.9.q", "l.10.q"]),
        (["b.0", "a.1", "a"], ["a", "a.1", "b.0"]),
        (["l.²", "l.2", "l.٣", "l.x"], ["l.x", "l.²", "l.2", "l.٣"]),
        ([f"l.{'9' * 5000}", "l.1", "l.01"], [f"l.{'9' * 5000}", "l.01", "l.1"]),
    ],
)
def test_names_are_sorted_as_people_count(names: list[str], sorted_names: list[str]) -> None:
    assert sorted(names, key=natural_order) == sorted_names
