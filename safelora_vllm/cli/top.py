"""``safelora-vllm top``: a server's adapters, live on the terminal."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from http.client import HTTPException
from typing import Any

from safelora_vllm.cli import DONE
from safelora_vllm.errors import SafeLoRAError, UsageError
from safelora_vllm.settings import ADMIN_KEY

API_KEY = "SAFELORA_KEY"  # a tenant's or an admin's, for commands that ask a server
_TIMEOUT = 10.0
_MOST_BYTES = 64 * 1024 * 1024
_REFUSALS = 20


class NoAnswer(SafeLoRAError):
    """The server does not answer now; it may do so later."""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to those of ``safelora-vllm``."""
    parser = commands.add_parser(
        "top",
        allow_abbrev=False,
        help="show a server's adapters, live on the terminal",
        epilog=f"The key is taken from {API_KEY}, or else from {ADMIN_KEY}. Ctrl-C ends it.",
    )
    parser.add_argument(
        "url",
        nargs="?",
        default="http://localhost:8000",
        help="of the server; default: http://localhost:8000",
    )
    parser.add_argument(
        "--interval", type=float, default=2.0, metavar="SECONDS", help="between two looks; default: 2"
    )
    parser.add_argument("--once", action="store_true", help="print it once and end, as where output is piped")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Show the adapters until Ctrl-C."""
    if not _is_url(args.url):
        raise UsageError(f"{args.url!r:.200} is not a valid URL: expected http://HOST:PORT or https://HOST")
    if not 0.5 <= args.interval <= 3600:
        raise UsageError(f"--interval is {args.interval:g}: expected 0.5 to 3600 seconds")
    from safelora_vllm.cli.top_view import Frame

    server = Server(args.url.rstrip("/"), _key())
    try:
        first = server.look()
    except NoAnswer as error:
        raise UsageError(str(error)) from error
    frame = Frame(args.url, first)
    if args.once or not sys.stdout.isatty():
        frame.print_once()
        return DONE
    with frame.live():
        try:
            while True:
                time.sleep(args.interval)
                try:
                    frame.show(server.look())
                except NoAnswer as error:
                    frame.trouble = str(error)
        except KeyboardInterrupt:
            return DONE


def _is_url(text: str) -> bool:
    try:
        return urllib.parse.urlsplit(text).scheme in ("http", "https")
    except ValueError:  # such as half an IPv6 address
        return False


def _key() -> str:
    """The caller's key; empty for none.

    Raises:
        UsageError: it cannot be sent. Its text is in no message.
    """
    name = API_KEY if os.environ.get(API_KEY) else ADMIN_KEY
    key = os.environ.get(name, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UsageError(f"{name} has characters that no key has: expected one line of printable ASCII")
    return key


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: another host would get the key."""

    def redirect_request(self, *_: Any) -> None: ...


_OPENER = urllib.request.build_opener(_NoRedirects)


class Server:
    """The API of a server, as the caller of a key sees it."""

    def __init__(self, url: str, key: str) -> None:
        self._url, self._key = url, key

    def look(self) -> dict[str, Any]:
        """The overview, with the newest ``refusals`` where the key may see them.

        Raises:
            NoAnswer: there is none now. UsageError: the key may not, or it is no guarded server.
        """
        found = self._get("/v1/overview")
        if found.get("may_upload"):
            found["refusals"] = self._get(f"/v1/audit?decision=refused&limit={_REFUSALS}")["records"]
        return found

    def _get(self, path: str) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        request = urllib.request.Request(self._url + path, headers=headers)
        try:
            with _OPENER.open(request, timeout=_TIMEOUT) as answer:
                found = json.loads(answer.read(_MOST_BYTES))
        except urllib.error.HTTPError as error:
            raise self._refused(error) from error
        except (OSError, HTTPException, ValueError) as error:
            raise NoAnswer(
                f"no answer from {self._url}: {error}. Check the URL, and that the server runs"
            ) from error
        if not isinstance(found, dict):
            raise UsageError(f"{self._url} is not a guarded server: its answer to {path} is not an object")
        return found

    def _refused(self, error: urllib.error.HTTPError) -> SafeLoRAError:
        if error.code in (401, 403):
            given = "the key was not accepted" if self._key else "no key is set"
            return UsageError(f"{self._url}: {given}. Set {API_KEY} to an admin's or a tenant's key")
        if error.code == 404:
            return UsageError(f"{self._url} is not a guarded server of this release: it has no /v1/overview")
        if 300 <= error.code < 400:
            address = error.headers.get("Location", "")
            return UsageError(
                f"{self._url} redirects to {address!r:.200}, which gets no key. Give the server's own URL"
            )
        return NoAnswer(f"{self._url} answered with status {error.code}")
