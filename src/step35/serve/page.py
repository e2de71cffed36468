"""GET /: the built-in chat page (`assets/chat.html`), one file that loads nothing and asks only this server.

It is served without the API key: the page holds none, asks for it, and sends it with every request of its own.
"""

from __future__ import annotations

import re
from base64 import b64encode
from hashlib import sha256
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

PAGE = Path(__file__).parent.parent / "assets" / "chat.html"


def router() -> APIRouter:
    """Return the route."""
    routes = APIRouter()
    html = PAGE.read_text(encoding="utf-8")
    headers = {
        "Content-Security-Policy": policy(html),
        "Cache-Control": "no-cache",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }

    @routes.get("/", response_model=None, include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(html, headers=headers)

    return routes


def policy(html: str) -> str:
    """Allow the page's own script and style, by their hashes, requests to this server, and nothing else."""
    script, style = (_hash(re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", html, re.DOTALL)) for tag in ("script", "style"))
    return (
        f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _hash(sources: list[str]) -> str:
    return " ".join(f"'sha256-{b64encode(sha256(source.encode()).digest()).decode()}'" for source in sources)
