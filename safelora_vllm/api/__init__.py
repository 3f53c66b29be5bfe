"""The Python API: projector caches, and adapters through the gate, without a server.

Everything here is also exported by the package itself::

    import safelora_vllm as sl

The commands ``build``, ``plan``, ``inspect``, ``project`` and ``calibrate`` only parse options and print.
"""

from safelora_vllm.api.adapters import inspect_adapter, project_adapter
from safelora_vllm.api.many import project_adapters
from safelora_vllm.api.planning import plan_projectors
from safelora_vllm.api.projectors import build_projectors, calibrate_policy

__all__ = [
    "build_projectors",
    "calibrate_policy",
    "inspect_adapter",
    "plan_projectors",
    "project_adapter",
    "project_adapters",
]
