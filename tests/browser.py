"""Opens pages of a server in Chromium, and collects what a page must not do."""

import contextlib
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium")
BROWSER_TEST = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="requires chromium (Debian: apt-get install chromium)"),
]
SIZES = [(390, "dark"), (1280, "light")]


@contextlib.contextmanager
def launched() -> Iterator[Any]:
    """Yields a browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield found
        found.close()


@contextlib.contextmanager
def opened(browser: Any, address: str, width: int = 1280, scheme: str = "light") -> Iterator[Any]:
    """Yields a page at an address; afterwards fails if a script raised, the console has errors, or it asked others.

    The console's note of a request that failed, which a test means, does not count.
    """
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page, problems = context.new_page(), []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None)
    page.on("request", lambda request: None if request.url.startswith(address) else problems.append(request.url))
    page.goto(address)
    yield page
    context.close()
    assert not [each for each in problems if "Failed to load resource" not in each]
