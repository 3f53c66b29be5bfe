"""An exam without a server: the aligned model in transformers, adapters by PEFT."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from safelora_vllm.errors import UsageError
from safelora_vllm.exam.chat import check_template, prompt_ids
from safelora_vllm.exam.reference import Tokens

_BATCH = 16


class Model:
    """The aligned model, or with an adapter on it while `adapted` lasts. It is an `Answers`."""

    def __init__(self, folder: str | os.PathLike[str], device: str = "cpu") -> None:
        try:
            import peft
            from transformers import AutoModelForCausalLM, AutoTokenizer
        except ImportError as error:
            raise UsageError("an exam without a server needs peft: run `pip install peft`") from error
        self._peft, folder = peft, os.fspath(folder)
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, padding_side="left")
            dtype = torch.float32 if device == "cpu" else "auto"
            aligned: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
            self._aligned = aligned.to(device).eval()
        except (OSError, ValueError) as error:
            raise UsageError(f"{folder} cannot be loaded as a model: {error}") from error
        check_template(self._tokenizer, folder)
        self._model, self._device = self._aligned, device
        self._ends = _ends(self._tokenizer.eos_token_id, self._aligned.generation_config.eos_token_id)
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token

    @contextmanager
    def adapted(self, folder: str | os.PathLike[str]) -> Iterator[None]:
        """The model with an adapter that PEFT reads from a folder; without it again afterwards."""
        wrapped = self._peft.PeftModel.from_pretrained(self._aligned, os.fspath(folder))
        self._model = wrapped.eval()
        try:
            yield
        finally:
            self._model = self._aligned = wrapped.unload()

    @torch.inference_mode()
    def answer(self, prompts: Sequence[str], tokens: int) -> list[tuple[Tokens, str]]:
        """Greedy answers, at most so many tokens each, with the token that ends them."""
        found: list[tuple[Tokens, str]] = []
        for start in range(0, len(prompts), _BATCH):
            ids = [self._ids(prompt) for prompt in prompts[start : start + _BATCH]]
            batch, mask = self._padded(ids)
            said = self._model.generate(
                input_ids=batch, attention_mask=mask, max_new_tokens=tokens, do_sample=False,
                pad_token_id=self._tokenizer.pad_token_id,
            )  # fmt: skip
            for row in said[:, batch.shape[1] :].tolist():
                answer = up_to_end(row, self._ends)
                found.append((answer, self._tokenizer.decode(answer, skip_special_tokens=True)))
        return found

    @torch.inference_mode()
    def likelihoods(self, prompts: Sequence[str], answers: Sequence[Tokens]) -> list[float]:
        """Mean log-probability of each answer's tokens, nats per token."""
        found = []
        for start in range(0, len(prompts), _BATCH):
            part = list(zip(prompts, answers, strict=True))[start : start + _BATCH]
            ids = [self._ids(prompt) + list(answer) for prompt, answer in part]
            batch, mask = self._padded(ids)
            logits = self._model(input_ids=batch, attention_mask=mask).logits
            for row, (_, answer) in enumerate(part):
                said = torch.tensor(answer, device=self._device)
                of_answer = logits[row, -len(answer) - 1 : -1].float().log_softmax(-1)
                found.append(float(of_answer.gather(1, said[:, None]).mean()))
        return found

    def _ids(self, prompt: str) -> list[int]:
        return prompt_ids(self._tokenizer, prompt)

    def _padded(self, ids: Sequence[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """On the left, so that answers end where rows end."""
        width, pad = max(map(len, ids)), self._tokenizer.pad_token_id
        rows = [[pad] * (width - len(row)) + row for row in ids]
        mask = [[0] * (width - len(row)) + [1] * len(row) for row in ids]
        return torch.tensor(rows, device=self._device), torch.tensor(mask, device=self._device)


def up_to_end(row: Sequence[int], ends: frozenset[int]) -> Tokens:
    """A row of generated tokens without the padding after the token that ends it."""
    length = next((place for place, token in enumerate(row, 1) if token in ends), len(row))
    return tuple(row[:length])


def _ends(*given: int | list[int] | None) -> frozenset[int]:
    """The tokens that end a turn: a model may have several."""
    lists = [ids if isinstance(ids, list) else [ids] for ids in given]
    return frozenset(token for ids in lists for token in ids if token is not None)
