"""Plant small faults and list those that no fast test sees: ``python -m tests.mutants [MODULE…]``.

mutmut plants them in a copy of the tree and runs, for each, the tests of ``modules.toml`` that call the
changed function. A run that was stopped goes on with the module it was at, unless a file has changed since.
Changed are functions and methods; not changed are constants, defaults of dataclasses, f-strings, properties
and functions with other decorators.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path
from typing import Any

from tqdm import tqdm

ROOT, HERE = Path(__file__).parents[2], Path(__file__).parent
COPY = ROOT / ".cache" / "mutants"
WANTED = 95.0  # percent, over all modules
_PACKAGE = "safelora_vllm"
_COPIED = (_PACKAGE, "tests", "docs", "pyproject.toml")
_COLUMNS = ("mutants", "killed", "timed out", "survived", "equivalent", "not run")
_OUTCOMES = {"killed": "killed", "timeout": "timed out", "not checked": "not run"}  # anything else: survived
# A mutant may take (seconds of its tests + 1) * timeout_multiplier. Its process is forked from one that ran
# the tests: torch is imported once. A fork server runs no test, so torch would be imported for each mutant.
# pytest escapes the ids of parameters once more at each collection in one process. mutmut would not find the
# tests again, and count each mutant as killed.
_OPTIONS = """
[tool.mutmut]
source_paths = ["{package}/"]
only_mutate = ["{package}/{module}"]
pytest_add_cli_args = [
  "-p", "no:cacheprovider",
  "-o", "disable_test_id_escaping_and_forfeit_all_rights_to_community_support=true",
]
pytest_add_cli_args_test_selection = {tests}
process_isolation = "fork"
timeout_multiplier = 15.0
use_git_change_detection = false
"""


@dataclass(frozen=True, order=True)
class Mutant:
    """A planted fault. ``line`` and ``becomes`` are the lines that it changes, without their indentation."""

    module: str
    number: int
    line: str
    becomes: str
    outcome: str
    note: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        """What stays the same when lines are added above."""
        return self.module, self.line, self.becomes


class ToolFailed(Exception):
    """mutmut did not run a module's mutants."""


def main() -> int:
    """Exit code 1 where too many survive, and where the run was not finished."""
    table = tomllib.loads((HERE / "modules.toml").read_text())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("modules", nargs="*", metavar="MODULE", help="such as policy.py (default: all)")
    parser.add_argument("--out", type=Path, help="write mutants.json and mutants.md into this folder")
    parser.add_argument("--processes", type=int, default=2, help="mutants at a time (default 2)")
    parser.add_argument("--minutes", type=float, default=60, help="stop after so many (default 60)")
    args = parser.parse_args()
    if unknown := set(args.modules) - set(table["tests"]):
        parser.error(f"{', '.join(sorted(unknown))}: not in {HERE / 'modules.toml'}")
    prepare()
    started, mutants = time.monotonic(), []
    deadline = started + 60 * args.minutes
    modules = args.modules or list(table["tests"])
    left, problems = [], []
    for module in tqdm(modules, unit="module"):
        try:
            if not run(module, table["tests"][module], args.processes, deadline):
                left.append(module)
        except ToolFailed as error:
            problems.append(str(error))
        mutants += collect(module)
    seconds, used = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    mutants, stale = judge(mutants)
    counts = {module: count(mutants, module) for module in modules} | {"all": count(mutants)}
    text = "\n".join(report(counts, mutants))
    print(text)
    if args.out:
        record = {
            "command": f"python -m tests.mutants --processes {args.processes} --minutes {args.minutes:g}",
            "cpus": os.cpu_count(),
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in ("mutmut", "pytest", "safelora-vllm")},
            },
            "seconds": round(seconds),
            "cpu_seconds": round(used.ru_utime + used.ru_stime),
            "modules": counts,
            "mutants": [asdict(mutant) for mutant in mutants if mutant.outcome != "killed"],
        }
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "mutants.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        (args.out / "mutants.md").write_text(text + "\n")
    problems += [*stale, *complaints(counts, table["complete"])]
    if left:
        problems.append(f"not finished: {', '.join(left)}; repeat the command, it goes on there")
    elif not problems:
        shutil.rmtree(COPY)
    for problem in problems:
        print(problem, file=sys.stderr)
    return int(bool(problems))


