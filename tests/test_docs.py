"""What the documents name exists: pages, headings, files, commands, options, variables, make targets."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import pytest

from safelora_vllm.cli.main import _parser
from safelora_vllm.policy import Policy

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    file
    for pattern in ("*.md", "docs/*.md", "examples/*.md", "benchmarks/*.md", "benchmarks/safety/*.md")
    for file in ROOT.glob(pattern)
)
README = ROOT / "README.md"
LONGEST_SENTENCE = 25  # words
MOST_LINES = 150  # of the README
# Options of vLLM's that the documents name; serve passes them on.
VLLMS = {
    "--additional-config", "--allowed-local-media-path", "--api-key", "--api-server-count", "--config",
    "--data-parallel-size", "--enable-lora", "--enable-tower-connector-lora", "--enforce-eager", "--grpc",
    "--host", "--lora-modules", "--max-cpu-loras", "--max-lora-rank", "--max-loras", "--max-model-len",
    "--middleware", "--port",
    "--served-model-name", "--tensor-parallel-size", "--weight-transfer-config", "--worker-extension-cls",
    "--enable-offline-docs", "--dtype", "--max-num-seqs", "--gpu-memory-utilization", "--model",
    "--no-enable-lora", "--pipeline-parallel-size", "--kv-cache-memory-bytes",
    "--load-format", "--revision", "--disable-log-stats", "--log-config-file", "--otlp-traces-endpoint",
    "--disable-fastapi-docs", "--disable-log-requests", "--chat-template", "--enable-prefix-caching",
    "--lora-dtype", "--skip-tokenizer-init", "--kv-transfer-config", "--default-chat-template-kwargs",
    "--quantization", "--kv-cache-dtype", "--logprobs-mode", "--hf-overrides",
}  # fmt: skip
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_SPAN = re.compile(r"`([^`\n]+)`")
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.S | re.M)
_FILE = re.compile(r"[\w.-]+(?:/[\w.-]+)*\.(?:py|md|json|toml|svg|png|sh)")
_PACKAGE = ROOT / "safelora_vllm"
_PLACES = (ROOT, _PACKAGE, _PACKAGE / "integration", _PACKAGE / "integration" / "server", ROOT / "tests")
# Files that users have, and those that the server writes.
_NOT_OURS = {
    "adapter_config.json", "config.json", "manifest.json", "models.json", "keys.toml", "report.json",
    "serving.json", "found.json",
    "tokenizer.json",
    "model.safetensors.index.json", "dashboard.json", "prometheus.toml", "setup.py", "sitecustomize.py",
    "openai/api_server.py",
}  # fmt: skip


def ids(documents: list[Path]) -> list[str]:
    return [str(document.relative_to(ROOT)) for document in documents]


each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=ids(DOCUMENTS))


def code(text: str) -> list[str]:
    """Blocks, with continued lines joined, and spans of code."""
    blocks = [block.replace("\\\n", " ") for _, block in _BLOCK.findall(text)]
    return [*blocks, *_SPAN.findall(_BLOCK.sub("", text))]


def prose(text: str) -> str:
    """Without blocks of code, tables, pictures and the addresses of links."""
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", _BLOCK.sub("", text))
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return "\n".join(line for line in text.splitlines() if not line.startswith("|"))


def anchors(document: Path) -> set[str]:
    """The ids that GitHub gives to headings."""
    headings = re.findall(r"^#+ (.+)$", _BLOCK.sub("", document.read_text()), re.M)
    plain = [
        re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower() for heading in headings
    ]
    return {re.sub(r"[^\w\- ]", "", heading).strip().replace(" ", "-") for heading in plain}


@each_document
def test_a_command_of_vllms_says_what_to_do_without_it(document: Path) -> None:
    """The CPU build has no metadata of a distribution called vllm, so that its command fails."""
    text = document.read_text()
    blocks = "\n".join(block for _, block in _BLOCK.findall(text))
    commands = re.findall(r"^\s*(?:\w+=\S+ )*vllm (?:serve|bench)\b", blocks, re.MULTILINE)
    said = "vllm.entrypoints.openai.api_server" in text or "#plain-vllm-serve" in text
    assert said or not commands


@each_document
def test_links_lead_somewhere(document: Path) -> None:
    lost = []
    for target in _LINK.findall(document.read_text()):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = document.parent / path if path else document
        if not file.exists() or (anchor and anchor not in anchors(file)):
            lost.append(target)
    assert not lost


@each_document
def test_files_that_are_named_exist(document: Path) -> None:
    lost = []
    for span in code(document.read_text()):
        for name in _FILE.findall(span) if len(span.split()) == 1 else ():
            if name == span and not {name, name.rpartition("/")[2]} & _NOT_OURS:
                places = (document.parent, *_PLACES)
                if not any((place / name).exists() for place in places) and not _anywhere(name):
                    lost.append(name)
    assert not lost


def _anywhere(name: str) -> bool:
    """Whether a plain file name is one of the package's, as the documents name modules."""
    return "/" not in name and any(
        next(ROOT.joinpath(folder).rglob(name), None)
        for folder in ("safelora_vllm", "tests", "benchmarks", "examples", "docs")
    )


