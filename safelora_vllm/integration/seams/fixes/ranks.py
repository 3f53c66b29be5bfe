"""All ranks of an engine load an adapter, or none keeps it.

vLLM reads the ranks' answers up to the first failure. Those behind it would be taken for the answers to its
next questions, so no rank answers with a failure here.

An adapter that a rank is still reading is no failure, and no error in vLLM's log, where the API servers see
the answer: of several data-parallel engines they see the first one's only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from safelora_vllm.errors import SafeLoRAError
from safelora_vllm.integration.seams.fixes.fix import VLLM, Fix, replace
from safelora_vllm.integration.seams.table import Requirement

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.v1.executor.abstract import Executor
    from vllm.v1.worker.worker_base import WorkerBase

_LOAD = "safelora_load"
_READING = "it has not been read yet; load it again"


def load_on_all_ranks(self: Executor, lora_request: LoRARequest) -> bool:
    """In place of ``Executor.add_lora``. False where no rank has it, because some are still reading it.

    Raises:
        SafeLoRAError: in the words of the ranks that could not.
    """
    failures = self.collective_rpc(_LOAD, args=(lora_request,))
    if not any(failures):
        return True
    if not all(failures):
        self.collective_rpc("remove_lora", args=(lora_request.lora_int_id,))
    if {*failures} <= {"", _READING} and getattr(self.parallel_config, "data_parallel_index", None) == 0:
        return False
    raise SafeLoRAError("; ".join(dict.fromkeys(failure for failure in failures if failure)))


def load_on_rank(self: WorkerBase, lora_request: LoRARequest) -> str:
    """A method that each worker gets: what went wrong, or nothing."""
    try:
        return "" if self.add_lora(lora_request) else _READING
    except Exception as error:
        return str(error) or type(error).__name__


def _apply() -> None:
    from vllm.v1.executor.abstract import Executor
    from vllm.v1.worker.worker_base import WorkerBase

    setattr(WorkerBase, _LOAD, load_on_rank)
    replace(Executor, "add_lora", load_on_all_ranks)


RANKS = Fix(
    name="ranks",
    why=(
        "When one of several ranks fails to load an adapter, the answers of the others stay unread and are "
        "taken for those to the next question. Ranks that loaded the adapter keep it."
    ),
    upstream=f"{VLLM}/issues/49972, {VLLM}/pull/57846",
    safety=(
        "The question whether a worker is guarded would get an older answer, and an adapter could be in "
        "some ranks only."
    ),
    until="vLLM reads the answers of all ranks, and unloads an adapter that not all of them could load",
    apply=_apply,
    requirements=(
        Requirement("vllm.v1.executor.abstract", "Executor.add_lora", parameters=("self", "lora_request")),
        Requirement(
            "vllm.v1.executor.abstract", "Executor.collective_rpc",
            parameters=("self", "method", "timeout", "args", "kwargs", "..."),
        ),
        Requirement("vllm.v1.executor.abstract", "Executor.__init__", assigns=("parallel_config",)),
        Requirement("vllm.v1.executor.multiproc_executor", "MultiprocExecutor", inherits=("add_lora",)),
        Requirement("vllm.v1.worker.worker_base", "WorkerBase.add_lora", parameters=("self", "lora_request")),
        Requirement("vllm.v1.worker.worker_base", "WorkerBase.remove_lora", parameters=("self", "lora_id")),
    ),
)  # fmt: skip