def prepare() -> None:
    """Copy the tree, unless the copy is there and nothing has changed since."""
    files = [file for name in _COPIED for file in _files(ROOT / name)]
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(ROOT)}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
    stamp = COPY / "digest"
    if stamp.is_file() and stamp.read_text() == digest.hexdigest():
        print("going on with the run that was stopped", file=sys.stderr)
        return
    shutil.rmtree(COPY, ignore_errors=True)
    for file in files:
        target = COPY / "tree" / file.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, target)
    stamp.write_text(digest.hexdigest())


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return sorted(file for file in path.rglob("*") if file.is_file() and "__pycache__" not in file.parts)


def run(module: str, tests: Sequence[str], processes: int, deadline: float) -> bool:
    """Let mutmut test a module's mutants, unless that was done. False: the deadline came before the end."""
    folder = _folder(module)
    codes = _codes(module)
    if codes and None not in codes.values():
        return True
    if time.monotonic() > deadline:
        return False
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "mutants").mkdir(parents=True)  # Python ignores a folder that is not there when it starts
    for name in (_PACKAGE, "tests"):
        (folder / name).symlink_to(COPY / "tree" / name)
    (folder / "mutants" / "docs").symlink_to(COPY / "tree" / "docs")  # some tests read examples there
    files = sorted(str(file.relative_to(ROOT)) for name in tests for file in (ROOT / "tests").glob(name))
    options = _OPTIONS.format(package=_PACKAGE, module=module, tests=files)
    (folder / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text() + options)
    # Given a pattern, mutmut first runs the tests that it recorded, by name and without a mutant.
    pattern = f"{_PACKAGE}.{module.removesuffix('.py').replace('/', '.')}.*"
    command = [Path(sys.executable).with_name("mutmut"), "run", "--max-children", str(processes), pattern]
    environment = os.environ | {"PYTHONPATH": str(folder / "mutants"), "PYTHONDONTWRITEBYTECODE": "1"}
    log = folder / "log"
    with log.open("w") as stream, tqdm(unit="mutant", desc=module, leave=False, disable=None) as bar:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=stream, stderr=stream, start_new_session=True
        )
        try:
            while process.poll() is None and time.monotonic() < deadline:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(1)
                codes = _codes(module).values()
                bar.total, bar.n = len(codes) or None, sum(code is not None for code in codes)
                bar.refresh()
        finally:
            stopped = process.poll() is None
            if stopped:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if stopped:
        return False
    if process.returncode:
        tail = log.read_text(errors="replace").replace("\r", "\n").splitlines()[-40:]
        print("\n".join(tail), file=sys.stderr)
        raise ToolFailed(
            f"mutmut ended with code {process.returncode} at {module}; its output ends as above and is in "
            f"{log}. Most often a test fails without a mutant, or no test calls the module: run its tests of "
            "tests/mutants/modules.toml"
        )
    return True


def _folder(module: str) -> Path:
    return COPY / module.removesuffix(".py").replace("/", "-")


def _codes(module: str) -> dict[str, int | None]:
    """Name of each mutant and mutmut's exit code, None where it was not run."""
    meta = _folder(module) / "mutants" / _PACKAGE / f"{module}.meta"
    with contextlib.suppress(
        FileNotFoundError, json.JSONDecodeError
    ):  # not written yet, or just being written
        codes: dict[str, int | None] = json.loads(meta.read_text())["exit_code_by_key"]
        return codes
    return {}