def options() -> dict[str, set[str]]:
    """Options of each command of ours, those of its own commands included."""

    def of(parser: argparse.ArgumentParser) -> set[str]:
        found = {option for action in parser._actions for option in action.option_strings}
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                found = found.union(*map(of, action.choices.values()))
        return found

    (commands,) = (a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction))
    return {name: of(parser) for name, parser in commands.choices.items()}


@each_document
def test_commands_and_options_exist(document: Path) -> None:
    known = options()
    ours = set().union(*known.values())
    wrong = []
    for text in code(document.read_text()):
        for line in re.split(r"\n|&&|;|\|", text):
            words = line.split(" #")[0].split()
            at = next((n + 1 for n, word in enumerate(words[:-1]) if word.endswith("safelora-vllm")), None)
            command = words[at] if at is not None else None
            given = [re.match(r"--[a-z][a-z-]*", word) for word in words[at or 0 :]]
            names = {match[0] for match in given if match}
            if command is not None and re.fullmatch("[a-z]+", command):
                if command not in known:
                    wrong.append(f"safelora-vllm {command}")
                    continue
                allowed = known[command] | (VLLMS if command == "serve" else set())
                wrong += [f"{command} {name}" for name in names - allowed]
            elif len(words) <= 2 and names:  # an option alone, maybe with its value
                wrong += sorted(names - ours - VLLMS - _script_options())
    assert not wrong


def _script_options() -> set[str]:
    """Options of the commands that are run from a checkout."""
    scripts = [
        *ROOT.glob("benchmarks/**/*.py"),
        *ROOT.glob("examples/*.py"),
        ROOT / "tests/mutants/__main__.py",
    ]
    scripts += ROOT.glob("tests/fuzz/*.py")
    return set(re.findall(r'"(--[a-z][a-z-]*)"', "".join(script.read_text() for script in scripts)))


@each_document
def test_scripts_modules_and_make_targets_exist(document: Path) -> None:
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.M))
    wrong = []
    for text in code(document.read_text()):
        for target in re.findall(r"(?:^|\s)make ([a-z][\w-]*)", text):
            if target not in targets:
                wrong.append(f"make {target}")
        for script, rest in re.findall(r"python ([\w/.-]+\.py)([^\n|&]*)", text):
            file = next(
                (place / script for place in (ROOT, document.parent) if (place / script).is_file()), None
            )
            if file is None:
                wrong.append(script)
                continue
            source = file.read_text()
            wrong += [
                f"{script} {name}"
                for name in re.findall(r"--[a-z][a-z-]*", rest)
                if f'"{name}"' not in source
            ]
        for module in re.findall(r"python -m ((?:tests|safelora_vllm)[\w.]*)", text):
            path = ROOT / module.replace(".", "/")
            if not (path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()):
                wrong.append(module)
    assert not wrong


@each_document
def test_environment_variables_exist(document: Path) -> None:
    sources = [*ROOT.glob("safelora_vllm/**/*.py"), *ROOT.glob("tests/**/*.py"), ROOT / "Makefile"]
    known = set(re.findall(r"SAFELORA_[A-Z_]+", "".join(file.read_text() for file in sources)))
    assert set(re.findall(r"SAFELORA_[A-Z_]+[A-Z]", document.read_text())) <= known


def sentences(text: str) -> list[str]:
    """Of paragraphs and of items of lists."""
    parts = re.split(r"\n\s*\n|\n(?=[-*#] |\d+\. )", prose(text))
    return [sentence for part in parts for sentence in re.split(r"(?<=[.!?:])\s+", part)]


def test_no_sentence_of_the_readme_is_long() -> None:
    long = [s for s in sentences(README.read_text()) if len(s.split()) > LONGEST_SENTENCE]
    assert not long


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= MOST_LINES


def test_the_readme_links_every_page() -> None:
    """Or the index of the pages does."""
    linked = {
        (document.parent / target.partition("#")[0]).resolve()
        for document in (README, ROOT / "docs" / "README.md")
        if document.exists()
        for target in _LINK.findall(document.read_text())
    }
    assert {page.resolve() for page in ROOT.glob("docs/*.md") if page.name != "README.md"} <= linked


def test_the_policy_of_a_report_is_what_a_server_sends() -> None:
    """It has no `opinion` where that is false, as older releases do not know the field."""
    text = (ROOT / "docs" / "http-api.md").read_text()
    (report,) = (
        block for _, block in _BLOCK.findall(text) if block.startswith('{"adapter": "acme/orders", "dig')
    )
    assert json.loads(report)["policy"] == Policy().to_mapping()
    (row,) = re.findall(r"^\| `policy` \| the rules that judged this adapter.*$", text, re.M)
    assert "only `opinion` is left out where it is `false`" in row
