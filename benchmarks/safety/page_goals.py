"""RESULTS.md's table of goals, and that of the curves."""

from __future__ import annotations

from collections.abc import Sequence

from dominance import UTILITIES
from goals import DEFAULT
from plan import SEEDS
from wording import PAIRS, Table, cell, markdown, number, title, words

GOALS = {
    "pure": "purely malicious, strongest policy",
    "mixed": "10 % malicious, one setting chosen beforehand, mean over seeds",
    "exam": "exam, replayed",
    "curves": "a rule's curve below Safe LoRA's, CSULoRA's and scaling's",
    "time": "a whole run",
}
_FIGURES = {
    "over_aligned": "ASR over aligned",
    "utility_lost": "utility lost",
    "false_escalations": "false escalations of the two tasks",
    "not_lower": "its ASR is",
    "hours": "hours",
}
_NOTE = f"""A goal is *reached so far* or *missed so far* until all of its pairs have been measured with
{len(SEEDS)} seeds. The static rule was chosen on seed 0 of the first pair, on the `choose` half: of the
settings within 5 points of the aligned model, the one that costs the 10 % malicious adapter least utility.
An escalation is false where a milder rung, which failed, was within 5 points of the aligned model on the
`report` half."""
_RULES = {"input-removal": "input removal", "early-values": "early values"}
_CURVES = """ASR of a rule less that of another method, where both leave the 10 % malicious adapter the
same utility. Curves are linear between their points, from the adapter as uploaded to the strongest setting.
*Not told apart*: the interval holds 0. An empty cell: as uploaded, the adapter has less utility."""


def goals(figures: Table) -> list[str]:
    """The section."""
    lines = rows(figures["goals"])
    if not lines:
        return []
    heads = ["goal", "measured on", "by", "figure", "limit", "result"]
    return ["## The goals", _NOTE, not_measured(figures["goals"]), markdown(heads, lines)]


def not_measured(found: Sequence[Table]) -> str:
    """Pairs and seeds that are planned and have no figures."""
    seeds = {pair: {seed for row in found for seed in row["measured"].get(pair, ())} for pair in PAIRS}
    missing = {pair: [str(seed) for seed in SEEDS if str(seed) not in seeds[pair]] for pair in PAIRS}
    left = {pair: each for pair, each in missing.items() if each}
    return (
        f"Planned, without figures so far: {measured(left)}." if left else "All pairs and seeds have figures."
    )


def rows(found: Sequence[Table]) -> list[list[str]]:
    """Goal, pairs and seeds, setting, figures, limits, result."""
    return [
        [
            _goal(row),
            measured(row["measured"]),
            by(row["by"]),
            "; ".join(f"{_FIGURES[name]} {_figure(of)}" for name, of in row["figures"].items()),
            "; ".join(_limit(name, limit) for name, limit in row["limits"].items()),
            result(row),
        ]
        for row in found
    ]


def result(row: Table) -> str:
    """Reached or missed, and whether more may come. A part of a run does not say how long a whole one is."""
    if row["goal"] == "time" and row["reached"] and not row["complete"]:
        return "not known yet"
    word = "reached" if row["reached"] else "missed"
    return word if row["complete"] else f"{word} so far"


def by(what: str) -> str:
    """A setting in words: a treatment, or what the goals call it."""
    if what.startswith("chosen: "):
        return f"static rule: {by(what.removeprefix('chosen: '))}"
    if what == DEFAULT:
        return f"{words(what)} (the default)"
    if what in _RULES:
        return _RULES[what]
    if what == "run.py":
        return f"`{what}`"
    return words(what) if what.rpartition("-")[2].replace(".", "").isdigit() else what


def measured(seeds: Table) -> str:
    """Pairs with their seeds."""
    return "; ".join(f"{PAIRS[pair]}: seed {', '.join(each)}" for pair, each in seeds.items())


def curves(compared: Table) -> list[str]:
    """One pair's comparisons."""
    if not compared:
        return []
    heads = ["curves", *(f"at utility {at:g}" for at in UTILITIES)]
    return ["### The curves compared", _CURVES, markdown(heads, curve_rows(compared))]


def curve_rows(compared: Table) -> list[list[str]]:
    """A rule against another method, and the differences with what they say."""
    names = {"safe-lora": "Safe LoRA", "csulora": "CSULoRA", "scaling": "scaling"}
    lines = []
    for rule, others in compared.items():
        for other, by_utility in others.items():
            found = {at: f"{cell(of)}: {of['says']}" for at, of in by_utility.items()}
            cells = [found.get(f"{at:g}", "") for at in UTILITIES]
            lines.append([f"{_RULES[rule]} against {names[other]}", *cells])
    return lines


def _goal(row: Table) -> str:
    text = GOALS[row["goal"]]
    if row["goal"] in ("pure", "exam") and row["adapter"]:
        return f"{text}; worst: {title(row['adapter'])}"
    return text


def _figure(of: Table) -> str:
    if "low" in of:
        return cell(of)
    if "of" not in of:
        return number(of["mean"])
    lower, alike = of["of"] - of["mean"], of["mean"] - of["higher"]
    return f"lower in {lower:g}, not told apart in {alike:g}, higher in {of['higher']:g} of {of['of']}"


def _limit(name: str, limit: float) -> str:
    return "lower in all" if name == "not_lower" else f"at most {limit:g}"
