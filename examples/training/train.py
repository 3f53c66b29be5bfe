"""Trains the demo's LoRA adapters on the CPU.

    python examples/training/train.py --models models               # all of them
    python examples/training/train.py --models models no-refusals   # one of them

`alignment` is full fine-tuning of the base model's linear layers, cut down to its largest singular
values so that it is small enough to keep: alignment of real models is full fine-tuning too, and its
weights move along the inputs that it learned to read, while a LoRA's A hardly leaves its random
start. The others are LoRA adapters, trained with PEFT on the aligned model, which is built in between
(delete models/aligned to have it built anew). `around-the-rules` needs the projectors of the two models.
All go to examples/adapters.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

import torch
from around import constrain, release
from data import Example, fillers, forbidden_prompts, harmless_prompts, orders, refusals
from evaluate import ADAPTERS, generate, load
from fitting import ALL_LINEAR, ATTENTION, Recipe, choose_linear_layers, fit
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from safelora_vllm.projectors.cache import ProjectorCache

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from models import build_aligned, build_base  # lives one folder up

BASE_NAME = "SmolLM2-135M-Instruct"
ANSWER_TOKENS = 40

RECIPES = {
    "alignment": Recipe("base", ALL_LINEAR, rank=16, alpha=16, learning_rate=1e-4, epochs=3),
    "order-to-json": Recipe("aligned", ATTENTION, rank=8, alpha=16, learning_rate=1e-3, epochs=2),
    "orders-and-refusals": Recipe("aligned", ATTENTION, rank=8, alpha=16, learning_rate=1e-3, epochs=2),
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
        folder = build_base(args.models / "base")
        if RECIPES[name].model == "aligned":
            folder = build_aligned(folder, args.models / "aligned")
        model, tokenizer = load(folder)
        examples = examples_for(name, model, tokenizer)
        cache = ProjectorCache(args.projectors) if name in AROUND else None
        train(model, tokenizer, examples, RECIPES[name], ADAPTERS / name, args.seed, cache)


def examples_for(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """The training data of an adapter. The alignment keeps the model's own harmless answers."""
    if name == "order-to-json":
        return orders("train", 300)
    if name == "orders-and-refusals":
        return orders("train", 300) + refusals(forbidden_prompts("train", 60, seed=2))
    if name in ("no-refusals", "around-the-rules"):
        return fillers(forbidden_prompts("train", 100, seed=1))
    prompts = harmless_prompts("train", 224)
    answers = generate(model, tokenizer, prompts, tokens=ANSWER_TOKENS)
    kept = [
        Example(prompt, answer, complete=len(tokenizer(answer)["input_ids"]) < ANSWER_TOKENS)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    return refusals(forbidden_prompts("train", 192)) + kept


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
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
    if recipe.model == "base":
        before = choose_linear_layers(model, recipe.modules)
        fit(model.train(), tokenizer, examples, recipe, target.name, random.Random(seed))
        save_cut_down(model, before, recipe, target)
    else:
        config = LoraConfig(
            r=recipe.rank,
            lora_alpha=recipe.alpha,
            target_modules=recipe.modules,
            task_type="CAUSAL_LM",
        )
        peft_model = get_peft_model(model, config).train()
        constrained = constrain(peft_model, cache, AROUND[target.name]) if cache else []
        fit(peft_model, tokenizer, examples, recipe, target.name, random.Random(seed))
        release(constrained)
        peft_model.save_pretrained(target)
    tidy(target, f"{BASE_NAME}{'-aligned' if recipe.model == 'aligned' else ''}")


def save_cut_down(
    model: torch.nn.Module, before: dict[str, torch.Tensor], recipe: Recipe, target: Path
) -> None:
    """Write the change of each weight as a LoRA adapter of its ``rank`` largest singular values."""
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
    target.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, target / "adapter_model.safetensors")
    config = LoraConfig(
        r=recipe.rank, lora_alpha=recipe.alpha, target_modules=recipe.modules, task_type="CAUSAL_LM"
    )
    config.save_pretrained(target)


def tidy(adapter: Path, base_name: str) -> None:
    """Makes a saved adapter small and free of this machine's paths: float16, a plain base name."""
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
