"""The documentation's tables of what was measured on a GPU. See `tables`."""

from __future__ import annotations

from typing import Any

import tables

_ON_DEVICE = {
    "ms": "ms",
    "kernels": "kernels",
    "copies": "copies",
    "waits": "waits of the host",
    "transient_mib": "memory while it runs, MiB",
}


def gpu_serving() -> str:
    """Streams of a real server while adapters are loaded, and the seconds of a load."""
    found = tables.load("gpu_serving")
    plain, guarded, ratios = found["unguarded"], found["guarded"], found["ratios"]
    phases = {
        "quiet": "nothing is loaded",
        "loading new content": "new adapters",
        "loading known content": "known adapters",
    }
    measures = {"p50_ms": "p50", "p99_ms": "p99", "max_ms": "longest"}
    rows = [
        [
            title,
            f"ms between two tokens, {measure}",
            *(tables.number(of[phase][key], 1) for of in (plain, guarded)),
            tables.number(ratios[f"{phase}, {key}"], 2),
        ]
        for phase, title in phases.items()
        for key, measure in measures.items()
    ]
    for key, phase in (("load_s", "loading new content"), ("known_load_s", "loading known content")):
        figures = [tables.number(of[key], 2) for of in (plain, guarded)]
        rows.append([phases[phase], "s of a load, median", *figures, tables.number(ratios[key], 2)])
    return tables.markdown(["meanwhile", "measure", "vLLM alone", "guarded", "guarded / vLLM"], rows, texts=2)


def gpu_judging() -> str:
    """Judging and projecting one adapter on a device."""
    found = tables.load("gpu_check")["projecting"]
    titles = {
        "input-removal, 32 layers, r 16": "default, Llama 2 7B, r = 16",
        "the same, one module at a time": "the same, one module at a time",
        "the same, on one thread of the CPU": "the same, on one thread of the CPU",
        "csulora, 32 layers, r 16": "`csulora` at energy 0.2, Llama 2 7B, r = 16",
        "safe-lora, threshold, 8 layers, r 16": "`safe-lora`, 8 of the layers, r = 16",
        "input-removal, threshold, 8 layers, r 16": "`--select threshold`, 8 of the layers, r = 16",
        "Llama-3-8B, input-removal, r 16": "default, Llama 3 8B, r = 16",
        "Llama-3-70B, input-removal, r 16": "default, Llama 3 70B, r = 16",
    }
    rows = [[title, *_on_device(found[name], "held_mib")] for name, title in titles.items()]
    ranks = [
        [f"default, Llama 2 7B, r = {rank}", *_on_device(of, "held_mib")]
        for rank, of in found["ranks"].items()
    ]
    return tables.markdown(
        ["policy, shapes, rank", *_ON_DEVICE.values(), "projectors, MiB"], [*rows[:3], *ranks, *rows[3:]]
    )


def gpu_groups() -> str:
    """The same adapter by the size of the groups that are judged together."""
    found = tables.load("gpu_check")["projecting"]["group sizes"]
    rows = [[size, *_on_device(of)] for size, of in found.items()]
    return tables.markdown(["A and B of a group, at most", *_ON_DEVICE.values()], rows)


def _on_device(row: dict[str, Any], *more: str) -> list[str]:
    return [tables.number(row[key]) if key in row else "" for key in (*_ON_DEVICE, *more)]


def gpu_agreement() -> str:
    """How far a device's answers are from the CPU's, and what is left of removed inputs."""
    found = tables.load("gpu_check")["agreement"]
    titles = {
        "similarity": "similarity, CPU against GPU",
        "norm": "norm of a module, relative",
        "delta": "served delta, relative to the uploaded one",
        "coherence": "coherence of the ranks",
    }
    rows = [[title, f"{found['worst'][key]:.1e}"] for key, title in titles.items()]
    left = "share of the removed inputs that is left"
    rows += [
        [left, f"{found['removed']:.1e}"],
        [f"{left}, where the process allows TF32", f"{found['removed where the process allows TF32']:.1e}"],
        [f"{left}, if the gate used TF32", f"{found['removed with TF32']:.1e}"],
    ]
    return tables.markdown(["what", "largest"], rows)


def gpu_memory() -> str:
    """What the gate takes of a card, over its life."""
    found = tables.load("gpu_check")["gate_memory"]
    titles = {
        "started": "started",
        "after_1": "after one adapter, r = 16",
        "after_10": "after ten",
        "after_rank_256": "after one of r = 256",
        "restarted": "killed, and started again",
        "restarted_after_1": "then after one adapter, r = 16",
    }
    return tables.markdown(
        ["gate", "MiB of the card"],
        [[title, tables.number(found[f"{key}_mib"])] for key, title in titles.items()],
    )


def gpu_short() -> str:
    """Answers of the gate when others have taken almost all memory of the card."""
    found = tables.load("gpu_check")["gate_memory"]
    left = sorted({int(key.split()[0]) for key in found if "MiB left" in key}, reverse=True)
    rows = [
        [tables.number(mib), *(found[f"{mib} MiB left, {size}"] for size in ("small", "large"))]
        for mib in left
    ]
    return tables.markdown(
        ["MiB left on the card, at least", "adapter of r = 16", "adapter of r = 256"], rows
    )


def gpu_stages() -> str:
    """Milliseconds of one adapter in the gate, with its stages."""
    found = tables.load("gpu_check")["gate_memory"]
    rows = [
        [f"stage `{name}`, mean", tables.number(found["stages_ms"][name])]
        for name in ("read", "vet", "project", "publish", "keep")
    ]
    whole = {"start of the gate": "start_s", "first adapter": "first_s", "later adapters, median": "median_s"}
    return tables.markdown(
        ["what", "ms"], [*([title, tables.number(1e3 * found[key])] for title, key in whole.items()), *rows]
    )


def gpu_decoding() -> str:
    """Steps like those of decoding, beside a gate."""
    found = tables.load("gpu_check")["decoding"]
    rows = [["no gate", found["quiet"]]]
    for where in ("gate on the device", "gate on the CPU"):
        title = where.replace("device", "GPU")
        rows += [[f"{title}, idle", found[where]["idle"]], [f"{title}, at work", found[where]["busy"]]]
    rows.append(["no gate, again", found["quiet_again"]])
    lines = [
        [title, *(tables.number(of[key], 2) for key in ("p50_ms", "p99_ms", "max_ms"))] for title, of in rows
    ]
    return tables.markdown(["beside the steps", "ms of a step, p50", "p99", "longest"], lines)


def gpu_building() -> str:
    """Projectors of one module."""
    rows = [
        [
            name.replace("x", " × "),
            *(
                tables.number(of[f"energy_{energy}_{what}"], 2 * (what == "s"))
                for energy in (0.2, 0.95)
                for what in "sk"
            ),
            tables.number(of["peak_mib"]),
        ]
        for name, of in tables.load("gpu_check")["building"].items()
        if name != "warm-up"
    ]
    sides = [f"{what}, energy {energy}" for energy in (0.2, 0.95) for what in ("s", "directions")]
    return tables.markdown(["d_out × d_in", *sides, "most memory, MiB"], rows)


TABLES = (
    gpu_serving,
    gpu_judging,
    gpu_groups,
    gpu_agreement,
    gpu_memory,
    gpu_short,
    gpu_stages,
    gpu_decoding,
    gpu_building,
)
