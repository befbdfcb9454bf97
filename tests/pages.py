"""Pages in a browser: opened so that whatever they should not do is noticed, and the names that tempt them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

EVIL = [
    "<script>document.title='owned'</script>",
    '"><img src=x onerror="document.title=\'owned\'">',
    "</td></tr></table></script><h1>owned</h1>",
    "مرحبا بالعالم",
    "gpj.\u202etac",
    "\ud800 half",
    "a\0b\x1b[2J",
    "🚲" * 20,
    "x" * 400,
    "&lt;already&gt;",
    "",
]


@contextmanager
def opened(browser: Any, path: Path, *, width: int = 1400, scheme: str = "light") -> Iterator[Any]:
    """The page in a browser that says nothing on its console and asks no network."""
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    tab, complaints, requests = context.new_page(), [], []
    tab.on("console", lambda message: complaints.append(message.text))
    tab.on("pageerror", lambda error: complaints.append(str(error)))

    def refuse(route: Any) -> None:
        requests.append(route.request.url)
        route.abort()

    tab.route(lambda url: not url.startswith("file:"), refuse)
    tab.goto(path.as_uri())
    yield tab
    context.close()
    assert (complaints, requests) == ([], [])
