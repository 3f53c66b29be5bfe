"""What vLLM computes with a served adapter is what PEFT computes with our projected one."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from safelora_vllm.cli.main import main
from tests.server.conftest import load

PROMPTS = ["The capital of France is Paris, and", "def add(a, b):\n    return", "Dear customer, thank you"]


def served_logprobs(http: httpx.Client, model: str, prompt: str) -> torch.Tensor:
    """Log-probability of each prompt token after the first, from vLLM."""
    body = {"model": model, "prompt": prompt, "max_tokens": 1, "echo": True, "logprobs": 1}
    answer = http.post("/v1/completions", json={**body, "temperature": 0}).json()
    return torch.tensor(answer["choices"][0]["logprobs"]["token_logprobs"][1:-1])


def reference_logprobs(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        scores = model(tokens[None]).logits[0].float().log_softmax(-1)
    return scores[:-1].gather(1, tokens[1:, None])[:, 0]


@pytest.mark.parametrize("name", ["qv", "all", "static"])
def test_vllm_and_peft_agree(
    admin: httpx.Client,
    adapters: dict[str, Path],
    aligned: Path,
    projectors: Path,
    tmp_path: Path,
    name: str,
) -> None:
    if name != "static":  # that one is served from the start, given as --lora-modules
        assert load(admin, name, adapters[name]).status_code == 200
    out = tmp_path / "projected"
    options = ["--method", "safe-lora", "--select", "all", "--out", str(out)]
    assert main(["project", str(adapters[name]), "--projectors", str(projectors), *options]) == 0
    tokenizer = AutoTokenizer.from_pretrained(aligned)
    projected = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(aligned, dtype=torch.float32), out
    )
    raw = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(aligned, dtype=torch.float32), adapters[name]
    )
    for prompt in PROMPTS:
        tokens = tokenizer(prompt, return_tensors="pt").input_ids[0]
        served = served_logprobs(admin, name, prompt)
        agreement = (served - reference_logprobs(projected, tokens)).abs().mean()
        distance = (served - reference_logprobs(raw, tokens)).abs().mean()
        # Both compute in float32, and what is published is rounded as the cache is, to bfloat16.
        assert agreement < 0.05, (prompt, agreement)
        # The raw adapter's deltas are 0.3 of each weight: nobody could mistake it for the projected.
        assert distance > 10 * agreement, (prompt, agreement, distance)
