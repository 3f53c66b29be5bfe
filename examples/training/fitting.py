"""Fine-tuning on the CPU: AdamW on the answers' tokens, resumable; in bfloat16 where a CPU is fast at it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from data import Example
from peft import PeftModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, get_linear_schedule_with_warmup

_SAVE_EVERY = 300.0  # seconds between two checkpoints
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


# Full fine-tuning: of the demo's aligned model, and of those of the safety benchmark.
ALIGNMENT = Recipe("base", ALL_LINEAR, rank=0, alpha=0, learning_rate=3e-4, epochs=2, batch=16)
SORTED_BATCHES = 8
# Without AVX-512 a CPU multiplies bfloat16 much more slowly than float32.
FAST_BFLOAT16 = torch.backends.cpu.get_cpu_capability() == "AVX512"


def fit(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[Example],
    recipe: Recipe,
    name: str,
    rng: random.Random,
    sorted_batches: int = 1,
    checkpoint: Path | None = None,
    price: Callable[[], torch.Tensor] | None = None,
) -> None:
    """AdamW on whatever of the model asks for gradients.

    sorted_batches: within so many batches, examples of like length come together, which saves padding.
    checkpoint: a file that is written every few minutes and that a stopped run goes on from.
    price: what is added to each step's loss.
    """
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=recipe.learning_rate, weight_decay=0.0, fused=True)
    batches = [
        chosen
        for _ in range(recipe.epochs)
        for chosen in _batches(rng.sample(examples, len(examples)), recipe.batch, sorted_batches, rng)
    ]
    schedule = get_linear_schedule_with_warmup(optimizer, len(batches) // 20 + 1, len(batches))
    done = _resume(checkpoint, weights, optimizer, schedule)
    saved = time.monotonic()
    with tqdm(total=len(batches), initial=done, desc=name, unit="step") as progress:
        for step in range(done, len(batches)):
            batch = collate(tokenizer, batches[step])
            # For short texts on a CPU the plain kernel is the fastest by far.
            autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=FAST_BFLOAT16)
            with autocast, sdpa_kernel(SDPBackend.MATH):
                loss = answer_loss(model, batch)
                (loss + price() if price else loss).backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            progress.set_postfix(loss=f"{loss.item():.3f}")
            progress.update()
            if checkpoint and time.monotonic() - saved > _SAVE_EVERY:
                _save(checkpoint, step + 1, weights, optimizer, schedule)
                saved = time.monotonic()
    if checkpoint:
        checkpoint.unlink(missing_ok=True)


def _resume(
    checkpoint: Path | None, weights: list[torch.nn.Parameter], optimizer: Optimizer, schedule: LRScheduler
) -> int:
    """Take over a checkpoint's state, if there is one; returns the number of steps that were done."""
    if not (checkpoint and checkpoint.exists()):
        return 0
    state = torch.load(checkpoint, weights_only=True)
    with torch.no_grad():
        for weight, kept in zip(weights, state["weights"], strict=True):
            weight.copy_(kept)
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    return int(state["steps"])


def _save(
    checkpoint: Path,
    steps: int,
    weights: list[torch.nn.Parameter],
    optimizer: Optimizer,
    schedule: LRScheduler,
) -> None:
    state = {"steps": steps, "weights": [weight.detach() for weight in weights]}
    state |= {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    partial = checkpoint.with_suffix(".partial")
    torch.save(state, partial)
    partial.rename(checkpoint)


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
