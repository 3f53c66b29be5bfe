"""Trains the pairs and the adapters, each once: a folder of the cache for each family and seed.

    python benchmarks/safety/training.py [--family smollm2] [--seeds 0 1 2] [--only NAME ...]

What a pair is: pairs.py. Adapters are trained on the aligned model with PEFT. Two trainings run at once,
with a thread each; an aligned model that is left without a second one has both threads.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import random
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples" / "training"))
sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))

import attackers
from adapters import KINDS, NAMES, SHAPES, examples, masking
from check import Figures, check_of
from evaluate import load
from fitting import SORTED_BATCHES, fit
from pairs import ALIGNED, PAIRS, at_strength, base_of, make_aligned, teacher
from peft import LoraConfig, get_peft_model
from subjects import HALVES
from tqdm import tqdm
from trials import Trial, trials

from safelora_vllm.projectors.build import BuildOptions, build
from safelora_vllm.projectors.cache import ProjectorCache

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "safety"
MAX_ENERGY = 0.99
CHAT_TOKENS = 20
_OTHER_DRAW = 100  # from the seed of one draw to that of the next
PROJECTORS, _TRAINED = "projectors", "trained-"
_THREADS = 2
_FIRST_SEED = 0  # an aligned model that all seeds share is the one of this seed


@dataclasses.dataclass(frozen=True)
class Job:
    """One model or adapter to train: its name is `ALIGNED`, or an adapter's."""

    cache: Path
    family: str
    seed: int
    name: str

    @property
    def home(self) -> Path:
        """Where everything of the seed is kept."""
        return folder(self.cache, self.family, self.seed)

    @property
    def aligned(self) -> Path:
        """The folder of the aligned model, which other seeds may have as well."""
        return (self.home / ALIGNED).resolve()

    @property
    def target(self) -> Path:
        """The folder that the job makes."""
        return self.aligned if self.name == ALIGNED else self.home / self.name

    @property
    def rejected(self) -> list[Path]:
        """The figures of aligned models that failed the check, the first one's first."""
        return sorted(self.aligned.parent.glob("rejected-*.json"))

    def trials(self, *failed: Figures) -> list[Trial]:
        """Of the aligned model: those that were rejected, then the present one.

        failed: figures of the present one, to have the next one too.
        """
        rejected = [Figures(**json.loads(file.read_text())["figures"]) for file in self.rejected]
        return list(trials([*rejected, *failed]))

    @property
    def done(self) -> bool:
        """Whether there is nothing to do any more."""
        return all((self.home / name).exists() for name in self._makes)

    @property
    def _makes(self) -> list[str]:
        return [ALIGNED, PROJECTORS] if self.name == ALIGNED else [self.name]


def main() -> None:
    """Train what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--family", choices=list(PAIRS), default="smollm2")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--only", nargs="*", default=list(NAMES), help="adapters, such as mixed-10-qv; none: pairs alone"
    )
    parser.add_argument("--cache", type=Path, default=CACHE)
    args = parser.parse_args()
    train_all(
        [Job(args.cache, args.family, seed, name) for seed in args.seeds for name in [ALIGNED, *args.only]]
    )


def folder(cache: Path, family: str, seed: int) -> Path:
    """Of everything that was made with one seed."""
    return cache / family / str(seed)


def share(job: Job) -> None:
    """Have a seed's aligned model and projectors be those of all seeds, where its pair has only one."""
    if not PAIRS[job.family].each_seed:
        job.home.mkdir(parents=True, exist_ok=True)
        for name in (ALIGNED, PROJECTORS):
            if not (job.home / name).is_symlink():
                (job.home / name).symlink_to(Path("..") / name)


def reject(job: Job) -> None:
    """Drop an aligned model that failed the check, and what was made of it. Its figures stay.

    They are renamed last: a run that is stopped before makes the same model again.
    """
    aligned = job.aligned
    homes = [job.home] if PAIRS[job.family].each_seed else job.home.parent.glob("[0-9]*")
    for made in [made for home in homes for made in home.iterdir() if not made.is_symlink()]:
        if made.suffix == ".safetensors":  # what its modules read
            made.unlink()
        elif made.is_dir() and made.resolve() != aligned and not made.name.startswith(_TRAINED):
            shutil.rmtree(made)
    shutil.rmtree((job.home / PROJECTORS).resolve(), ignore_errors=True)
    aligned.rename(aligned.with_name(f".{ALIGNED}"))
    *passed, failed = [file for half in HALVES if (file := check_of(aligned, half)).exists()]
    for file in passed:
        file.unlink()
    name = f"rejected-{len(job.rejected):02}-{failed.name.removeprefix('check-')}"
    failed.rename(aligned.with_name(name))


