"""How the check of a quantised served model tells copies of the aligned model from other models.

    PYTHONPATH=.:benchmarks python benchmarks/quantised.py [--base DIR] [--aligned DIR] [--layers 0 3 6]

Writes ``results/quantised.json``. ``--only FORM`` measures the rows of one form and keeps the others. Of some
layers of a pair, each form of quantised checkpoint is made of the aligned model, of the base, and of the
aligned model with a change of a stated size: a random one of rank 16 in every linear layer, as merging makes
it. GPTQ is also made as its tools do, with inputs of the model itself, and AWQ with factors moved between
layers. Every checkpoint goes through the check of a start.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import recording
import torch
from torch import Tensor

from safelora_vllm.errors import SafeLoRAError
from safelora_vllm.projectors.checkpoint import Checkpoint
from safelora_vllm.projectors.samples import open_samples, write_samples
from safelora_vllm.served_model.check import judged
from safelora_vllm.served_model.compare import compare, position_error, totals
from tests import quantised

MODELS = Path(__file__).resolve().parents[1] / ".cache" / "models"
GROUP, RANK = 64, 16
CHANGES = (0.01, 0.1, 0.3)
_TAKEN = (
    "GPTQ, 4 bits", "AWQ, 4 bits", "compressed-tensors, int8", "compressed-tensors, FP8", "bitsandbytes, NF4",
)  # fmt: skip


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, default=MODELS / "base")
    parser.add_argument("--aligned", type=Path, default=MODELS / "aligned")
    parser.add_argument("--text", type=Path, default=Path(__file__).parents[1] / "README.md")
    parser.add_argument("--out", type=Path, default=recording.RESULTS)
    parser.add_argument("--layers", type=int, nargs="+", default=list(range(0, 30, 3)))
    parser.add_argument("--only", help="measure this form, and keep the others' rows")
    args = parser.parse_args()
    torch.set_num_threads(1)
    given = Checkpoint(args.aligned)
    after, before = (
        {name: model.read(name) for name in model.tensors if _taken(name, args.layers)}
        for model in (given, Checkpoint(args.base))
    )
    names = [name.removesuffix(".weight") for name in after if name.endswith("_proj.weight")]
    forms = {form: found for form, found in quantised.forms(GROUP).items() if form in _TAKEN}
    copies: dict[str, tuple[dict[str, Any], Callable[..., Any]]] = {}
    for form, (config, quantise) in {**forms, "bfloat16": ({}, lambda w: {"weight": w})}.items():
        copies[form] = (config, lambda state, _, quantise=quantise: (state, quantise))
    moments: dict[str, Tensor] = {}

    def with_inputs(make: Callable[..., Any]) -> Callable[..., Any]:
        def made(state: dict[str, Tensor], names: list[str]) -> Any:
            if not moments:
                moments.update(inputs(args.aligned, names, args.text))
            return make(state, names, moments)

        return made

    copies["AWQ, 4 bits, rescaled and clipped"] = forms["AWQ, 4 bits"][0], with_inputs(rescaled)
    copies["GPTQ, 4 bits, calibrated"] = forms["GPTQ, 4 bits"][0], with_inputs(calibrated)
    cases: dict[str, dict[str, Any]] = {}
    if args.only:
        cases = json.loads((args.out / "quantised.json").read_text())["cases"]
        copies = {args.only: copies[args.only]}
        cases.pop(args.only, None)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pair = [folder / "base", folder / "aligned"]
        for part, state in zip(pair, (before, after), strict=True):
            quantised.write(part, state, [], given.config, {}, lambda _: {})
        base, aligned = map(Checkpoint, pair)
        write_samples(folder, base, aligned)
        samples = open_samples(folder, aligned.fingerprint())
        assert samples is not None
        figures = {
            "modules": len(names), "layers": len(args.layers), "group": GROUP, "rank": RANK,
            "samples_bytes": samples.file.stat().st_size,
            "change_over_weight": round(distance(after, before, names), 6),
        }  # fmt: skip
        for form, (config, make) in copies.items():
            for case in ("aligned", "base", *CHANGES):
                state = {"aligned": after, "base": before}.get(str(case)) or changed(
                    after, names, float(case)
                )
                weights, quantise = make(state, names)
                made = quantised.write(folder / "copy", weights, names, aligned.config, config, quantise)
                found = result(samples, made)
                shutil.rmtree(made)
                cases.setdefault(form, {})[str(case)] = found
                print(form, case, found, flush=True)
                recording.write("quantised", "quantised.py", 1, {**figures, "cases": cases}, args.out)
                if isinstance(case, float) and not found["served"]:
                    break
    print(f"written to {args.out}")


def _taken(name: str, layers: list[int]) -> bool:
    found = re.search(r"\.layers\.(\d+)\.", name)
    return found is not None and int(found[1]) in layers


def distance(state: dict[str, Tensor], other: dict[str, Tensor], names: list[str]) -> float:
    """‖V‖/‖W_aligned‖ of all linear layers together."""
    weights = [(state[f"{name}.weight"].float(), other[f"{name}.weight"].float()) for name in names]
    change = sum(float((one - two).square().sum()) for one, two in weights)
    return (change / sum(float(one.square().sum()) for one, _ in weights)) ** 0.5


def result(samples: Any, made: Path) -> dict[str, Any]:
    """What the check says of a checkpoint."""
    began = perf_counter()
    fits = compare(samples, Checkpoint(made))
    seconds = perf_counter() - began
    whole = totals(fits)
    try:
        cause, served, rounded = "", True, judged(fits, "the copy").rounded
    except SafeLoRAError as error:
        cause, served, rounded = str(error), False, False
    return {
        "served": served,
        "rounded": rounded,
        "error": round((whole.error / whole.norm) ** 0.5, 6),
        "ratio": round(whole.error / whole.expected, 4),
        "largest_ratio": round(max(fit.error / fit.expected if fit.expected else 0.0 for fit in fits), 4),
        "outside": round(whole.outside / whole.count, 6),
        "largest_outside": round(max(fit.outside / fit.count for fit in fits), 6),
        "position": round(-whole.along / whole.change, 4),
        "position_error": round(position_error(fits), 4),
        "seconds": round(seconds, 2),
        "cause": cause,
    }


def changed(state: dict[str, Tensor], names: list[str], size: float) -> dict[str, Tensor]:
    """The model with a random change of rank 16 in each linear layer, of this size relative to the weight."""
    generator, found = torch.Generator().manual_seed(7), dict(state)
    for name in names:
        weight = state[f"{name}.weight"]
        left = torch.randn(weight.shape[0], RANK, generator=generator)
        change = left @ torch.randn(RANK, weight.shape[1], generator=generator)
        found[f"{name}.weight"] = (
            weight.float() + change * (size * weight.float().norm() / change.norm())
        ).to(weight.dtype)
    return found


def inputs(model: Path, names: list[str], text: Path) -> dict[str, Tensor]:
    """XᵀX of each linear layer's inputs over some text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokens = AutoTokenizer.from_pretrained(model)(text.read_text(), return_tensors="pt")
    moments: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def record(_: Any, given: tuple[Tensor, ...]) -> None:
            x = given[0].reshape(-1, given[0].shape[-1])
            moments[name] = x.T @ x

        return record

    for name in names:
        network.get_submodule(name).register_forward_pre_hook(hook(name))
    with torch.inference_mode():
        network(tokens["input_ids"][:, :512])
    return moments


