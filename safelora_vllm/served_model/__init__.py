"""Whether the served model is the aligned model of a projector cache, or a copy of it in other numbers."""

from safelora_vllm.served_model.check import check_served_model

__all__ = ["check_served_model"]