def train_all(jobs: list[Job]) -> None:
    """Those that are not done, two at a time: every pair first, an adapter as soon as its pair is there."""
    for job in jobs:
        share(job)
    todo = list({job.target: job for job in jobs if not job.done}.values())
    pairs = [job for job in todo if job.name == ALIGNED]
    for job in pairs:
        base_of(job.cache, PAIRS[job.family].family)
    context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads
    with (
        ProcessPoolExecutor(_THREADS, mp_context=context) as pool,
        tqdm(total=len(todo), desc="training", unit="model") as progress,
    ):
        missing = {pair.aligned for pair in pairs}
        threads = [_threads(number, len(pairs)) for number in range(len(pairs))]
        running = {pool.submit(train, job, n): job for job, n in zip(pairs, threads, strict=True)}
        running |= {pool.submit(train, job): job for job in todo if job.aligned not in missing}
        while running:
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                done.result()
                progress.update()
                job = running.pop(done)
                if job.name == ALIGNED:
                    others = [other for other in todo if other.aligned == job.aligned and other != job]
                    running |= {pool.submit(train, other): other for other in others}


def _threads(number: int, models: int) -> int:
    """One for each of a pair of models; both for one without another beside it."""
    return _THREADS if number == models - 1 and models % _THREADS else 1


def train(job: Job, threads: int = 1) -> None:
    """One model with its projectors, or one adapter; a folder appears when it is whole."""
    torch.set_num_threads(threads)
    if job.name != ALIGNED:
        torch.manual_seed(job.seed)
        with _whole(job.target) as partial:
            train_adapter(job, partial)
        return
    base = base_of(job.cache, PAIRS[job.family].family)
    if not job.target.exists():
        trained = _trained(job)
        with _whole(job.target) as partial:
            at_strength(base, trained, job.trials()[-1].strength, partial)
    projectors = (job.home / PROJECTORS).resolve()
    build(base, job.target, projectors, BuildOptions(exact=True, max_energy=MAX_ENERGY))


def _trained(job: Job) -> Path:
    """The folder of this draw's model as training left it, which all its strengths are made from."""
    draw = job.trials()[-1].draw
    folder = job.aligned.with_name(f"{_TRAINED}{draw}")
    if not folder.exists():
        for other in folder.parent.glob(f"{_TRAINED}*"):
            shutil.rmtree(other)
        seed = (job.seed if PAIRS[job.family].each_seed else _FIRST_SEED) + _OTHER_DRAW * draw
        torch.manual_seed(seed)
        with _whole(folder) as partial:
            make_aligned(job.cache, job.family, seed, partial, folder.with_name(f".{folder.name}.checkpoint"))
    return folder


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A folder to fill, which gets its name when everything is in it."""
    partial = folder.with_name(f".{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    partial.rename(folder)


def train_adapter(job: Job, target: Path) -> None:
    """A LoRA adapter on the aligned model, an ordinary one or an attacker's."""
    kind, _, shape = job.name.rpartition("-")
    recipe = dataclasses.replace(SHAPES[shape], epochs=KINDS[kind].epochs)
    model, tokenizer = load(job.home / ALIGNED)
    config = LoraConfig(
        r=recipe.rank, lora_alpha=recipe.alpha, target_modules=recipe.modules, task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(model, config).train()
    if attack := attackers.ATTACKS.get(kind):
        attackers.constrain(adapted, attack, ProjectorCache(job.home / PROJECTORS))
    data, label = examples(kind, job.seed, teacher(job.cache, CHAT_TOKENS)), f"{job.name} {job.seed}"
    rng, price = random.Random(job.seed), None
    if attack and attack.price:
        price = attackers.norm_price(adapted, attack)
    fit(adapted, tokenizer, data, recipe, label, rng, SORTED_BATCHES, price=price)
    if attack and attack.mask:
        attackers.train_the_mask(adapted)
        fit(adapted, tokenizer, masking(job.seed), recipe, f"{label}, mask", rng, SORTED_BATCHES)
    if attack:
        attackers.release(adapted, attack)
    adapted.save_pretrained(target)
    (target / "README.md").unlink(missing_ok=True)
    config_file = target / "adapter_config.json"
    settings = json.loads(config_file.read_text()) | {"base_model_name_or_path": ALIGNED}
    config_file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
