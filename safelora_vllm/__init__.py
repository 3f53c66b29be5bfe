"""Safe LoRA for multi-tenant LoRA serving: vet and project adapters before vLLM loads them.

Building projector caches, inspecting and projecting adapters need no vLLM; ``integration`` does.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("safelora-vllm")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"

__all__ = ["__version__"]
