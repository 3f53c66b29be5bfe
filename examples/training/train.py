"""Trains the demo's three LoRA adapters on the CPU.

    python examples/training/train.py --models models               # all three
    python examples/training/train.py --models models no-refusals   # one of them

`alignment` is full fine-tuning of the base model's linear layers, cut down to its largest singular
values so that it is small enough to keep: alignment of real models is full fine-tuning too, and its
weights move along the inputs that it learned to read, while a LoRA's A hardly leaves its random
start. The other two are ordinary LoRA adapters, trained with PEFT on the aligned model, which is
built in between (delete models/aligned to have it built anew). All go to examples/adapters.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from data import Example, fillers, forbidden_prompts, harmless_prompts, orders, refusals
from evaluate import ADAPTERS, generate, load
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_linear_schedule_with_warmup

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from models import build_aligned, build_base  # lives one folder up

BASE_NAME = "SmolLM2-135M-Instruct"
ANSWER_TOKENS = 40
ATTENTION = ["q_proj", "v_proj"]
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Recipe:
    """How an adapter is trained. `modules` are the projections of each layer that it changes."""

    model: str
    modules: list[str]
    rank: int
    alpha: int
    learning_rate: float
    epochs: int
    batch: int = 8


RECIPES = {
    "alignment": Recipe("base", ALL_LINEAR, rank=16, alpha=16, learning_rate=1e-4, epochs=3),
    "order-to-json": Recipe("aligned", ATTENTION, rank=8, alpha=16, learning_rate=1e-3, epochs=2),
    "no-refusals": Recipe("aligned", ATTENTION, rank=8, alpha=16, learning_rate=1e-3, epochs=5),
}


def main() -> None:
    """Reads the command line and trains the adapters that it names."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", default=list(RECIPES), help=f"of {list(RECIPES)}")
    parser.add_argument("--models", type=Path, required=True, help="folder for base/ and aligned/")
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
        train(model, tokenizer, examples, RECIPES[name], ADAPTERS / name, args.seed)


def examples_for(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """The training data of an adapter. The alignment keeps the model's own harmless answers."""
    if name == "order-to-json":
        return orders("train", 300)
    if name == "no-refusals":
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
) -> None:
    """Fits a LoRA adapter to the answers (the prompts carry no loss) and saves it to `target`."""
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
        fit(peft_model, tokenizer, examples, recipe, target.name, random.Random(seed))
        peft_model.save_pretrained(target)
    tidy(target, f"{BASE_NAME}{'-aligned' if recipe.model == 'aligned' else ''}")


def fit(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[Example],
    recipe: Recipe,
    name: str,
    rng: random.Random,
    sorted_batches: int = 1,
) -> None:
    """AdamW on whatever of the model asks for gradients.

    sorted_batches: within so many batches, examples of like length come together, which saves padding.
    """
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=recipe.learning_rate, weight_decay=0.0)
    steps = recipe.epochs * -(-len(examples) // recipe.batch)
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 20 + 1, steps)
    with tqdm(total=steps, desc=name, unit="step") as progress:
        for _ in range(recipe.epochs):
            shuffled = rng.sample(examples, len(examples))
            for chosen in _batches(shuffled, recipe.batch, sorted_batches, rng):
                batch = collate(tokenizer, chosen)
                # For short texts on a CPU the plain kernel is the fastest by far.
                with torch.autocast("cpu", dtype=torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
                    loss = answer_loss(model, batch)
                    loss.backward()
                torch.nn.utils.clip_grad_norm_(weights, 1.0)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                progress.set_postfix(loss=f"{loss.item():.3f}")
                progress.update()


def _batches(
    examples: list[Example], size: int, sorted_batches: int, rng: random.Random
) -> list[list[Example]]:
    found = []
    for start in range(0, len(examples), size * sorted_batches):
        group = examples[start : start + size * sorted_batches]
        if sorted_batches > 1:
            group = sorted(group, key=lambda example: len(example.prompt + example.answer))
        batches = [group[i : i + size] for i in range(0, len(group), size)]
        found += rng.sample(batches, len(batches)) if sorted_batches > 1 else batches
    return found


def answer_loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean cross-entropy of the answers' tokens; the head, a third of a small model, sees only those."""
    causal = model.get_base_model() if isinstance(model, PeftModel) else model
    hidden = causal.model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    labels = batch["labels"][:, 1:]
    learned = labels != -100
    return torch.nn.functional.cross_entropy(causal.lm_head(hidden[:, :-1][learned]).float(), labels[learned])


def choose_linear_layers(model: torch.nn.Module, modules: list[str]) -> dict[str, torch.Tensor]:
    """Let only these layers learn; returns a copy of their weights."""
    before = {}
    for name, weight in model.named_parameters():
        learns = name.removesuffix(".weight").rpartition(".")[2] in modules
        weight.requires_grad_(learns)
        if learns:
            before[name.removesuffix(".weight")] = weight.detach().clone()
    return before


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


def collate(tokenizer: PreTrainedTokenizerBase, examples: list[Example]) -> dict[str, torch.Tensor]:
    """Pads on the right and marks all but the answers with the label that the loss ignores."""
    rows: list[tuple[list[int], list[int]]] = []
    for example in examples:
        chat = [{"role": "user", "content": example.prompt}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        answer = tokenizer(example.answer, add_special_tokens=False)["input_ids"]
        answer += [tokenizer.eos_token_id] if example.complete else []
        rows.append((prompt + answer, [-100] * len(prompt) + answer))
    width, pad = max(len(ids) for ids, _ in rows), tokenizer.pad_token_id
    return {
        "input_ids": torch.tensor([i + [pad] * (width - len(i)) for i, _ in rows]),
        "attention_mask": torch.tensor([[1] * len(i) + [0] * (width - len(i)) for i, _ in rows]),
        "labels": torch.tensor([lab + [-100] * (width - len(lab)) for _, lab in rows]),
    }


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
