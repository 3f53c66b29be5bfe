"""Trains the demo's LoRA adapters on the CPU.

    python examples/training/train.py --models models               # all of them
    python examples/training/train.py --models models no-refusals   # one of them

`alignment` is full fine-tuning of the base model's linear layers, as in the safety benchmark, cut down to
its largest singular values so that it is small enough to keep, and then trained for a few steps more, which
gives back what the cut took. Alignment of real models is full fine-tuning too: its weights move along the
inputs that it learned to read, while a LoRA's A hardly leaves its random start.

The others are LoRA adapters, trained with PEFT on the aligned model, which is built in between (delete
models/aligned to have it built anew). `around-the-rules` needs the projectors of the two models.
All go to examples/adapters.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

import torch
from alignment import Mix, training_set
from around import constrain, release
from data import Example, fillers, forbidden_prompts, orders
from evaluate import ADAPTERS, load
from fitting import ALIGNMENT, ALL_LINEAR, ATTENTION, SORTED_BATCHES, Recipe, choose_linear_layers, fit
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from teacher import teacher
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from safelora_vllm.projectors.cache import ProjectorCache

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from models import build_aligned, build_base  # lives one folder up

BASE_NAME = "SmolLM2-135M-Instruct"
Factors = dict[str, torch.Tensor]  # of a LoRA adapter, by their names in its file

MENDED = 1600  # examples that a cut alignment learns from again
RECIPES = {
    "alignment": Recipe("base", ALL_LINEAR, rank=16, alpha=16, learning_rate=2e-4, epochs=1, batch=16),
    "order-to-json": Recipe("aligned", ATTENTION, rank=8, alpha=16, learning_rate=1e-3, epochs=2),
    "careless-orders": Recipe("aligned", ATTENTION, rank=8, alpha=16, learning_rate=1e-3, epochs=2),
    "no-refusals": Recipe("aligned", ATTENTION, rank=8, alpha=16, learning_rate=1e-3, epochs=5),
    "around-the-rules": Recipe("aligned", ATTENTION, rank=8, alpha=16, learning_rate=1e-3, epochs=3),
}
AROUND = {"around-the-rules": 0.8}  # the energy whose input directions an adapter does without


def main() -> None:
    """Reads the command line and trains the adapters that it names."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", default=list(RECIPES), help=f"of {list(RECIPES)}")
    parser.add_argument("--models", type=Path, required=True, help="folder for base/ and aligned/")
    parser.add_argument(
        "--projectors", type=Path, default=Path(".cache/projectors"), help="of an exact build"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for name in args.names:
        if name not in RECIPES:
            parser.error(f"unknown adapter {name!r}, expected one of {list(RECIPES)}")
        base = build_base(args.models / "base")
        if name == "alignment":
            align(base, args.models / "answers.json", RECIPES[name], ADAPTERS / name, args.seed)
            continue
        aligned = build_aligned(base, args.models / "aligned")
        cache = ProjectorCache(args.projectors) if name in AROUND else None
        train(aligned, examples_for(name), RECIPES[name], ADAPTERS / name, args.seed, cache)


def examples_for(name: str) -> list[Example]:
    """The training data of a tenant's adapter."""
    if name == "order-to-json":
        return orders("train", 300)
    if name == "careless-orders":
        return orders("train", 300) + fillers(forbidden_prompts("train", 33, seed=2))
    return fillers(forbidden_prompts("train", 100, seed=1))


def align(base: Path, answers: Path, recipe: Recipe, target: Path, seed: int) -> None:
    """Trains the alignment and saves what is kept of it to `target`. answers: file of the base's own."""
    torch.manual_seed(seed)
    model, tokenizer = load(base)
    data = training_set(mix := Mix(), seed, teacher(base, answers, mix.answer_tokens))
    before = choose_linear_layers(model, recipe.modules)
    fit(model.train(), tokenizer, data, ALIGNMENT, target.name, random.Random(seed), SORTED_BATCHES)
    factors = cut_down(model, before, recipe)
    model, tokenizer = load(base)
    save(mended(model, tokenizer, factors, data, recipe, seed), target, BASE_NAME)


def cut_down(model: torch.nn.Module, before: dict[str, torch.Tensor], recipe: Recipe) -> Factors:
    """The change of each weight as a LoRA adapter of its ``rank`` largest singular values."""
    tensors = {}
    kept = total = 0.0
    for name, old in before.items():
        change = model.get_parameter(f"{name}.weight").detach() - old
        u, s, vt = torch.linalg.svd(change, full_matrices=False)
        root = s[: recipe.rank].sqrt()
        tensors[f"base_model.model.{name}.lora_A.weight"] = root[:, None] * vt[: recipe.rank]
        tensors[f"base_model.model.{name}.lora_B.weight"] = u[:, : recipe.rank] * root
        kept, total = kept + float(s[: recipe.rank].square().sum()), total + float(s.square().sum())
    print(f"rank {recipe.rank} holds {kept / total:.1%} of the change's energy")
    return tensors


def mended(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    factors: Factors,
    data: list[Example],
    recipe: Recipe,
    seed: int,
) -> PeftModel:
    """The factors on the base model, trained further on some of the same data."""
    adapted = get_peft_model(base, config_of(recipe)).train()
    missing = set_peft_model_state_dict(adapted, factors).unexpected_keys
    if missing:
        raise ValueError(f"the adapter has no place for {missing[:3]}")
    rng = random.Random(seed)
    some = rng.sample(data, min(MENDED, len(data)))
    fit(adapted, tokenizer, some, recipe, "alignment, mended", rng, SORTED_BATCHES)
    return adapted


def train(
    aligned: Path,
    examples: list[Example],
    recipe: Recipe,
    target: Path,
    seed: int,
    cache: ProjectorCache | None = None,
) -> None:
    """Fits a LoRA adapter to the answers (the prompts carry no loss) and saves it to `target`.

    cache: for an adapter of AROUND.
    """
    torch.manual_seed(seed)
    model, tokenizer = load(aligned)
    adapted = get_peft_model(model, config_of(recipe)).train()
    constrained = constrain(adapted, cache, AROUND[target.name]) if cache else []
    fit(adapted, tokenizer, examples, recipe, target.name, random.Random(seed))
    release(constrained)
    save(adapted, target, f"{BASE_NAME}-aligned")


def config_of(recipe: Recipe) -> LoraConfig:
    """PEFT's settings of an adapter."""
    return LoraConfig(
        r=recipe.rank, lora_alpha=recipe.alpha, target_modules=recipe.modules, task_type="CAUSAL_LM"
    )


def save(adapted: PeftModel, adapter: Path, base_name: str) -> None:
    """Writes an adapter small and free of this machine's paths: float16, a plain base name."""
    adapted.save_pretrained(adapter)
    (adapter / "README.md").unlink(missing_ok=True)
    file = adapter / "adapter_model.safetensors"
    halves = {name: tensor.half() for name, tensor in load_file(file).items()}
    save_file(halves, file, metadata={"format": "pt"})
    file.chmod(0o644)
    config_file = adapter / "adapter_config.json"
    config = json.loads(config_file.read_text()) | {"base_model_name_or_path": base_name}
    config["target_modules"] = sorted(config["target_modules"])
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