def calibrated(state: dict[str, Tensor], names: list[str], moments: dict[str, Tensor]) -> Any:
    """GPTQ (Frantar et al., 2022): columns are rounded in turn, and the rest makes up for the error."""
    queue = iter(names)

    def quantise(weight: Tensor) -> quantised.Parts:
        codes, scale, zero = gptq_codes(weight.float(), moments[next(queue)])
        return quantised.gptq(codes, scale, zero, 4)

    return state, quantise


def gptq_codes(weight: Tensor, moment: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and zero points of one weight."""
    weight, d_in = weight.clone(), weight.shape[1]
    damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(d_in)
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    codes = torch.zeros(weight.shape, dtype=torch.int64)
    scales = []
    for start in range(0, d_in, GROUP):
        end = start + GROUP
        group, errors = weight[:, start:end].clone(), torch.zeros(len(weight), GROUP)
        _, scale, _ = quantised.round_groups(group, 4, GROUP, True)
        scales.append(scale)
        for column in range(GROUP):
            value, step = group[:, column], factor[start + column, start:end]
            code = (value / scale[:, 0] + 8).round().clamp(0, 15)
            errors[:, column] = (value - (code - 8) * scale[:, 0]) / step[column]
            group[:, column:] -= errors[:, column, None] * step[column:]
            codes[:, start + column] = code
        weight[:, end:] -= errors @ factor[start:end, end:]
    scale = torch.cat(scales, 1)
    return codes, scale, torch.full_like(scale, 8).to(torch.int64)


def rescaled(state: dict[str, Tensor], names: list[str], moments: dict[str, Tensor]) -> Any:
    """AWQ (Lin et al., 2023) with half of each input's size as its factor, and groups clipped at 95 %."""
    found = {name: tensor.float() for name, tensor in state.items()}

    def factors(name: str) -> Tensor:
        size = moments[name].diagonal().sqrt().clamp_min(1e-4).sqrt()
        return size / (size.max() * size.min()).sqrt()

    for layer in sorted({name.rsplit(".", 2)[0] for name in names}):
        for norm, readers in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            s = factors(f"{layer}.{readers[0]}")
            found[f"{layer}.{norm}.weight"] = found[f"{layer}.{norm}.weight"] / s
            for reader in readers:
                found[f"{layer}.{reader}.weight"] = found[f"{layer}.{reader}.weight"] * s
        s = factors(f"{layer}.mlp.down_proj")
        found[f"{layer}.mlp.up_proj.weight"] = found[f"{layer}.mlp.up_proj.weight"] / s[:, None]
        found[f"{layer}.mlp.down_proj.weight"] = found[f"{layer}.mlp.down_proj.weight"] * s

    def quantise(weight: Tensor) -> quantised.Parts:
        parts = weight.reshape(weight.shape[0], -1, GROUP)
        limit = 0.95 * parts.abs().amax(-1, keepdim=True)
        return quantised.awq(
            *quantised.round_groups(parts.clamp(-limit, limit).reshape(weight.shape), 4, GROUP, False)
        )

    modules = {f"{name}.weight" for name in names}
    return {n: t if n in modules else t.to(state[n].dtype) for n, t in found.items()}, quantise


if __name__ == "__main__":
    main()
