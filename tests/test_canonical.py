"""The canonical adapter against PEFT: same logits, and projected ones as the formula says."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from safelora_vllm.cli.main import main
from safelora_vllm.gate.admit import GateSettings, admit
from safelora_vllm.methods import METHODS
from safelora_vllm.policy import Policy
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.store import PublishedStore
from tests import reference
from tests.tiny import LLAMA, Q0, Draft, Pair, key, module_shapes

# Logits of size about 1 through two layers of float32 sums: the scale is inside B instead of being
# multiplied on afterwards, which reorders roundings of 6e-8 each.
_LOGITS = 2e-5
# Here the other side rounds each merged weight to float32 once more, and logits reach 25.
_MERGED = 1e-4
_TOKENS = torch.arange(1, 25).reshape(2, 12)

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "v_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "rslora": {"target_modules": ["q_proj", "down_proj"], "use_rslora": True},
    "alpha-pattern": {
        "target_modules": ["q_proj", "k_proj", "up_proj"],
        "alpha_pattern": {
            "layers.0.self_attn.q_proj": 3,
            "up_proj": 1.5,
            "^model.layers.1.self_attn.k_proj": 2,
        },
    },
    "rank-pattern": {
        "target_modules": ["q_proj", "v_proj", "gate_proj"],
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.gate_proj": 7},
        "alpha_pattern": {"gate_proj": 5},
    },
    "rslora-patterns": {
        "target_modules": ["o_proj", "down_proj"],
        "use_rslora": True,
        "rank_pattern": {"o_proj": 9},
        "alpha_pattern": {"1.self_attn.o_proj": 2},
    },
}


def model(pair: Pair) -> LlamaForCausalLM:
    """The aligned model in transformers."""
    config = {name: value for name, value in LLAMA.items() if name not in ("model_type", "architectures")}
    llama = LlamaForCausalLM(LlamaConfig(**config, tie_word_embeddings=False))
    llama.load_state_dict(pair.after)
    return llama.eval()


def logits(llama: torch.nn.Module) -> Tensor:
    """Its answer to a few tokens."""
    with torch.inference_mode():
        answer: Tensor = llama(_TOKENS).logits
        return answer


def saved_by_peft(pair: Pair, folder: Path, config: dict[str, Any]) -> Tensor:
    """Save a random adapter as PEFT does; returns PEFT's logits with it."""
    torch.manual_seed(5)
    tuned = get_peft_model(model(pair), LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **config)).eval()
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    tuned.save_pretrained(folder)
    return logits(tuned)


def command(pair_cache: ProjectorCache, adapter: Path, out: Path, *options: str) -> Path:
    """`safelora-vllm project`."""
    where = ["--projectors", str(pair_cache.folder), "--out", str(out)]
    assert main(["project", str(adapter), *where, "--max-relative-norm", "10", *options]) == 0
    return out


@pytest.mark.parametrize("name", CONFIGS)
def test_unprojected_it_answers_like_the_original(
    name: str, pair: Pair, cache: ProjectorCache, tmp_path: Path
) -> None:
    expected = saved_by_peft(pair, tmp_path / "adapter", CONFIGS[name])
    nothing = ("--method", "safe-lora", "--threshold", "1e-9")
    out = command(cache, tmp_path / "adapter", tmp_path / "out", *nothing)
    plain = logits(model(pair))
    assert (expected - plain).abs().max() > 100 * _LOGITS  # the adapter does something
    found = logits(PeftModel.from_pretrained(model(pair), out))
    assert torch.allclose(found, expected, rtol=0, atol=_LOGITS)


def formula(method: str, v: Tensor, a: Tensor, b: Tensor, energy: float) -> Tensor:
    """The new ΔW of a method."""
    if method == "safe-lora":
        return reference.projected(v, a, b)
    if method == "input-removal":
        return reference.removed(v, a, b, energy)
    assert method == "csulora"
    return reference.truncated(reference.damped(v, a, b, energy), a.shape[0])


@pytest.mark.parametrize("method", METHODS)
def test_projected_it_answers_like_the_merged_formula(
    method: str, pair: Pair, cache: ProjectorCache, tmp_path: Path
) -> None:
    saved_by_peft(pair, tmp_path / "adapter", CONFIGS["all-linear"])
    energy = ["--energy", "0.7"] if Policy(method=method).has_effect("energy") else []
    rules = ["--method", method, "--select", "all", *energy]
    out = command(cache, tmp_path / "adapter", tmp_path / "out", *rules)
    raw = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    merged = dict(pair.after)
    for module in module_shapes():
        a, b = raw[key(module, "A")], 2.0 * raw[key(module, "B")]  # α/r = 8/4
        delta = formula(method, pair.v(module), a, b, energy=0.7)
        merged[f"{module}.weight"] = (pair.w(module) + delta).float()
    expected = model(pair)
    expected.load_state_dict(merged)
    found = logits(PeftModel.from_pretrained(model(pair), out))
    assert torch.allclose(found, logits(expected), rtol=0, atol=_MERGED)
    assert (found - logits(model(pair))).abs().max() > 100 * _MERGED


