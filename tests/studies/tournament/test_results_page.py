"""The page of results in a browser: it fits, runs nothing, and shows untrusted text as it is."""

import shutil
from pathlib import Path

import pytest

from qlora_jax.progress_reporter import ProgressReporter
from qlora_jax.studies.tournament.tournament import hold_tournament
from tests.studies.tournament.tiny_tournament import arena_args, write_lines, write_tournament

CHROMIUM = shutil.which("chromium")
RUN = "document.title = 'ran'"
HOSTILE = f'</div><script>{RUN}</script><img src=x onerror="{RUN}"> {"long" * 100}'

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="requires chromium (Debian: apt-get install chromium)"),
]


def write_results(folder: Path) -> Path:
    """Holds a tournament whose replies are hostile, by recorded verdicts."""
    settings = write_tournament(folder)
    names = [*settings["systems"]]
    for name in names:
        rows = [{"question_id": 10 + i, "reply": f"{name} {HOSTILE}"} for i in range(4)]
        settings["systems"][name]["replies"] = write_lines(folder / f"{name}.jsonl", rows)
    rows = [
        {"question_id": 10 + i, "model_a": a, "model_b": b, "verdict": 1 + (i + names.index(a)) % 3}
        for i in range(4)
        for a in names
        for b in names
        if a != b
    ]
    verdicts = {"kind": "verdicts", "path": write_lines(folder / "verdicts.jsonl", rows)}
    hold_tournament(arena_args(**settings, judges={"file": verdicts}), ProgressReporter())
    return folder / "arena/results.html"


def test_the_page_fits_and_runs_nothing(tmp_path):
    from playwright.sync_api import sync_playwright

    # Without its policy, so that escaping alone has to hold.
    text = write_results(tmp_path).read_text()
    page_file = tmp_path / "page.html"
    assert "Content-Security-Policy" in text
    page_file.write_text(text.replace("http-equiv", "data-unused"))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        for width, scheme, color in ((360, "dark", "rgb(18, 21, 27)"), (1200, "light", "rgb(246, 247, 249)")):
            page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
            page.goto(page_file.as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") == width
            assert page.evaluate("getComputedStyle(document.body).backgroundColor") == color
            assert page.title() == "arena"
            assert page.locator(".pair .text").first.text_content().endswith(HOSTILE)
            assert page.locator(".ranking .range").count() == 3
        browser.close()
