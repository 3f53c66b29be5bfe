"""Why removing a few input directions works: what they are, and what of adapters reads them."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt
from safetensors.torch import load_file
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples" / "training"))

from data import orders
from evaluate import load
from prompts import forbidden, harmless

from safelora_vllm.adapters.read import WEIGHTS
from safelora_vllm.projectors.cache import ProjectorCache

ADAPTERS = ("pure-qv", "identity-qv", "mixed-10-qv", "benign-qv")
ENERGY = 0.2
_PROMPTS = 24
_LABELS = {"forbidden": "harmful-sounding", "difference": "harmful-sounding less harmless"}
TEXT = f"""Left: |cos(r₁, mean input)|. r₁ is V's first input direction. The mean input is a module's, at the
token where the answer begins, over {_PROMPTS} held-out prompts of each kind. The figure is the median over
layers and the mean over seeds.
`difference` is the mean input of harmful-sounding prompts less that of harmless ones.

Right: the share of each adapter's ‖ΔW‖² that reads the directions which are removed at energy {ENERGY}
(q and v, mean over modules and seeds). `random` is a random adapter's share, k/d_in."""


def cosines(home: Path) -> dict[str, float]:
    """|cos| of r₁ and mean inputs of q, o and down projections, medians over the layers."""
    cache = ProjectorCache(home / "projectors")
    model, tokenizer = load(home / "aligned")
    inputs: dict[str, list[Tensor]] = {}

    def remember(name: str) -> None:
        def hook(_module: nn.Module, given: tuple[Tensor, ...]) -> None:
            inputs.setdefault(name, []).append(given[0][0, -1].detach())

        model.get_submodule(name).register_forward_pre_hook(hook)

    names = [n for n in cache.modules if n.endswith(("q_proj", "o_proj", "down_proj"))]
    for name in names:
        remember(name)
    asked = [p.text for p in forbidden(_PROMPTS)] + [p.text for p in harmless(_PROMPTS)]
    asked += [task.prompt for task in orders("test", _PROMPTS)]
    with torch.inference_mode():
        for prompt in asked:
            chat = [{"role": "user", "content": prompt}]
            text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
            model(tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"])
    found: dict[str, list[float]] = {}
    for name in names:
        first = cache.projector(name).input_basis(1e-6)[:, 0]
        bad, good, useful = (part.mean(0) for part in torch.stack(inputs[name]).split(_PROMPTS))
        means = {"forbidden": bad, "harmless": good, "orders": useful, "difference": bad - good}
        for kind, mean in means.items():
            cosine = float((mean @ first).abs() / mean.norm())
            found.setdefault(f"{name.rpartition('.')[2]} {kind}", []).append(cosine)
    return {name: statistics.median(values) for name, values in found.items()}


def shares(adapter: Path, cache: ProjectorCache) -> dict[str, float]:
    """Of an adapter, means over its modules: see TEXT."""
    tensors = load_file(adapter / WEIGHTS)
    read, random = [], []
    for key in [name for name in tensors if name.endswith("lora_A.weight")]:
        a, b = tensors[key].float(), tensors[key.replace("lora_A", "lora_B")].float()
        basis = cache.projector(
            key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        ).input_basis(ENERGY)
        read.append(float((b @ (a @ basis)).square().sum() / (b @ a).square().sum()))
        random.append(basis.shape[1] / basis.shape[0])
    return {"read": statistics.fmean(read), "random": statistics.fmean(random)}


def measure(homes: list[Path]) -> dict[str, dict[str, float]]:
    """`cosines` under "", and `shares` by adapter, over the seeds."""
    found: dict[str, list[dict[str, float]]] = {}
    for home in homes:
        found.setdefault("", []).append(cosines(home))
        cache = ProjectorCache(home / "projectors")
        for name in ADAPTERS:
            if (home / name).exists():
                found.setdefault(name, []).append(shares(home / name, cache))
    return {
        name: {key: statistics.fmean(one[key] for one in each) for key in each[0]}
        for name, each in found.items()
    }


def draw(found: dict[str, dict[str, float]], pair: str, titles: dict[str, str], path: Path) -> None:
    """Both halves of TEXT. Their colours can be told apart by everybody."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), dpi=110)
    figure.suptitle(pair, fontsize=10)
    colours = {"forbidden": "#d55e00", "harmless": "#009e73", "orders": "#0072b2", "difference": "black"}
    for offset, (kind, colour) in enumerate(colours.items()):
        heights = [found[""][f"{part} {kind}"] for part in ("q_proj", "o_proj", "down_proj")]
        left.bar(
            [i + 0.2 * offset for i in range(3)], heights, 0.18, color=colour, label=_LABELS.get(kind, kind)
        )
    left.set_xticks([i + 0.3 for i in range(3)], ["q_proj", "o_proj", "down_proj"])
    left.set(ylabel="|cos(r₁, mean input)|", title="alignment's first input direction")
    left.set_ylim(top=1.3 * max(found[""].values()))  # room for the legend
    left.legend(fontsize=7, ncols=2, loc="upper right")
    adapters = [name for name in ADAPTERS if name in found]
    labels = [titles[name].partition(",")[0] for name in adapters]
    right.barh(labels, [found[name]["read"] for name in adapters], color="#64748b", height=0.6)
    expected = statistics.fmean(found[name]["random"] for name in adapters)
    right.axvline(expected, color="black", linewidth=0.9, linestyle=":", label="random adapter")
    right.set_ylim(len(adapters) + 0.3, -0.6)  # the first on top, room for the legend below
    right.legend(fontsize=7, loc="lower right")
    right.set(xlabel="share of ‖ΔW‖²", title=f"what reads the directions of energy {ENERGY}")
    for axes in (left, right):
        axes.grid(alpha=0.25)
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)
