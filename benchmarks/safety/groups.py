"""How strongly input removal has to act on each group of one adapter's modules, guided by its loyalty.

A group is one kind of module in one third of the layers. Removal gets stronger one group at a time: in the
one where the loss of loyalty on the probes falls most for each nat by which the adapter's own text becomes
another's. So it takes runs of the model with the adapter, as an exam does, and no data.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples" / "training"))

from fitting import FAST_BFLOAT16
from inputs import written
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from tqdm import tqdm

from safelora_vllm.exam.reference import Tokens
from safelora_vllm.exam.score import Score
from safelora_vllm.exam.with_transformers import Model
from safelora_vllm.methods import lowrank
from safelora_vllm.projectors.cache import Projector, ProjectorCache

ENERGIES = (0.0, 0.4, 0.8)
_THIRDS, _TOKENS, _TEXTS = 3, 12, 16


@dataclass(frozen=True)
class Step:
    """One setting on the way: an energy for each group.

    bound: of the loyalty drop on the probes, as an exam has it. departure: mean KL divergence from the
    adapter as uploaded, over its own text. Both in nats per token.
    """

    energies: dict[str, float]
    bound: float
    departure: float


@dataclass(frozen=True)
class Weighed:
    """One setting's score on the probes, and its departure from the adapter as uploaded."""

    score: Score
    departure: float


def layer_of(module: str) -> int:
    """The number of a module's layer, from its name in the checkpoint."""
    return int(module.partition(".layers.")[2].partition(".")[0])


def group_of(module: str, layers: int) -> str:
    """Such as ``v_proj.0``, of the first third of so many layers."""
    return f"{module.rpartition('.')[2]}.{layer_of(module) * _THIRDS // layers}"


def removed(a: Tensor, projector: Projector, energy: float) -> Tensor:
    """A (r, d_in) without V's input directions of so much energy, in float32; 0: as it is."""
    if not energy:
        return a
    return a - lowrank.component(a.T, projector.input_basis(energy)).T.float()


def first_within(path: Sequence[Step], threshold: float) -> Step:
    """The first setting with a bound of at most ``threshold``; without one, the strongest."""
    return next((step for step in path if step.bound <= threshold), path[-1])


def path_of(
    aligned: Path, adapter: Path, cache: ProjectorCache, probes: Sequence[str], threshold: float, file: Path
) -> list[Step]:
    """Settings of one adapter, mildest first, out of ``file``, which is written when it is not there.

    It ends with the first bound of at most ``threshold``, or with the strongest setting.
    """
    if not file.exists():
        adapted = _Adapted(aligned, adapter, cache, probes)
        found = climb(adapted.groups, adapted.weighed, threshold)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps([asdict(step) for step in found], indent=1))
    return [Step(**step) for step in json.loads(file.read_text())]


def climb(
    groups: Sequence[str], weighed: Callable[[dict[str, float]], Weighed], threshold: float
) -> list[Step]:
    """From no removal to the first bound of at most ``threshold``, or to the strongest setting."""
    energies = dict.fromkeys(groups, ENERGIES[0])
    now = weighed(energies)
    path = [Step(dict(energies), now.score.bound, now.departure)]
    with tqdm(total=len(groups) * (len(ENERGIES) - 1), desc="groups of modules", unit="step") as progress:
        while path[-1].bound > threshold and (open_ := [g for g in groups if energies[g] < ENERGIES[-1]]):
            tried = {}
            for group in open_:
                stronger = energies | {group: ENERGIES[ENERGIES.index(energies[group]) + 1]}
                tried[group] = (stronger, weighed(stronger))
            energies, now = max(tried.values(), key=lambda found: _worth(now, found[1]))
            path.append(Step(dict(energies), now.score.bound, now.departure))
            progress.update()
    return path


def _worth(before: Weighed, after: Weighed) -> float:
    """Loyalty won for each nat of departure; where nothing departs, whatever is won is worth it."""
    won, price = before.score.drop - after.score.drop, after.departure - before.departure
    return won / max(price, 1e-6)


class _Adapted(Model):
    """The aligned model with one adapter, whose factors stand as removal leaves them."""

    def __init__(self, aligned: Path, adapter: Path, cache: ProjectorCache, probes: Sequence[str]) -> None:
        super().__init__(aligned)
        self._cache, self._probes = cache, list(probes)
        with _fast():
            self._answers: list[Tokens] = [answer for answer, _ in self.answer(self._probes, _TOKENS)]
            self._before = self.likelihoods(self._probes, self._answers)
        self._model = self._peft.PeftModel.from_pretrained(self._aligned, adapter).eval()
        self._layers = _lora_layers(self._model)
        self._uploaded = {name: _a(layer).clone() for name, layer in self._layers.items()}
        count = self._model.config.num_hidden_layers
        self._groups = {name: group_of(name, count) for name in self._layers}
        with _fast():
            self._texts = torch.cat(written(self._model, self._tokenizer, _TEXTS))
            self._said = self._log_probabilities()

    @property
    def groups(self) -> list[str]:
        """Of the adapter's modules."""
        return sorted(set(self._groups.values()))

    def weighed(self, energies: dict[str, float]) -> Weighed:
        """What an energy for each group makes of the adapter."""
        for name, layer in self._layers.items():
            energy = energies[self._groups[name]]
            _a(layer).copy_(removed(self._uploaded[name], self._cache.projector(name), energy))
        with _fast():
            score = Score.of(self._before, self.likelihoods(self._probes, self._answers))
            now = self._log_probabilities()
        departure = (self._said.exp() * (self._said - now)).sum(-1).mean()
        return Weighed(score, float(departure))

    @torch.inference_mode()
    def _log_probabilities(self) -> Tensor:
        """Of every token at every place of the texts, shape (texts, places, tokens)."""
        return torch.cat([self._model(text[None]).logits.float().log_softmax(-1) for text in self._texts])


def _fast() -> torch.autocast:
    """As the server asks: projections, outside of it, stay in float32."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=FAST_BFLOAT16)


def _lora_layers(adapted: nn.Module) -> dict[str, LoraLayer]:
    """A PEFT model's changed modules, by their names in the checkpoint."""
    return {
        name.removeprefix("base_model.model."): layer
        for name, layer in adapted.named_modules()
        if isinstance(layer, LoraLayer)
    }


def _a(layer: LoraLayer) -> Tensor:
    return layer.lora_A["default"].weight.data
