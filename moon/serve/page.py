"""The page at /ui: one file that asks only its own service.

Its style and script stand in it; the policy that goes with it allows these two, by their
hashes, and nothing else. It is open even where a token is needed, as it tells nothing and
asks for the token itself.
"""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

__all__ = ["page", "policy_of"]


async def page(request: Request) -> Response:
    """The page, with its policy."""
    content, policy = _load()
    headers = {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"}
    return HTMLResponse(content, headers=headers)


def policy_of(content: str) -> str:
    """The strictest Content-Security-Policy under which a page works.

    Args:
        content: HTML with one ``<style>`` and one ``<script>``.
    """
    (style,) = re.findall(r"<style>(.*?)</style>", content, flags=re.DOTALL)
    (script,) = re.findall(r"<script>(.*?)</script>", content, flags=re.DOTALL)
    rules = {
        "default-src": "'none'",
        "script-src": _hash(script),
        "style-src": _hash(style),
        "connect-src": "'self'",
        # The image that was chosen, from memory, and an empty icon.
        "img-src": "blob: data:",
        "form-action": "'none'",
        "base-uri": "'none'",
        "frame-ancestors": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())


@cache
def _load() -> tuple[str, str]:
    content = files("moon.serve").joinpath("assets").joinpath("ui.html").read_text(encoding="utf-8")
    return content, policy_of(content)


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"
