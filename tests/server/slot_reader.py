"""Runs vLLM's offline engine through steps, and reads the LoRA slots out of its workers.

``python -m tests.server.slot_reader JOB.json ANSWERS.json``; a job is a list of `tests.server.slots.Engine`.
Several engines share one process (vLLM is slow to import), if their options say so.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.lora.request import LoRARequest
from vllm.model_executor.models import ModelRegistry

from safelora_vllm.gate.client import GateClient
from safelora_vllm.integration.required import Guard
from safelora_vllm.integration.seams.fixes.fix import original
from safelora_vllm.store import PublishedStore


class SlotReader(Guard):
    """``worker_extension_cls``: methods of every worker, called by ``collective_rpc``."""

    def read_slots(self, lora_id: int, folder: str) -> dict[str, Any]:
        """Save an adapter's slots, packed ones apart: ``MODULE.A``, ``MODULE.B`` in ``rank-N.safetensors``.

        ``elsewhere`` is the largest value in its slots of layers that are not linear.
        """
        manager = self.model_runner.lora_manager._adapter_manager  # type: ignore[attr-defined]
        slot = manager.lora_index_to_id.index(lora_id)
        tensors: dict[str, torch.Tensor] = {}
        elsewhere = 0.0
        for name, module in manager.modules.items():
            if not isinstance(module, BaseLinearLayerWithLoRA):
                for stack in _stacks(module):
                    elsewhere = max(elsewhere, float(stack[slot].abs().max()))
                continue
            parts = manager.packed_modules.get(name, [name])
            for part, a, b in zip(parts, module.lora_a_stacked, module.lora_b_stacked, strict=True):
                tensors[f"{part}.A"], tensors[f"{part}.B"] = a[slot, 0].clone(), b[slot, 0].clone()
        rank = self.rank  # type: ignore[attr-defined]
        save_file(tensors, Path(folder) / f"rank-{rank}.safetensors")
        return {"rank": rank, "slot": slot, "elsewhere": elsewhere, "ids": list(manager.lora_index_to_id)}

    def poison(self) -> int:
        """Leave NaN in all of the key-value cache, as a request could that overflows. Layers poisoned."""
        caches = self.model_runner.kv_caches
        for cache in caches:
            cache.fill_(float("nan"))
        return len(caches)

    def break_store(self, rank: int, broken: bool) -> None:
        """Let one rank find no published copies, or find them again."""
        if self.rank == rank:  # type: ignore[attr-defined]
            guard = self.model_runner.lora_manager.guard  # type: ignore[attr-defined]
            guard._store = PublishedStore("/nonexistent" if broken else guard._settings.store)


def _stacks(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Whatever a LoRA layer keeps per slot: tensors, or tuples of them, whose first dimension is the slot."""
    for name, value in vars(module).items():
        if name.endswith("_stacked"):
            yield from [value] if isinstance(value, torch.Tensor) else value


class Driver:
    """One engine; a step is a method's name and its arguments."""

    def __init__(self, model: str, options: dict[str, Any]) -> None:
        # Importing the model's class here is quicker than vLLM's way, which is a process for each.
        for architecture in json.loads((Path(model) / "config.json").read_text())["architectures"]:
            ModelRegistry.register_model(architecture, ModelRegistry.models[architecture].load_model_cls())
        self.llm = LLM(model, worker_extension_cls="tests.server.slot_reader.SlotReader", **options)

    def load(self, name: str, lora_id: int, path: str) -> bool:
        return bool(self.llm.llm_engine.add_lora(LoRARequest(name, lora_id, path)))

    def rpc(self, method: str, *arguments: Any) -> Any:
        return self.llm.collective_rpc(method, args=arguments)

    def slots(self, lora_id: int, folder: str) -> Any:
        Path(folder).mkdir(parents=True)
        return self.rpc("read_slots", lora_id, folder)

    def say(self, *adapter: Any) -> list[int]:
        """Greedy token ids; with (name, id, path) of an adapter, which is loaded in the step if need be."""
        request = LoRARequest(*adapter) if adapter else None
        sampling = SamplingParams(temperature=0, max_tokens=4)
        answer = self.llm.generate("The capital of France is", sampling, lora_request=request, use_tqdm=False)
        return list(answer[0].outputs[0].token_ids)

    def judge(self) -> list[int]:
        """The lengths of three prompts' log-probabilities, asked for in one batch."""
        prompts = ["The", "The capital of France is", "Of all the capitals of Europe"]
        sampling = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=1)
        return [
            len(answer.prompt_logprobs) for answer in self.llm.generate(prompts, sampling, use_tqdm=False)
        ]

    def leave_head(self) -> None:
        """As vLLM does it: adapters' slots are added to the head's output again."""
        PunicaWrapperCPU.add_lora_logits = original(PunicaWrapperCPU, "add_lora_logits")

    def leave_blocks(self) -> None:
        """As vLLM does it: blocks are not zeroed any more. In engines that run in this process only."""
        self.llm.llm_engine.engine_core.engine_core.scheduler.needs_kv_cache_zeroing = False

    def gate(self, operation: str) -> Any:
        return getattr(GateClient(self.rpc("safelora_attest")[0]["socket"]), operation)()

    def remove_folder(self, folder: str) -> None:
        shutil.rmtree(folder)

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()
        cleanup_dist_env_and_memory()


def main() -> None:
    job, answers = Path(sys.argv[1]), []
    for engine in json.loads(job.read_text()):
        driver = Driver(engine["model"], engine["options"])
        answers.append([])
        for step, *arguments in engine["steps"]:
            try:
                answers[-1].append(getattr(driver, step)(*arguments))
            except Exception as error:  # a failure is an answer; whether it is the right one, tests say
                answers[-1].append({"error": f"{type(error).__name__}: {error}"})
        driver.close()
        Path(sys.argv[2]).write_text(json.dumps(answers, default=sorted))


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # vLLM's threads would take seconds to end
