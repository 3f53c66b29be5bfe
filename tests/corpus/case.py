"""A hostile adapter, and short ways to say one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.corpus.target import SCALE, Deltas, Target, deltas, sound
from tests.tiny import Draft

# The attack table: what an uploader can try.
ROWS = {
    "no-projector": "delta in modules without a projector: embeddings, heads, experts, layer 9999",
    "features": "features beyond plain LoRA: DoRA, biases, saved modules, PiSSA-like inits",
    "config": "config that lies or has wrong types",
    "scale": "alpha, rsLoRA or patterns that scale the delta up",
    "pre-inversion": "made so that the projection undoes itself, or measures nothing",
    "dominant": "delta inside V's dominant directions",
    "tensors": "NaN, odd dtypes and shapes, aliased or missing tensors",
    "patterns": "regular expressions in patterns",
    "files": "pipes, links, truncated, huge or swapped files",
    "names": "adapter names that escape, hide or impersonate",
    "undetectable": "trigger backdoors, colluding adapters",
    "archives": "archives that escape, explode or say two things",
}
NAME, TAKEN = "name", "taken"  # not the gate's codes: the answer of the server's name rule

Make = Callable[[Target], Draft]
Spoil = Callable[[Draft], object]
Damage = Callable[[Path], object]


@dataclass(frozen=True)
class Hostile:
    """One attack, and what must become of it.

    row: its key in `ROWS`. write: makes the folder or archive in a path that is not there yet, and returns
    what is to be loaded. codes: the reasons that a refusal may have. means: the deltas that an accepted
    adapter stands for, before any projection; None where it must be refused. served_as: its name. later:
    what is done to the folder once it is served, before it is read again.
    """

    name: str
    row: str
    write: Callable[[Path, Target], Path]
    codes: frozenset[str] = frozenset()
    means: Callable[[Target], Deltas] | None = None
    served_as: str = "tenant"
    later: Damage | None = None

    @property
    def archive(self) -> bool:
        """Whether it comes as one file."""
        return self.row == "archives"


def spoiled(
    name: str, row: str, codes: str, spoil: Spoil, scale: Callable[[str], float] | None = None
) -> Hostile:
    """`made` of a sound adapter whose config or tensors were changed."""

    def make(target: Target) -> Draft:
        draft = sound(target)
        spoil(draft)
        return draft

    return made(name, row, codes, make, scale)


def neutralised(name: str, row: str, spoil: Spoil) -> Hostile:
    """A sound adapter that was changed in a way that must not matter."""
    return spoiled(name, row, "", spoil, lambda _: SCALE)


def made(name: str, row: str, codes: str, make: Make, scale: Callable[[str], float] | None = None) -> Hostile:
    """What ``make`` makes, refused for some of the ``codes`` or, with a ``scale``, accepted as specified.

    What is too large in one module may be so in all of them together.
    """
    expected = set(codes.split())
    if "relative_norm" in expected:
        expected.add("total_norm")

    def means(target: Target) -> Deltas:
        assert scale is not None
        return deltas(make(target), scale)

    return Hostile(
        name,
        row,
        lambda folder, target: make(target).write(folder),
        frozenset(expected),
        None if scale is None else means,
    )


def damaged(name: str, row: str, codes: str, damage: Damage) -> Hostile:
    """A sound adapter's folder whose files were changed, refused for one of the ``codes``."""

    def write(folder: Path, target: Target) -> Path:
        damage(sound(target).write(folder))
        return folder

    return Hostile(name, row, write, frozenset(codes.split()))


def config(**changes: object) -> Spoil:
    """Set keys of the config."""
    return lambda draft: draft.config.update(changes)
