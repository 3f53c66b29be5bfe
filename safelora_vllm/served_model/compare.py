"""Comparing a served model's weights with the samples of the aligned model."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from safelora_vllm.errors import CheckpointError
from safelora_vllm.projectors.checkpoint import Checkpoint
from safelora_vllm.projectors.manifest import natural_order
from safelora_vllm.projectors.samples import PER_ROW, Samples, columns
from safelora_vllm.projectors.weight_files import FLOAT_DTYPES
from safelora_vllm.served_model import forms, scales
from safelora_vllm.served_model.floats import spacing
from safelora_vllm.served_model.rescaling import Rescaling, first_those_with_rows
from safelora_vllm.served_model.scales import CELL
from safelora_vllm.served_model.stored import Place, Stored

RESCALED_FROM = 1.5  # times the expected ‖·‖² of rounding: rows that are so far off are tried with factors
_WEIGHT, _BIAS, _HEAD = ".weight", ".bias", "lm_head.weight"
# Of activations and of the key-value cache: they are no weights.
_OTHER = (
    ".input_scale", ".input_zero_point", ".output_scale", ".k_scale", ".v_scale", ".q_scale", ".kv_scale",
    ".prob_scale", ".rotary_emb.inv_freq",
)  # fmt: skip


@dataclass(frozen=True)
class Fit:
    """How one served weight fits the aligned model's, at its samples.

    Attributes:
        module, form, calibrated: see `Stored`.
        count: how many samples.
        outside: of these, values that rounding to the nearest does not explain.
        coarse: those whose scale is larger than the aligned weights need.
        clipped: those whose scale is smaller than any tool would choose.
        error, expected, norm, change: sums of squares: of the differences, of what rounding to the nearest
            is expected to make, of the aligned weights, and of V.
        along: the sum of products of the differences and V.
        rescaled: whether factors were moved between layers.
    """

    module: str
    form: str
    calibrated: bool
    count: int
    outside: int
    error: float
    expected: float
    norm: float
    change: float
    along: float
    coarse: int = 0
    clipped: int = 0
    rescaled: bool = False


def compare(samples: Samples, model: Checkpoint, quick: bool = False) -> list[Fit]:
    """Read the served weights, one at a time.

    Args:
        samples: of the aligned model.
        model: the served one.
        quick: compare only one layer.

    Raises:
        CheckpointError: a form that cannot be compared, or other tensors than the aligned model's.
    """
    names = _names(samples, model)
    shapes = {name.removesuffix(_WEIGHT): samples.shapes[name] for name in names}
    of_norms = str(model.config.get("model_type", ""))
    rescaling = Rescaling(shapes, plain_norms=not of_norms.startswith("gemma"))
    vectors = [name for name in names if len(samples.shapes[name]) == 1]
    biases = [name for name in vectors if not _same(samples.values(name), model, name, rescaling)]
    weights = first_those_with_rows(sorted(set(names) - set(vectors), key=natural_order))
    if quick and (numbered := [name for name in weights if _layer(name)]):
        weights = [name for name in numbered if _layer(name) == _layer(numbered[0])]
    bar = tqdm(weights, desc="Comparing the served model", unit="weight", delay=2.0, file=sys.stderr)
    fits = [_fit(samples, model, name, rescaling) for name in bar]
    for name in biases:
        factors = rescaling.outputs(name.removesuffix(_BIAS))
        if not quick and (factors is None or not _equal(samples.values(name), model, name, factors)):
            raise _differs(model, name)
    return fits


def _layer(name: str) -> str:
    """What of a name is up to its first number; empty without one."""
    found = re.match(r"(?:[^.]+\.)*?\d+\.", name)
    return found[0] if found else ""


def _names(samples: Samples, model: Checkpoint) -> list[str]:
    """Names of the samples that are compared.

    Raises:
        CheckpointError: a tensor that only one of both models has.
    """
    names, known = {name for name in samples.shapes if not name.endswith(_OTHER)}, set[str]()
    for name in samples.shapes:
        module = name.removesuffix(_WEIGHT)
        known |= {name, *(f"{module}.{part}" for part in forms.PARTS)}
    tied = bool(model.config.get("tie_word_embeddings"))
    missing = {name for name in names if not _there(model, name)}
    if _HEAD in missing and tied:
        missing.discard(_HEAD)
        names.discard(_HEAD)
    more = sorted(name for name in model.tensors if name not in known and not name.endswith(_OTHER))
    more = [name for name in more if not (_harmless(model, name) or (tied and name == _HEAD))]
    for what, found in (("lacks", sorted(missing)), ("has besides", more)):
        if found:
            raise CheckpointError(
                f"{model.folder} is not a copy of the aligned model: it {what} {len(found)} tensors, the "
                f"first is {found[0]}. Serve the model given as --aligned, or a copy with the same layers"
            )
    return sorted(names)


def _there(model: Checkpoint, name: str) -> bool:
    module = name.removesuffix(_WEIGHT)
    return any(key in model.tensors for key in (name, f"{module}.qweight", f"{module}.weight_packed"))


def _harmless(model: Checkpoint, name: str) -> bool:
    """Whether it is a bias of zeros, which GPTQ's tools write."""
    if not name.endswith(_BIAS) or model.tensors[name].dtype not in FLOAT_DTYPES:
        return False
    return not bool(model.read(name).any())


