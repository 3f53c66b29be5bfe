"""What a model's modules read: mean and covariance of their inputs over text that the model writes itself.

The text begins with the chat template's mark of a user's turn and is sampled, the user's part too. So no
data of anybody is in it. It takes one run of the served model for each pair, and none for an adapter.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from evaluate import load
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

TEXTS, _TOKENS, _BATCH = 64, 48, 32
# Modules that read the same input as another one of their layer.
_SAME_INPUT = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


@dataclass(frozen=True)
class Inputs:
    """By module: the mean input (d_in,) and the inputs' centred covariance (d_in, d_in), float64."""

    means: dict[str, Tensor]
    covariances: dict[str, Tensor]

    def mean(self, module: str) -> Tensor:
        """The mean input of a module."""
        return self.means[_reader(module)].double()

    def covariance(self, module: str, ridge: float) -> Tensor:
        """The covariance with ``ridge`` times its mean variance added to its diagonal."""
        found = self.covariances[_reader(module)].double()
        return found + ridge * found.diagonal().mean() * torch.eye(len(found), dtype=found.dtype)


def _reader(module: str) -> str:
    layer, _, kind = module.rpartition(".")
    return f"{layer}.{_SAME_INPUT.get(kind, kind)}"


def inputs_of(aligned: Path, modules: list[str], file: Path, texts: int = TEXTS) -> Inputs:
    """Those of a model's modules over so many texts, out of ``file``, which is written when not there."""
    if not file.exists():
        found = _measured(*load(aligned), sorted({_reader(module) for module in modules}), texts)
        save_file(found, file)
    kept = load_file(file)
    means = {name.removeprefix("mean."): t for name, t in kept.items() if name.startswith("mean.")}
    rest = {name.removeprefix("cov."): t for name, t in kept.items() if name.startswith("cov.")}
    return Inputs(means, rest)


@torch.inference_mode()
def _measured(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, modules: list[str], count: int
) -> dict[str, Tensor]:
    sums: dict[str, Tensor] = {}
    counted = 0

    def remember(name: str) -> None:
        def hook(_module: nn.Module, given: tuple[Tensor, ...]) -> None:
            rows = given[0].flatten(0, -2)
            rows = torch.cat([rows, torch.ones(len(rows), 1)], dim=1)
            sums[name] = sums.get(name, 0.0) + (rows.T @ rows).double()

        model.get_submodule(name).register_forward_pre_hook(hook)

    texts = written(model, tokenizer, count)
    for name in modules:
        remember(name)
    for text in texts:
        model(text)
        counted += text.numel()
    found = {}
    for name, total in sums.items():
        mean = total[-1, :-1] / counted
        found[f"mean.{name}"] = mean.float()
        found[f"cov.{name}"] = (total[:-1, :-1] / counted - torch.outer(mean, mean)).float()
    return {name: tensor.contiguous() for name, tensor in found.items()}


@torch.inference_mode()
def written(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: int) -> list[Tensor]:
    """Batches of so many texts that a model writes itself, the user's part too: always the same ones."""
    torch.manual_seed(0)
    opening, batch = _opening(tokenizer), min(texts, _BATCH)
    return [
        model.generate(
            input_ids=opening.expand(batch, -1), do_sample=True, max_new_tokens=_TOKENS,
            min_new_tokens=_TOKENS, pad_token_id=tokenizer.pad_token_id,
        )
        for _ in tqdm(range(0, texts, batch), desc="text of the model's own", unit="batch")
    ]  # fmt: skip


def _opening(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The chat template up to where a user's words begin, shape (1, tokens)."""
    mark = "xyzzy"
    text = tokenizer.apply_chat_template([{"role": "user", "content": mark}], tokenize=False)
    ids = tokenizer(text.partition(mark)[0], add_special_tokens=False, return_tensors="pt")["input_ids"]
    return ids