def test_peft_finds_the_aligned_model_by_itself(pair: Pair, cache: ProjectorCache, tmp_path: Path) -> None:
    """Whatever the uploaded config says: its author would choose which model is loaded."""
    saved_by_peft(pair, tmp_path / "adapter", CONFIGS["plain"])
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": "evil/model", "revision": "evil"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    out = command(cache, tmp_path / "adapter", tmp_path / "out")
    written = json.loads((out / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(pair.aligned) and "revision" not in written
    found = logits(AutoPeftModelForCausalLM.from_pretrained(out))
    expected = logits(PeftModel.from_pretrained(model(pair), out))
    assert torch.equal(found, expected) and not torch.allclose(expected, logits(model(pair)), atol=1e-3)


def test_golden_config_and_names(cache: ProjectorCache, tmp_path: Path, store: PublishedStore) -> None:
    settings = GateSettings(cache, Policy(method="safe-lora", threshold=-1.0), base_model="tiny-chat")
    folder = admit(Draft().write(tmp_path / "a"), "tenant", settings, store).folder
    assert folder is not None
    assert json.loads((folder / "adapter_config.json").read_text()) == {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 4,
        "target_modules": sorted(module_shapes()),
        "bias": "none",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny-chat",
    }
    tensors = load_file(folder / "adapter_model.safetensors")
    assert set(tensors) == {key(module, side) for module in module_shapes() for side in "AB"}
    named = dataclasses.replace(settings, base_model="org/chat", revision="v1")
    assert named.ruleset_digest != settings.ruleset_digest
    other = admit(tmp_path / "a", "tenant", named, store).folder
    assert other is not None and other != folder
    config = json.loads((other / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/chat", "v1")
    draft = Draft()
    served, came = ([t[key(Q0, side)].double() for side in "BA"] for t in (tensors, draft.tensors))
    for rank in range(4):  # powers of two go between the sides of a rank, which changes no product
        b, a = served[0][:, rank], served[1][rank]
        assert torch.equal(torch.outer(b, a), 2.0 * torch.outer(came[0][:, rank], came[1][rank]))
        assert 0.5 <= float(a.abs().max() / b.abs().max()) <= 4.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_published_dtype_is_that_of_the_server(
    dtype: torch.dtype, cache: ProjectorCache, tmp_path: Path, store: PublishedStore
) -> None:
    settings = GateSettings(cache, Policy(method="safe-lora", select="all"), dtype=dtype)
    folder = admit(Draft().write(tmp_path / "a"), "tenant", settings, store).folder
    assert folder is not None
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_measured_is_what_is_published(
    dtype: torch.dtype, pair: Pair, cache: ProjectorCache, tmp_path: Path, store: PublishedStore
) -> None:
    """Weights are rounded to the served dtype first: rounding may change a delta and its norm."""
    settings = GateSettings(cache, Policy(method="safe-lora", threshold=-1.0), dtype=dtype)
    admission = admit(Draft().write(tmp_path / "a"), "tenant", settings, store)
    assert admission.folder is not None and admission.report.count("kept") == len(module_shapes())
    tensors = load_file(admission.folder / "adapter_model.safetensors")
    for module in admission.report.modules:
        a, b = (tensors[key(module.name, side)] for side in "AB")
        norm = reference.ratio(reference.product(a, b), pair.w(module.name))
        assert module.relative_norm == pytest.approx(norm, rel=1e-12)  # float64 on both sides


def test_ranks_are_padded_with_zeros(cache: ProjectorCache, tmp_path: Path, store: PublishedStore) -> None:
    draft = Draft()
    draft.config["rank_pattern"] = {"layers.0.self_attn.q_proj": 6}
    draft.tensors[key(Q0, "A")] = torch.randn(6, 96)
    draft.tensors[key(Q0, "B")] = 0.01 * torch.randn(96, 6)
    settings = GateSettings(cache, Policy(method="safe-lora", threshold=-1.0))
    folder = admit(draft.write(tmp_path / "a"), "tenant", settings, store).folder
    assert folder is not None
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        side = 0 if ".lora_A." in name else 1
        assert tensor.shape[side] == 6
        if Q0 not in name:
            assert not tensor.narrow(side, 4, 2).any() and tensor.narrow(side, 0, 4).any()


def test_the_same_input_gives_the_same_bytes(cache: ProjectorCache, tmp_path: Path) -> None:
    folder = Draft().write(tmp_path / "a")
    settings = GateSettings(cache, Policy(method="safe-lora", select="all"))
    digests = set()
    for attempt in range(2):
        published = admit(folder, f"name-{attempt}", settings, PublishedStore(tmp_path / str(attempt))).folder
        assert published is not None
        digests.add(
            tuple(hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(published.iterdir()))
        )
    assert len(digests) == 1
