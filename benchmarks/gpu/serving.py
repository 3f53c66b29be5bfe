"""Hot loads into a real vLLM while streams run: plain vLLM and the guarded server, one after the other.

    python benchmarks/gpu/serving.py [--adapters N] [--clients N] [--seconds S] [--quick]

Needs vLLM and what it runs on; no model and no network. A model of Llama-3-8B's shapes, a projector cache
and adapters for all its linear layers (r = 16) are drawn. Some clients stream without pause. In a quiet phase
nothing else happens; then one new adapter after another is loaded by its path, then the same content again
under other names. Measured are the times between two tokens of a stream, and the seconds of each load.
``--quick``: tiny shapes, to try the code on a CPU.
"""

from __future__ import annotations

import argparse
import http.client
import json
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
# A script in a folder: the modules above it are found only after this.
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parents[2])]

import recording  # noqa: E402
import servers  # noqa: E402
import torch  # noqa: E402
from gpu.common import random_weights, say, write_adapter  # noqa: E402
from random_projectors import LLAMA_3_8B, Shapes, write_cache  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from safelora_vllm.projectors.cache import ProjectorCache  # noqa: E402

TINY: Shapes = {
    "self_attn.q_proj": (128, 128), "self_attn.k_proj": (64, 128), "self_attn.v_proj": (64, 128),
    "self_attn.o_proj": (128, 128), "mlp.gate_proj": (192, 128), "mlp.up_proj": (192, 128),
    "mlp.down_proj": (128, 192),
}  # fmt: skip
_TOKENS = 256  # of one stream; then it begins anew
_PAUSE_SECONDS = 0.3  # between two loads


def main() -> None:
    """Measure both servers, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--adapters", type=int, default=10)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=15.0, help="of the quiet phase")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=recording.RESULTS, help="folder for the figures")
    parser.add_argument("--stream", nargs=3, metavar=("PORT", "CLIENTS", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stream:
        stream(int(args.stream[0]), int(args.stream[1]), Path(args.stream[2]))
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes, layers = (TINY, 2) if args.quick else (LLAMA_3_8B, 32)
    figures: dict[str, Any] = {
        "card": torch.cuda.get_device_name() if device == "cuda" else "",
        "layers": layers, "adapters": args.adapters, "clients": args.clients,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        write_model(scratch / "model", shapes, layers, device)
        write_cache(scratch / "projectors", shapes, layers, operators=False, device=device)
        cache = ProjectorCache(scratch / "projectors")
        adapters = [
            write_adapter(scratch / f"adapter-{seed}", random_weights(cache, 16, torch.device(device), seed))
            for seed in range(args.adapters + 1)
        ]
        figures["adapter_bytes"] = sum(file.stat().st_size for file in adapters[0].iterdir())
        if device == "cuda":
            torch.cuda.empty_cache()
        options = ["--gpu-memory-utilization", "0.6"] if device == "cuda" else []
        options += ["--max-loras", "4", "--dtype", "bfloat16"]
        for kind in ("unguarded", "guarded"):
            (scratch / kind).mkdir()
            with servers.running(
                kind, scratch / "model", scratch / "projectors", scratch / kind, options,
                ["--trust-served-model"],
            ) as server:  # fmt: skip
                figures[kind] = measure(
                    server, adapters, args.clients, args.seconds, scratch / f"{kind}.json"
                )
            say({kind: figures[kind]})
            figures["ratios"] = ratios(figures)
            path = recording.write("gpu_serving", "gpu/serving.py", 1, figures, args.out)
    say({"guarded / unguarded": figures["ratios"]})
    print(f"written to {path}")


def measure(
    server: servers.Server, adapters: list[Path], clients: int, seconds: float, file: Path
) -> dict[str, Any]:
    """Both phases of one server."""
    server.load("warm-up", adapters[0])
    command = [sys.executable, str(HERE), "--stream", str(server.port), str(clients), str(file)]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as streams:
        time.sleep(seconds / 3)
        began = time.monotonic()
        time.sleep(seconds)
        quiet = began, time.monotonic()
        loads = [load(server, f"adapter-{number}", path) for number, path in enumerate(adapters[1:])]
        loading = quiet[1], time.monotonic()
        again = [load(server, f"again-{number}", path) for number, path in enumerate(adapters[1:])]
        known = loading[1], time.monotonic()
        assert streams.stdin is not None
        streams.stdin.close()
        streams.wait(60)
    gaps = json.loads(file.read_text())
    return {
        "quiet": summary(gaps, *quiet),
        "loading new content": summary(gaps, *loading),
        "loading known content": summary(gaps, *known),
        "load_s": round(recording.quantile(loads, 0.5), 3),
        "known_load_s": round(recording.quantile(again, 0.5), 3),
    }


def load(server: servers.Server, name: str, folder: Path) -> float:
    """Seconds of one load, and some time in which the streams go on."""
    seconds = server.load(name, folder)
    time.sleep(_PAUSE_SECONDS)
    return seconds


def summary(gaps: list[list[tuple[float, float]]], begin: float, end: float) -> dict[str, float]:
    """Milliseconds between two tokens in a phase."""
    found = [1e3 * gap for client in gaps for moment, gap in client if begin <= moment < end] or [0.0]
    shares = {"p50_ms": 0.5, "p99_ms": 0.99, "p999_ms": 0.999, "max_ms": 1.0}
    row = {key: round(recording.quantile(found, at), 2) for key, at in shares.items()}
    return {"tokens": len(found), **row}


def ratios(figures: dict[str, Any]) -> dict[str, float]:
    """Guarded over unguarded."""
    if "guarded" not in figures:
        return {}
    ours, plain = figures["guarded"], figures["unguarded"]
    found = {key: round(ours[key] / plain[key], 2) for key in ("load_s", "known_load_s")}
    for phase in ("quiet", "loading new content", "loading known content"):
        for key in plain[phase].keys() - {"tokens"}:
            found[f"{phase}, {key}"] = round(ours[phase][key] / max(plain[phase][key], 0.01), 2)
    return found


def stream(port: int, clients: int, file: Path) -> None:
    """Clients that stream until stdin ends; writes each token's moment and the time since the last one."""
    gaps: list[list[tuple[float, float]]] = [[] for _ in range(clients)]
    ended = threading.Event()

    def client(number: int) -> None:
        body = {
            "model": "aligned", "prompt": list(range(10 + number, 42 + number)), "max_tokens": _TOKENS,
            "stream": True, "ignore_eos": True, "temperature": 0,
        }  # fmt: skip
        while not ended.is_set():
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
            connection.request(
                "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
            )
            last = 0.0
            for line in connection.getresponse():
                if line.startswith(b"data: {"):
                    now = time.monotonic()
                    if last:
                        gaps[number].append((now, now - last))
                    last = now
            connection.close()

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    sys.stdin.read()
    ended.set()
    for thread in threads:
        thread.join()
    file.write_text(json.dumps(gaps))


