"""The routes of the page: its files, which hold no data. The page asks the API with its reader's key."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from safelora_vllm.errors import UnknownRoute
from safelora_vllm.page.files import INDEX, PageFile, page_files

# Nothing but files of this server, no inline code, no frames, and no string that becomes markup.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    "Cache-Control": "no-cache",
}

page_router = APIRouter(include_in_schema=False)


@page_router.get("/safelora/")
async def page(request: Request) -> Response:
    """The page."""
    return _answer(request, page_files()[INDEX])


@page_router.get("/safelora/page/{file}")
async def page_file(file: str, request: Request) -> Response:
    """A style sheet or script of the page."""
    found = page_files().get(file)
    if found is None or file == INDEX:
        raise UnknownRoute(f"the page has no file {file!r:.200}")
    return _answer(request, found)


def _answer(request: Request, file: PageFile) -> Response:
    headers = {**_HEADERS, "ETag": file.tag}
    if request.headers.get("if-none-match") == file.tag:
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.media_type, headers=headers)
