"""Refusing to serve a model that is neither the aligned model of a projector cache nor a copy of it."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safelora_vllm.errors import CheckpointError, ProjectorCacheError
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.projectors.checkpoint import Checkpoint
from safelora_vllm.projectors.weight_files import refuse_other_files
from safelora_vllm.served_model.compare import Fit, compare, position_error, totals
from safelora_vllm.served_model.stored import FLOATS, TRUST

logger = logging.getLogger("vllm.safelora.served")
# Measured limits: see docs/quantised-models.md.
MOST_OUTSIDE = 0.0015  # share of all samples that rounding to the nearest need not explain
MOST_OUTSIDE_OF_ONE = 0.01  # the same of one weight
FEW = 4  # samples of one weight that may be outside in any case
MOST_ERROR = 4.0  # times the expected ‖·‖² of rounding to the nearest, of all calibrated weights
MOST_ERROR_OF_ONE = 8.0
MOST_POSITION = 0.1  # on the way from the aligned model to the base, or
DEVIATIONS = 4.0  # so many standard deviations that rounding gives it
MOST_DEVIATION = 0.1  # above it, the aligned model and the base are not told apart
# Not measured: far above what was seen of honest copies.
MOST_DISTANCE = 0.35  # ‖W_served − W_aligned‖/‖W_aligned‖ of all quantised weights together
MOST_DISTANCE_OF_ONE = 0.5
MOST_SCALES = 0.001  # share of the samples of one weight whose scale does not fit the aligned weights


@dataclass(frozen=True)
class Comparison:
    """What was found of a copy.

    Attributes:
        form: how it is stored.
        weights: how many weights were compared.
        error: ‖W_served − W_aligned‖/‖W_aligned‖ of the quantised weights, or of all if there are none.
        outside: the share of samples that rounding to the nearest does not explain.
        ratio: the error's square over that of rounding to the nearest.
        position: where it is on the way from the aligned model (0) to the base (1).
        rounded: whether rounding to the nearest explains all weights.
    """

    form: str
    weights: int
    error: float
    outside: float
    ratio: float
    position: float
    rounded: bool

    def __str__(self) -> str:
        kind = "all of it rounding" if self.rounded else "calibrated: smaller changes are not seen"
        return (
            f"{self.form}, {self.weights} weights, {self.error:.2%} from the aligned model ({kind}), "
            f"{self.position:+.3f} of the way to the base"
        )


def check_served_model(cache: ProjectorCache, model: str | Path, quick: bool = False) -> Comparison | None:
    """Compare a served model with the aligned side of a cache.

    The model itself is known by its fingerprint. A copy in other numbers is read once and compared with
    samples.

    Args:
        cache: the projector cache.
        model: a folder or a hub id.
        quick: compare only one layer of a copy.

    Returns:
        What was found of a copy; None for the model itself.

    Raises:
        ProjectorCacheError: it is another model, or the cache has no samples.
        CheckpointError: it is stored in a form that cannot be compared, or the folder has other weights.
    """
    checkpoint = Checkpoint(model)
    refuse_other_files(checkpoint.folder)
    fingerprint = checkpoint.fingerprint()
    if cache.is_aligned(fingerprint):
        return None
    if (samples := cache.samples()) is None:
        try:
            cache.check_model(fingerprint, model)
        except ProjectorCacheError as error:
            raise ProjectorCacheError(
                f"{error}. This cache has no samples of the weights, with which a quantised or converted "
                "copy is recognised: build it again, or say that the model is one with `trust_served_model`"
            ) from error
        return None
    try:
        found = judged(compare(samples, checkpoint, quick), str(model), quick)
    except CheckpointError as error:
        if TRUST in str(error):
            raise
        raise ProjectorCacheError(f"{error}. The projector cache is {cache.folder}") from error
    if not quick:
        level = logging.INFO if found.rounded else logging.WARNING
        logger.log(level, "the served model is a copy of the aligned one: %s", found)
    return found


def judged(fits: Sequence[Fit], model: str, quick: bool = False) -> Comparison:
    """Whether some weights are those of a copy.

    Raises:
        ProjectorCacheError: they are not.
    """
    if not fits:
        raise ProjectorCacheError(f"{model} has no weights that can be compared. {TRUST}")
    if broken := [fit.module for fit in fits if not math.isfinite(fit.error + fit.expected)]:
        raise ProjectorCacheError(f"{broken[0]} of {model} has NaN or infinite values; download it again")
    everything, quantised = totals(fits), totals([fit for fit in fits if fit.form not in FLOATS] or fits)
    position = -everything.along / everything.change if everything.change else 0.0
    share = quantised.outside / quantised.count
    ratio = _over(quantised.error, quantised.expected)
    others = [fit for fit in fits if fit.outside > _most_outside(fit)]
    if share > MOST_OUTSIDE and not others:
        others = [fit for fit in fits if fit.outside > MOST_OUTSIDE * fit.count]
    error = math.sqrt(_over(quantised.error, quantised.norm))
    found = Comparison(everything.form, len(fits), error, share, ratio, position, rounded=not others)
    deviation = position_error(fits)
    if (
        not quick
        and deviation <= MOST_DEVIATION
        and abs(position) > max(MOST_POSITION, DEVIATIONS * deviation)
    ):
        raise _other(model, found, f"it is {position:.0%} of the way from the aligned model to the base")
    _check_scales(fits, model, found)
    strict = [fit for fit in others if not fit.calibrated]
    far = [fit for fit in fits if fit.form not in FLOATS and _far(fit)]
    if strict or far:
        one = (strict or far)[0]
        size, expected = (math.sqrt(_over(part, one.norm)) for part in (one.error, one.expected))
        raise _other(
            model, found,
            f"{len({*strict, *far})} of {len(fits)} weights differ by more than their rounding, such as "
            f"{one.module}, {one.form}: {size:.2%} from the aligned one, where {expected:.2%} is expected",
        )  # fmt: skip
    if quantised.form not in FLOATS and ratio > MOST_ERROR:
        raise _other(model, found, f"its squared error is {ratio:.1f} times that of rounding to the nearest")
    if error > MOST_DISTANCE:
        raise _other(model, found, f"its weights are {error:.0%} away from the aligned ones")
    if not others:
        return found
    if not quick and deviation > MOST_DEVIATION:
        raise ProjectorCacheError(
            f"{model} is rounded too coarsely to tell the aligned model from the base: {found}. {TRUST}"
        )
    return found


def _check_scales(fits: Sequence[Fit], model: str, found: Comparison) -> None:
    """Refuse scales so large that rounding to them explains any weight, or so small that clipping does."""
    for what in ("coarse", "clipped"):
        for fit in fits:
            if (count := getattr(fit, what)) > max(FEW, MOST_SCALES * fit.count):
                small = "larger" if what == "coarse" else "smaller"
                raise _other(
                    model, found,
                    f"the scales of {count} of {fit.count} samples of {fit.module}, {fit.form}, are {small} "
                    "than the aligned weights need",
                )  # fmt: skip


def _far(fit: Fit) -> bool:
    """Whether a weight is further from the aligned one than any tool's rounding."""
    return fit.error > min(MOST_ERROR_OF_ONE * fit.expected, MOST_DISTANCE_OF_ONE**2 * fit.norm)


def _most_outside(fit: Fit) -> float:
    """How many samples of one weight may be outside: floats are rounded to the nearest by every tool."""
    return FEW if fit.form in FLOATS else max(FEW, MOST_OUTSIDE_OF_ONE * fit.count)


def _over(part: float, whole: float) -> float:
    return part / whole if whole else math.inf if part else 1.0


def _other(model: str, found: Comparison, cause: str) -> ProjectorCacheError:
    return ProjectorCacheError(
        f"{model} is not a copy of the aligned model: {cause} ({found.form}). Serve the model given as "
        f"--aligned or a quantised copy of it, or build a cache for this one. {TRUST}"
    )
