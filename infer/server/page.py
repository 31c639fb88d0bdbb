"""The files of the chat page, which anyone may load: it asks for the key itself."""

from __future__ import annotations

from pathlib import Path

from starlette.responses import Response

_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
# The page loads nothing from elsewhere, makes no markup of text, runs nothing that is written into it, and is shown in
# no frame.
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
        "trusted-types 'none'"
    ),
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
}


def _response(path: Path) -> Response:
    return Response(path.read_bytes(), headers=_HEADERS, media_type=_TYPES[path.suffix])


# The response at each path.
FILES = {
    "/" if path.name == "page.html" else f"/{path.name}": _response(path)
    for path in sorted(Path(__file__).parent.glob("page*"))
    if path.suffix in _TYPES
}
