"""The page at ``/``: a chat and a live view. Its files need no key and hold no secret."""

from __future__ import annotations

from importlib.resources import files

from fastapi import APIRouter, Request
from fastapi.responses import Response

FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
"""By path: a file of this folder, and what it is."""

HEADERS = {
    # Nothing inline, nothing from elsewhere, in nobody's frame, and no text can become markup.
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",
}

_CONTENTS = {path: files(__name__).joinpath(name).read_bytes() for path, (name, _) in FILES.items()}

router = APIRouter(include_in_schema=False)


async def page_file(request: Request) -> Response:
    path = request.url.path
    return Response(_CONTENTS[path], headers=HEADERS, media_type=FILES[path][1])


for _path in FILES:
    router.add_api_route(_path, page_file, methods=["GET"], response_model=None)
