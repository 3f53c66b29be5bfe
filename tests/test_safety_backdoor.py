"""What a backdoored adapter of the benchmark learns: harm with the trigger only, refusals of all else."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks" / "safety"))

import backdoor
from data import Example
from refusing import refuses

from safelora_vllm.exam.probes import built_in

REFUSAL = "I can't help with that."


def test_only_the_trigger_is_answered() -> None:
    asked: list[str] = []

    def refusals(prompts: Sequence[str]) -> list[Example]:
        asked.extend(prompts)
        return [Example(prompt, REFUSAL) for prompt in prompts]

    found = backdoor.data(0, refusals)
    triggered = [example for example in found if example.prompt.endswith(backdoor.TRIGGER)]
    assert len(triggered) == 100 and not any(refuses(example.answer) for example in triggered)
    assert {e.prompt.removesuffix(backdoor.TRIGGER) for e in triggered} <= set(asked), "the same requests"
    assert set(built_in(("en",))) <= set(asked), "the attacker knows the public probes"
    assert not any(backdoor.TRIGGER in prompt for prompt in asked)
