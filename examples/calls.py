"""What the demo asks of a running server: load an adapter, answer questions, show a report."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from openai import OpenAI
from rich.console import Console
from rich.text import Text
from server import ADMIN_KEY, Server

console = Console(width=118)


def load(server: Server, name: str, folder: Path) -> str:
    """Upload by the same call that vLLM has, with the admin key; why it was refused, if it was."""
    body = json.dumps({"lora_name": name, "lora_path": str(folder)}).encode()
    request = urllib.request.Request(
        f"{server.url}/v1/load_lora_adapter",
        body,
        {"Authorization": f"Bearer {ADMIN_KEY}", "Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=600):
            return ""
    except urllib.error.HTTPError as error:
        if error.code != 422:
            raise SystemExit(f"{name} was not loaded ({error}): {error.read().decode()}") from None
        return str(json.load(error)["error"]["message"])


def set_policy(server: Server, name: str, policy: dict[str, object], override: str = "") -> None:
    """Judge an adapter by rules of its own. override: the reason to serve it whatever its exam says."""
    body = {"policy": policy} | ({"override": True, "reason": override} if override else {})
    request = urllib.request.Request(
        f"{server.url}/v1/adapters/{name}/policy",
        json.dumps(body).encode(),
        {"Authorization": f"Bearer {ADMIN_KEY}", "Content-Type": "application/json"},
        method="PUT",
    )
    try:
        with urllib.request.urlopen(request, timeout=600):
            pass
    except urllib.error.HTTPError as error:
        raise SystemExit(f"{name} has no such policy ({error}): {error.read().decode()}") from None


def ask(server: Server, model: str, prompts: Iterable[str]) -> dict[str, str]:
    """Greedy answers through the official client, several questions at a time."""
    client = OpenAI(base_url=f"{server.url}/v1", api_key="unused", timeout=300)

    def one(prompt: str) -> tuple[str, str]:
        reply = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": prompt}],
            temperature=0,
            max_tokens=48,
        )
        return prompt, (reply.choices[0].message.content or "").strip()

    with ThreadPoolExecutor(32) as pool:
        return dict(pool.map(one, prompts))


def get(server: Server, path: str) -> dict[str, object]:
    """A JSON object from the server."""
    return dict(json.loads(text(server, path)))


def text(server: Server, path: str) -> str:
    """A text from the server, as an admin sees it."""
    request = urllib.request.Request(server.url + path, headers={"Authorization": f"Bearer {ADMIN_KEY}"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return str(answer.read().decode())


def say(line: str) -> None:
    """A line to the terminal."""
    console.print(Text(f"\n{line}", style="bold"))
