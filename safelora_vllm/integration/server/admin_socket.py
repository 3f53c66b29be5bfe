"""A Unix socket for callers that cannot send a key: whoever connects to it and sends none is an admin.

The kernel decides who may connect, by the permissions of the socket's file and of its folder. The same
application answers, with the same routes and the same gate. Imports no vllm.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import fcntl
import hashlib
import logging
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from safelora_vllm.errors import GuardError
from safelora_vllm.tenants.principal import Principal

logger = logging.getLogger("vllm.safelora.admin_socket")
_MARK = "safelora.admin_socket"  # a key of the ASGI scope, which no request can set
_ADMIN = Principal("admin", "admin-socket")
_LOCK = ".lock"


def by_socket(scope: Scope) -> Principal | None:
    """The admin that a request over the socket comes from; None for all other requests."""
    return _ADMIN if scope.get(_MARK) is True else None


class AdminSocket:
    """The socket of one API server process.

    Of several API servers of one server, one listens: a change that it makes is in force on all of them.
    """

    def __init__(self, path: Path, server: str) -> None:
        """Take the path; `serve` begins to listen.

        server: what all API servers of one server have in common, and those of another one have not.

        Raises:
            GuardError: others could put a socket there, something else is there, or another server listens.
        """
        self._path = path
        self._server: _Server | None = None
        self._task: asyncio.Task[None] | None = None
        self._folder = _open_folder(path)
        self._lock = _take_lock(self._folder, path, server)
        self._socket = None if self._lock is None else _bind(self._folder, path)

    @property
    def listens(self) -> bool:
        """Whether this API server does; another one of the same server may."""
        return self._socket is not None

    def serve(self, app: ASGIApp) -> None:
        """Answer at the path, in the event loop that runs."""
        if self._socket is None:
            logger.info("admin socket %s: another API server of this server listens", self._path)
            return
        config = uvicorn.Config(_Marked(app), lifespan="off", log_config=None, access_log=False)
        self._server = _Server(config)
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        atexit.register(self._remove)  # vLLM ends its API servers without a word to plugins
        logger.warning(
            "admin socket %s: user %d may change all adapters without a key", self._path, os.geteuid()
        )

    async def stop(self) -> None:
        """Stop listening, and remove the socket's file."""
        if self._server is not None and self._task is not None:
            self._server.should_exit = True
            await self._task
            atexit.unregister(self._remove)
            self._remove()

    def _remove(self) -> None:
        """Remove the file while the lock says that it is this process's."""
        with contextlib.suppress(OSError):
            os.unlink(self._path.name, dir_fd=self._folder)
        if self._lock is not None:
            os.close(self._lock)
        os.close(self._folder)


class _Marked:
    """The application, told that a request came over the socket."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app({**scope, _MARK: True}, receive, send)


class _Server(uvicorn.Server):
    """Leaves signals to vLLM's own server."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _open_folder(path: Path) -> int:
    """The socket's folder, which all later steps use: nobody can put another in its place meanwhile.

    Raises:
        GuardError: it is a link or no folder, or others may write to it.
    """
    folder = path.parent
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise GuardError(
            f"--admin-socket {path}: {folder} cannot be used ({error.strerror}). Expected a folder of the "
            "server's user, no link"
        ) from error
    status = os.fstat(found)
    if status.st_uid not in (0, os.geteuid()) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        os.close(found)
        raise GuardError(
            f"--admin-socket {path}: others may write to {folder} (mode {stat.S_IMODE(status.st_mode):04o}, "
            f"user {status.st_uid}), and so put a socket of their own there. Name a folder below it that "
            "does not exist: the server makes it. Or give it to user "
            f"{os.geteuid()}, with 'chmod 700 {folder}'"
        )
    return found


def _take_lock(folder: int, path: Path, server: str) -> int | None:
    """The lock of the process that listens; None where another of this server has it.

    Raises:
        GuardError: a process of another server is.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        lock = os.open(path.name + _LOCK, flags, 0o600, dir_fd=folder)
    except OSError as error:
        raise GuardError(
            f"--admin-socket {path}: {path}{_LOCK} cannot be opened ({error.strerror})"
        ) from error
    mine = hashlib.sha256(f"{os.getppid()} {server}".encode()).hexdigest().encode()
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(lock, len(mine), 0)
        os.close(lock)
        if holder != mine:
            raise GuardError(
                f"--admin-socket {path}: another server listens there. Give each server a path of its own"
            ) from None
        return None
    os.ftruncate(lock, 0)
    os.pwrite(lock, mine, 0)
    return lock


def _bind(folder: int, path: Path) -> socket.socket:
    """A socket that only this user can connect to. One that a former server left is replaced.

    Raises:
        GuardError: something else than a socket is there, or the socket cannot be made.
    """
    try:
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISSOCK(os.stat(path.name, dir_fd=folder, follow_symlinks=False).st_mode):
                raise GuardError(
                    f"--admin-socket {path}: something else than a socket is there. Remove it, or name "
                    "another path"
                )
            os.unlink(path.name, dir_fd=folder)
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        made.bind(f"/proc/self/fd/{folder}/{path.name}")
        os.chmod(path.name, 0o600, dir_fd=folder)  # nobody can connect yet: it does not listen
    except OSError as error:
        raise GuardError(f"--admin-socket {path} cannot be made ({error.strerror or error})") from error
    return made
