"""Whether V is alignment or rounding, where a model of a pair is FP8.

float8_e4m3fn keeps four significant bits: rounding changes a weight by some percent of its norm, and many
alignments change it by less. Where only one of both models is rounded, all of its rounding is in V.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from tqdm import tqdm

from safelora_vllm.errors import CheckpointError
from safelora_vllm.projectors.checkpoint import Checkpoint

logger = logging.getLogger("vllm.safelora.projectors")
_MOST = 0.5  # of ‖V‖², all modules together: above it, V is rounding for the most part


def check_quantisation(base: Checkpoint, aligned: Checkpoint, names: Sequence[str], device: str) -> None:
    """Find out before hours of work what quantisation does to a pair. FP8 weights are read once for it.

    Raises:
        CheckpointError: a weight is quantised in a way that is not read, or V is mostly rounding.
    """
    for model in (base, aligned):
        for name in names:
            model.check_weight(name)
    rounded = [model for model in (base, aligned) if any(map(model.is_fp8, names))]
    if not rounded:
        return
    share = _rounding_share(base, aligned, [n for n in names if base.is_fp8(n) != aligned.is_fp8(n)], device)
    folders = " and ".join(str(model.folder) for model in rounded)
    if share > _MOST:
        raise CheckpointError(
            f"about {share:.0%} of ‖V‖² is the FP8 rounding of {folders}, and not alignment: its projectors "
            "would protect nothing. Give the unquantised checkpoint, or both models in FP8"
        )
    logger.warning(
        "FP8 weights in %s: V holds their rounding besides the alignment. Build from the original "
        "weights where you have them",
        folders,
    )


def _rounding_share(base: Checkpoint, aligned: Checkpoint, names: Sequence[str], device: str) -> float:
    """The share of ‖V‖² that the rounding of one side explains, of modules that are FP8 in one model only."""
    rounding = change = 0.0
    for name in tqdm(names, desc="FP8 rounding", unit="module", delay=1.0):
        model = base if base.is_fp8(name) else aligned
        rounding += model.rounding(name, device)
        change += float((aligned.weight(name, device) - base.weight(name, device)).square().sum())
    return min(1.0, rounding / change) if change > 0.0 else 0.0
