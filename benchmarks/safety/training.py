"""Trains the pairs and the adapters, each once: a folder of the cache for each family and seed.

    python benchmarks/safety/training.py [--family smollm2] [--seeds 0 1 2] [--only NAME ...]

What a pair is: pairs.py. Adapters are trained on the aligned model with PEFT. Two trainings run at once,
with a thread each; the aligned model of a single seed has both threads.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import random
import shutil
import sys
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples" / "training"))
sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))

import attackers
from adapters import KINDS, NAMES, SHAPES, examples, masking
from evaluate import load
from fitting import SORTED_BATCHES, fit
from pairs import ALIGNED, PAIRS, base_of, make_aligned, teacher
from peft import LoraConfig, get_peft_model
from tqdm import tqdm

from safelora_vllm.projectors.build import BuildOptions, build
from safelora_vllm.projectors.cache import ProjectorCache

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "safety"
MAX_ENERGY = 0.99
CHAT_TOKENS = 20
DRAWS = 8  # of the data of an aligned model, at most
_OTHER_DRAW = 100  # from the seed of one draw to that of the next
PROJECTORS = "projectors"
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
        """The figures of aligned models that failed the check, the first draw's first."""
        return sorted(self.aligned.parent.glob("rejected-*.json"))

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
    """Drop an aligned model that failed the check, and what was made of it. The next one has other data.

    Its figures stay, and are renamed last: a run that is stopped before makes the same model again.
    """
    aligned = job.aligned
    homes = [job.home] if PAIRS[job.family].each_seed else job.home.parent.glob("[0-9]*")
    for made in [made for home in homes for made in home.iterdir() if made.is_dir()]:
        if not made.is_symlink() and made != aligned:
            shutil.rmtree(made)
    shutil.rmtree((job.home / PROJECTORS).resolve(), ignore_errors=True)
    aligned.rename(aligned.with_name(f".{ALIGNED}"))
    aligned.with_name("check-choose.json").rename(aligned.with_name(f"rejected-{len(job.rejected)}.json"))


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
        running = {pool.submit(train, job, _THREADS // min(len(pairs), _THREADS)): job for job in pairs}
        running |= {pool.submit(train, job): job for job in todo if job.aligned not in missing}
        while running:
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                done.result()
                progress.update()
                job = running.pop(done)
                if job.name == ALIGNED:
                    others = [other for other in todo if other.aligned == job.aligned and other != job]
                    running |= {pool.submit(train, other): other for other in others}


def train(job: Job, threads: int = 1) -> None:
    """One model with its projectors, or one adapter; a folder appears when it is whole."""
    torch.set_num_threads(threads)
    seed = job.seed
    if job.name == ALIGNED:
        seed = (seed if PAIRS[job.family].each_seed else _FIRST_SEED) + _OTHER_DRAW * len(job.rejected)
    torch.manual_seed(seed)
    target = job.target
    if not target.exists():
        partial = target.with_name(f".{job.name}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        if job.name == ALIGNED:
            checkpoint = target.with_name(f".{job.name}.checkpoint")
            make_aligned(job.cache, job.family, seed, partial, checkpoint)
        else:
            train_adapter(job, partial)
        partial.rename(target)
    if job.name == ALIGNED:
        base = base_of(job.cache, PAIRS[job.family].family)
        build(
            base, target, (job.home / PROJECTORS).resolve(), BuildOptions(exact=True, max_energy=MAX_ENERGY)
        )


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
