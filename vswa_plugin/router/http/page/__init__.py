"""The live page at ``/``: one document without outside parts, made once from three files beside this one.

page.html  the parts of the page
page.css   light and dark, wide and narrow
page.js    asks ``/overview`` and ``/explain``, and draws what they answer
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib import resources


@cache
def document() -> tuple[str, str]:
    """The page, and its Content-Security-Policy: it runs and shows nothing but its own parts."""
    html, style, script = (
        resources.files(__name__).joinpath(f"page.{kind}").read_text("utf-8")
        for kind in ("html", "css", "js")
    )
    policy = {
        "default-src": "'none'",
        "script-src": _hashed(script),
        "style-src": _hashed(style),
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    page = html.replace("/* page.css */", style).replace("/* page.js */", script)
    return page, "; ".join(f"{name} {value}" for name, value in policy.items())


def _hashed(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
