"""Which form a served weight is stored in, and its values there."""

from __future__ import annotations

from safelora_vllm.projectors import fp8
from safelora_vllm.served_model import bitsandbytes, floats, integers
from safelora_vllm.served_model.stored import FLOATS, Place, Stored

# Tensors of a module that `read` uses, besides ``weight``.
PARTS = (
    "qweight", "qzeros", "scales", "g_idx",
    "weight_packed", "weight_scale", "weight_scale_inv", "weight_zero_point", "weight_shape", "weight_g_idx",
    "SCB", "weight_format", "weight.absmax", "weight.quant_map", "weight.nested_absmax",
    "weight.nested_quant_map", *(f"weight.quant_state.bitsandbytes__{kind}" for kind in bitsandbytes.KINDS),
)  # fmt: skip
_GPTQ = ("gptq", "gptq_marlin", "auto-round", "auto_gptq")
_AWQ = ("awq", "awq_marlin", "auto_awq")


def read(place: Place) -> Stored:
    """The samples of a weight.

    Raises:
        CheckpointError: a form that is not read, or tensors that do not fit each other.
    """
    method = str(fp8.quantisation_of(place.model.config).get("quant_method", ""))
    if place.has("qweight"):
        if method in _AWQ:
            return integers.awq(place)
        if method in _GPTQ and "awq" not in str(fp8.quantisation_of(place.model.config)):
            return integers.gptq(place)
        raise place.cannot(f"packed as `qweight` by {method!r:.80}")
    if place.has("weight_packed"):
        return integers.packed_tensors(place)
    info = place.model.tensors.get(f"{place.module}.weight") or place.model.tensors[place.module]
    if (kind := bitsandbytes.kind_of(place)) is not None:
        return bitsandbytes.four_bits(place, kind)
    shape = tuple(info.shape)
    if shape[-1] != place.shape[1] or _rows(shape) != place.shape[0]:
        raise place.cannot(f"{info.dtype} {shape} where the aligned model has {place.shape}")
    if info.dtype in FLOATS:
        return floats.plain(place)
    if info.dtype == fp8.FP8:
        return floats.scaled_fp8(place)
    if info.dtype == "I8" and place.has("SCB"):
        return bitsandbytes.eight_bits(place)
    if info.dtype == "I8" and place.has("weight_scale"):
        return integers.integer_tensors(place)
    raise place.cannot(f"{info.dtype}, quantised by {method!r:.80}")


def _rows(shape: tuple[int, ...]) -> int:
    rows = 1
    for side in shape[:-1]:
        rows *= side
    return rows