def write_model(folder: Path, shapes: Shapes, layers: int, device: str) -> None:
    """A random Llama of these shapes, with heads of 128 (32 if tiny) and a tokenizer of bytes."""
    folder.mkdir()
    hidden, inner = shapes["mlp.down_proj"]
    head = 128 if hidden >= 1024 else 32
    vocabulary = write_tokenizer(folder)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": hidden // head, "num_key_value_heads": shapes["self_attn.k_proj"][0] // head,
        "head_dim": head, "vocab_size": vocabulary, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "torch_dtype": "bfloat16", "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    index: dict[str, str] = {}

    def put(file: str, drawn: Shapes, norms: list[str]) -> None:
        tensors = {
            name: (0.02 * torch.randn(*shape, device=device, dtype=torch.bfloat16)).cpu()
            for name, shape in drawn.items()
        }
        tensors |= {name: torch.ones(hidden, dtype=torch.bfloat16) for name in norms}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, file))

    def layer(number: int) -> None:
        prefix = f"model.layers.{number}"
        norms = [f"{prefix}.{name}.weight" for name in ("input_layernorm", "post_attention_layernorm")]
        drawn = {f"{prefix}.{part}.weight": shape for part, shape in shapes.items()}
        put(f"layer-{number:03}.safetensors", drawn, norms)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(layer, range(layers)))
    ends = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (vocabulary, hidden))
    put("ends.safetensors", ends, ["model.norm.weight"])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def write_tokenizer(folder: Path) -> int:
    """One token for each byte, and some more; returns how many."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    names += [f"<{number}>" for number in range(1024 - len(names))]
    made = Tokenizer(models.BPE(vocab={name: place for place, name in enumerate(names)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    return len(names)


if __name__ == "__main__":
    main()
