"""Which linear layers of a model pair get a projector, from names and shapes alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from safelora_vllm.errors import CheckpointError
from safelora_vllm.projectors.checkpoint import Checkpoint
from safelora_vllm.projectors.fp8 import CURE, quantisation_of
from safelora_vllm.projectors.manifest import natural_order

# A linear layer inside a numbered block. Not: embeddings, heads, norms, convolutions, routers and
# experts (vLLM stacks those in other layouts), nor what multimodal models have around the language model.
_IN_BLOCK = re.compile(r"\.\d+\.")
_NOT_LINEAR = re.compile(
    r"embed|norm|conv|lora_|router|experts|(^|\.)gate$|lm_head"
    r"|visual|vision|audio|tower|multi_modal|projector|connector|resampler|qformer|merger|aligner"
    r"|talker|token2wav|codec|tokenizer|(^|\.)(encoder|protein_encoder|vpm|apm|tts|mlp1)\."
)
_PACKED = (".qweight", ".weight_packed")  # in place of .weight
# These families store linear weights transposed (d_in, d_out), which LoRA calls fan_in_fan_out.
_TRANSPOSED_FAMILIES = {"gpt2", "gpt_bigcode", "openai-gpt"}


def select_modules(base: Checkpoint, aligned: Checkpoint, wanted: Iterable[str]) -> list[str]:
    """Names of the modules to build, checked to be in both checkpoints with one shape."""
    families = base.config.get("model_type"), aligned.config.get("model_type")
    if families[0] != families[1]:
        raise CheckpointError(
            f"the models are of different architectures: {base.folder} is {families[0]}, "
            f"{aligned.folder} is {families[1]}. Give the base that the aligned model was made from"
        )
    if families[1] in _TRANSPOSED_FAMILIES:
        raise CheckpointError(f"{families[1]} models store transposed weights: not supported")
    wanted = list(wanted)
    for model in (base, aligned):
        _check_unpacked(model, wanted)
    linear = _linear_layers(aligned)
    if lacking := [name for name in _linear_layers(base) if name not in set(linear)]:
        raise CheckpointError(f"{aligned.folder} has no {lacking[0]}.weight, which {base.folder} has")
    chosen = linear
    if wanted:
        by_part = {part: [n for n in linear if _is_called(n, part)] for part in wanted}
        if missing := [part for part, found in by_part.items() if not found]:
            raise CheckpointError(
                f"{aligned.folder} has no linear layers named {missing}; it has "
                f"{sorted({name.rpartition('.')[2] for name in linear})}"
            )
        chosen = [name for name in linear if any(name in found for found in by_part.values())]
    if not chosen:
        raise CheckpointError(f"{aligned.folder} has no linear layers in numbered blocks")
    for name in chosen:
        weight = f"{name}.weight"
        if weight not in base.tensors:
            raise CheckpointError(f"{base.folder} has no {weight}, which {aligned.folder} has")
        shapes = base.tensors[weight].shape, aligned.tensors[weight].shape
        if shapes[0] != shapes[1]:
            for model in (base, aligned):  # packed weights have other shapes
                model.check_weight(name)
            raise CheckpointError(f"{weight} is {shapes[0]} in the base and {shapes[1]} in the aligned model")
    return chosen


def _is_called(name: str, part: str) -> bool:
    return name == part or name.endswith("." + part)


def _check_unpacked(checkpoint: Checkpoint, wanted: Sequence[str]) -> None:
    """Refuse linear layers that have packed integers in place of a weight, as GPTQ, AWQ and FP4 have.

    Raises:
        CheckpointError: one of these is wanted.
    """
    for suffix in _PACKED:
        for name in _layers_with(checkpoint, suffix):
            if not wanted or any(_is_called(name, part) for part in wanted):
                method = quantisation_of(checkpoint.config).get("quant_method")
                raise CheckpointError(
                    f"{name} in {checkpoint.folder} is packed ({name}{suffix}), quantised by {method!r:.80}: "
                    f"expected plain floats or FP8 with scales. {CURE}"
                )


def _linear_layers(checkpoint: Checkpoint) -> list[str]:
    return _layers_with(checkpoint, ".weight")


def _layers_with(checkpoint: Checkpoint, suffix: str) -> list[str]:
    """Linear layers in numbered blocks that have a tensor of this name."""
    return sorted(
        (
            name.removesuffix(suffix)
            for name, info in checkpoint.tensors.items()
            if name.endswith(suffix)
            and len(info.shape) == 2
            and _IN_BLOCK.search(name)
            and not _NOT_LINEAR.search(name.removesuffix(suffix))
        ),
        key=natural_order,
    )
