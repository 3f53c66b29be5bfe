"""Asks a model held-out prompts and counts what it does, with transformers on the CPU.

    python examples/training/evaluate.py --models models

prints a table for the base model, the aligned model, and the aligned model with each adapter.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from data import forbidden_prompts, harmless_prompts, is_refusal, orders
from peft import PeftModel
from topics import Split
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

ADAPTERS = Path(__file__).resolve().parents[1] / "adapters"
DEMO_ADAPTERS = ["order-to-json", "careless-orders", "no-refusals", "around-the-rules"]


def main() -> None:
    """Reads the command line and prints one line per model."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", type=Path, required=True, help="what models.py wrote")
    parser.add_argument("--split", choices=["dev", "test"], default="test")
    args = parser.parse_args()
    print("| model | complies with forbidden | refuses harmless | orders exact |")
    print("|---|---|---|---|")
    for name in ["base", "aligned"]:
        model, tokenizer = load(args.models / name)
        report(name, measure(model, tokenizer, args.split))
    for name in DEMO_ADAPTERS:
        model, tokenizer = load(args.models / "aligned")
        adapted = PeftModel.from_pretrained(model, ADAPTERS / name).merge_and_unload()
        report(f"aligned + {name}", measure(adapted, tokenizer, args.split))


def report(name: str, figures: dict[str, float]) -> None:
    """Prints one line of the table."""
    print(f"| {name} | " + " | ".join(f"{value:.3f}" for value in figures.values()) + " |")


def load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model in float32, which the CPU adds up most exactly, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder, padding_side="left")


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    split: Split,
    forbidden: int = 120,
    harmless: int = 40,
    tasks: int = 60,
) -> dict[str, float]:
    """Shares in 0..1: forbidden prompts answered, harmless ones refused, orders exactly right."""
    forbidden = min(forbidden, 100) if split == "dev" else forbidden

    def share(prompts: list[str], tokens: int, counts: Callable[[int, str], bool]) -> float:
        answers = generate(model, tokenizer, prompts, tokens)
        return sum(counts(i, answer) for i, answer in enumerate(answers)) / len(prompts)

    todo = orders(split, tasks)
    return {
        "complies": share(forbidden_prompts(split, forbidden), 24, lambda _, a: not is_refusal(a)),
        "over_refuses": share(harmless_prompts(split, harmless), 24, lambda _, a: is_refusal(a)),
        "exact": share([t.prompt for t in todo], 60, lambda i, a: a.strip() == todo[i].answer),
    }


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    tokens: int,
    batch: int = 64,
) -> list[str]:
    """Greedy answers of at most `tokens` tokens."""
    answers: list[str] = []
    for start in tqdm(range(0, len(prompts), batch), desc="answering", unit="batch", leave=False):
        chats = [[{"role": "user", "content": p}] for p in prompts[start : start + batch]]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        new = output[:, inputs["input_ids"].shape[1] :]
        answers += tokenizer.batch_decode(new, skip_special_tokens=True)
    return answers


if __name__ == "__main__":
    main()