def _same(aligned: Tensor, model: Checkpoint, name: str, rescaling: Rescaling) -> bool:
    """Whether a vector is as in the aligned model; False for a bias that may belong to rescaled rows.

    Raises:
        CheckpointError: it is not.
    """
    if _equal(aligned, model, name):
        return True
    module = name.removesuffix(_WEIGHT)
    if module != name and rescaling.norm(module, aligned, model.read(name).to(torch.float64)):
        return True
    if name.endswith(".v_proj.bias"):
        return False
    raise _differs(model, name)


def _equal(aligned: Tensor, model: Checkpoint, name: str, factors: Tensor | None = None) -> bool:
    """Up to the rounding of the served dtype, and with factors up to that of the rows that they are from."""
    served = model.read(name)
    if served.shape != aligned.shape or served.dtype not in FLOAT_DTYPES.values():
        return False
    half = spacing(aligned, served.dtype) / 2 * CELL
    if factors is None:
        return bool(((served.to(torch.float64) - aligned).abs() <= half).all())
    difference = served.to(torch.float64) / factors - aligned
    return bool(difference.norm() <= 0.1 * aligned.norm())


def _differs(model: Checkpoint, name: str) -> CheckpointError:
    return CheckpointError(
        f"{model.folder} is not a copy of the aligned model: {name}, which is not quantised, differs. Serve "
        "the model given as --aligned, or a quantised copy of it"
    )


def _fit(samples: Samples, model: Checkpoint, name: str, rescaling: Rescaling) -> Fit:
    module, aligned = name.removesuffix(_WEIGHT), samples.values(name)
    rows, width = samples.shapes[name]
    place = Place(model, module, (rows, width), columns(samples.seed, name, rows, width))
    stored = forms.read(place)
    values, scale = stored.values, torch.ones(1, 1, dtype=torch.float64)
    limit = scales.limit(samples.largest(name), stored)
    if (factors := rescaling.inputs(module)) is not None:
        scale = factors[place.columns]
        limit = limit * scales.smallest(factors, stored.size)[place.columns // stored.size].reciprocal()
    found = _sums(module, stored, limit, scale, aligned, samples.change(name))
    if not stored.calibrated or found.error <= RESCALED_FROM * found.expected:
        return found
    if (of_rows := rescaling.rows(module, aligned, values * scale)) is None:
        return found
    scale, limit = scale / of_rows[:, None], limit * of_rows[:, None]
    fitted = _sums(module, stored, limit, scale, aligned, samples.change(name), fitted=1)
    if fitted.error > found.error / 2:
        return found
    rescaling.take(module, of_rows)
    return fitted


def _sums(
    module: str, stored: Stored, limit: Tensor, scale: Tensor, aligned: Tensor, change: Tensor | None,
    fitted: int = 0,
) -> Fit:  # fmt: skip
    """limit: of the scales' reach. fitted: how many factors of each row were made from its samples."""
    values = stored.values
    difference, freedom = values * scale - aligned, PER_ROW / (PER_ROW - fitted)
    outside = (difference > stored.below * scale * CELL) | (-difference > stored.above * scale * CELL)
    expected = (stored.expected * scale.square()).expand(values.shape)
    v = torch.zeros_like(aligned) if change is None else change
    return Fit(
        module, stored.form, stored.calibrated, aligned.numel(), int(outside.sum()),
        float(difference.square().sum()) * freedom, float(expected.sum()), float(aligned.square().sum()),
        float(v.square().sum()), float((difference * v).sum()), *scales.counts(stored, limit, scale, aligned),
        rescaled=scale.numel() > 1,
    )  # fmt: skip


def totals(fits: Sequence[Fit]) -> Fit:
    """The sums of all weights."""
    first = fits[0]
    sums = {
        part: sum(getattr(fit, part) for fit in fits)
        for part in ("count", "outside", "error", "expected", "norm", "change", "along", "coarse", "clipped")
    }
    calibrated = any(fit.calibrated for fit in fits)
    form = " and ".join(dict.fromkeys(fit.form for fit in fits))
    return Fit(first.module, form, calibrated, rescaled=any(fit.rescaled for fit in fits), **sums)


def position_error(fits: Sequence[Fit]) -> float:
    """The standard deviation of −along/change of all weights that their rounding alone makes."""
    change = sum(fit.change for fit in fits)
    noise = sum(fit.error * fit.change / fit.count for fit in fits if fit.count)
    return math.sqrt(noise) / change if change else math.inf