def collect(module: str) -> list[Mutant]:
    """Every mutant of a module with its outcome, and its place in the source unless it was killed."""
    from mutmut.stats import status_by_exit_code

    source = Path(_PACKAGE, module)
    lines = {
        (owner, node.name): node.lineno
        for owner, body in _bodies(ast.parse((ROOT / source).read_text()))
        for node in body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    found = []
    if not (codes := _codes(module)):
        return []
    with contextlib.chdir(_folder(module)):
        for name, code in codes.items():
            status = status_by_exit_code[code]
            outcome = _OUTCOMES.get(status, "survived")
            if outcome == "killed":
                found.append(Mutant(module, 0, "", "", outcome))
                continue
            number, line, becomes = _change(name, source, lines)
            note = status if outcome == "survived" != status else ""
            found.append(Mutant(module, number, line, becomes, outcome, note))
    return sorted(found)


def _bodies(module: ast.Module) -> Iterator[tuple[str | None, list[ast.stmt]]]:
    yield None, module.body
    for node in module.body:
        if isinstance(node, ast.ClassDef):
            yield node.name, node.body


def _change(name: str, source: Path, lines: dict[tuple[str | None, str], int]) -> tuple[int, str, str]:
    """Number of the first changed line, the changed lines, and what they become."""
    import libcst
    from mutmut.mutation.diff_apply import read_functions_from_index
    from mutmut.utils.format_utils import orig_function_and_class_names_from_key

    functions = read_functions_from_index(name, source)
    assert functions is not None, name
    old, new = (libcst.Module([function]).code.strip().split("\n") for function in functions)
    first = _alike(old, new)
    last = _alike(old[first:][::-1], new[first:][::-1])
    function, owner = orig_function_and_class_names_from_key(name)
    head = next(number for number, line in enumerate(old) if line.lstrip().startswith(("def ", "async def ")))
    changed, becomes = (" ".join(map(str.strip, text[first : len(text) - last])) for text in (old, new))
    return lines[owner, function] + first - head, changed, becomes


def _alike(one: list[str], other: list[str]) -> int:
    """How many lines both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def judge(mutants: list[Mutant]) -> tuple[list[Mutant], list[str]]:
    """The mutants, with the reviewed survivors as equivalent, and what is wrong in the list of these."""
    reviewed = {
        (entry["module"], entry["line"], entry["becomes"]): entry["reason"]
        for entry in tomllib.loads((HERE / "equivalent.toml").read_text())["equivalent"]
    }
    run = {mutant.module for mutant in mutants}
    alive = {mutant.key for mutant in mutants if mutant.outcome in ("survived", "not run")}
    stale = [
        f"tests/mutants/equivalent.toml: {module}: {line!r} that becomes {becomes!r} does not exist, or a "
        "test sees it; remove the entry"
        for module, line, becomes in reviewed
        if module in run and (module, line, becomes) not in alive
    ]
    return [
        replace(mutant, outcome="equivalent", note=reviewed[mutant.key])
        if mutant.outcome == "survived" and mutant.key in reviewed
        else mutant
        for mutant in mutants
    ], stale


def count(mutants: list[Mutant], module: str | None = None) -> dict[str, Any]:
    """Figures of one module, or of all."""
    outcomes = Counter(mutant.outcome for mutant in mutants if module in (None, mutant.module))
    rest = outcomes.total() - outcomes["equivalent"] - outcomes["not run"]
    share = 100 * (outcomes["killed"] + outcomes["timed out"]) / rest if rest else 0.0
    figures = {name: outcomes[name] for name in _COLUMNS} | {"mutants": outcomes.total()}
    return {**figures, "share killed": round(share, 2)}


def report(counts: dict[str, dict[str, Any]], mutants: list[Mutant]) -> Iterator[str]:
    """Lines of Markdown: the figures, then the survivors."""
    yield f"| module | {' | '.join(_COLUMNS)} | killed or timed out, of the rest |"
    yield f"| --- |{' --: |' * (len(_COLUMNS) + 1)}"
    for module, figures in counts.items():
        cells = " | ".join(f"{figures[column]:,}" for column in _COLUMNS)
        yield f"| {module} | {cells} | {figures['share killed']:.1f} % |"
    yield "\nThe rest are all mutants but the equivalent ones and those that were not run."
    for outcome in ("survived", "timed out"):
        listed = [mutant for mutant in mutants if mutant.outcome == outcome]
        yield f"\n## {outcome.capitalize()}: {len(listed)}\n"
        for mutant in listed:
            yield f"- {mutant.module}:{mutant.number}{f' ({mutant.note})' if mutant.note else ''}"
            yield f"  - `{mutant.line}`"
            yield f"  - `{mutant.becomes}`"


def complaints(counts: dict[str, dict[str, Any]], complete: list[str]) -> Iterator[str]:
    """Why the command fails, and what to do."""
    for module, wanted in {**dict.fromkeys(complete, 100.0), "all": WANTED}.items():
        if module in counts and counts[module]["survived"] and counts[module]["share killed"] < wanted:
            yield (
                f"{module}: {counts[module]['share killed']:.2f} % of the mutants are killed, expected are "
                f"{wanted:g} %. Write a test that fails with a change listed above, or list the change in "
                "tests/mutants/equivalent.toml with the reason why no test can see it"
            )


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # mutmut is ended then too
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped; repeat the command, it goes on there")
