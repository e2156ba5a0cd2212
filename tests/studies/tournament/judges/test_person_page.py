"""The page of a person in a browser: keys, a reload in the middle, the exported file, and texts that are untrusted."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

from qlora_jax.progress_reporter import ProgressReporter
from qlora_jax.studies.tournament.judges.person import PersonJudge
from qlora_jax.studies.tournament.settings import PersonArgs
from tests.studies.tournament.tiny_tournament import arena_args, transcripts_of, write_lines, write_tournament

CHROMIUM = shutil.which("chromium")
RUN = "document.title = 'ran'"
HOSTILE = f'</script><script>{RUN}</script><img src=x onerror="{RUN}"> &lt; \u2028 \x1b[2J {{{{ 1 }}}}'
KEYS = ["1", "2", "3", "ArrowLeft", "ArrowRight", "t"]
VERDICT_OF_KEY = {"1": 1, "2": 2, "3": 3, "ArrowLeft": 1, "ArrowRight": 2, "t": 3}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="requires chromium (Debian: apt-get install chromium)"),
]


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield found
        found.close()


def write_page(folder: Path, prompts: int, answers: str | None = None):
    settings = write_tournament(folder, prompts=prompts)
    rows = [{"question_id": 10 + i, "reply": f"A good reply to {i}. {HOSTILE}"} for i in range(prompts)]
    settings["systems"]["alpha-system"]["replies"] = write_lines(folder / "hostile.jsonl", rows)
    transcripts = transcripts_of(arena_args(**settings))
    judge, found = PersonJudge("anna", PersonArgs(answers=answers), folder, ProgressReporter()), []
    judge.judge(transcripts.matches(), transcripts, found.append)
    return judge, found


def wait_for_storage(page) -> None:
    """Reload until progress shows: under load, Chromium may open a page before it has stored the verdicts."""
    for _ in range(20):
        if not page.inner_text("#count").startswith("0 of "):
            return
        page.wait_for_timeout(500)
        page.reload()


def test_fifty_judgements_with_a_reload_in_the_middle(browser, tmp_path):
    judge, shown = write_page(tmp_path, prompts=17)  # 51 pairs
    text = judge.page.read_text()
    assert not [name for name in ("alpha-system", "beta-system", "gamma-system") if name in text]
    context = browser.new_context(accept_downloads=True)
    page = context.new_page()
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: errors.append(request.url) if request.url.startswith("http") else None)
    page.goto(judge.page.as_uri())
    pressed = [KEYS[i % len(KEYS)] for i in range(50)]
    for i, key in enumerate(pressed):
        if i == 25:
            page.reload()
            wait_for_storage(page)
            assert page.inner_text("#count") == "25 of 51 judged"
        if i == 30:  # a verdict that was a mistake
            page.keyboard.press("2")
            page.keyboard.press("Backspace")
        page.keyboard.press(key)
    assert page.inner_text("#count") == "50 of 51 judged"
    page.close()
    page = context.new_page()  # the browser was closed
    page.goto(judge.page.as_uri())
    wait_for_storage(page)
    assert page.inner_text("#count") == "50 of 51 judged"
    with page.expect_download() as download:
        page.keyboard.press("s")
    download.value.save_as(tmp_path / "answers.json")
    assert page.title() == "Which reply is better?" and not errors
    context.close()
    exported = json.loads((tmp_path / "answers.json").read_text())
    assert [*exported["verdicts"].values()] == [VERDICT_OF_KEY[key] for key in pressed]
    _, found = write_page(tmp_path, prompts=17, answers=str(tmp_path / "answers.json"))
    assert [one.match for one in found] == [one.match for one in shown]
    assert [one.verdict for one in found] == [*(VERDICT_OF_KEY[key] for key in pressed), None]
    assert Counter(one.verdict for one in found)[None] == 1


@pytest.mark.parametrize(("width", "scheme"), [(360, "dark"), (1200, "light")])
def test_the_page_fits_and_shows_untrusted_text_as_it_is(browser, tmp_path, width, scheme):
    judge, _ = write_page(tmp_path, prompts=1)
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page = context.new_page()
    page.goto(judge.page.as_uri())
    texts = []
    for _ in range(3):
        texts += [page.text_content("#left"), page.text_content("#right")]
        page.click("#choose-3")
    hostile = HOSTILE.replace("\x1b", "␛")
    assert texts.count(f"A good reply to 0. {hostile}") == 2
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.is_visible("#end") and page.is_disabled("#choose-1")
    page.keyboard.press("Backspace")
    assert page.get_attribute("#choose-3", "aria-pressed") == "true"
    colors = page.evaluate("[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]")
    assert colors == (
        ["rgb(18, 21, 27)", "rgb(228, 232, 239)"] if scheme == "dark" else ["rgb(246, 247, 249)", "rgb(29, 35, 48)"]
    )
    assert page.title() == "Which reply is better?"
    context.close()


def test_a_browser_without_storage_warns(browser, tmp_path):
    judge, _ = write_page(tmp_path, prompts=1)
    context = browser.new_context()
    context.add_init_script("Object.defineProperty(window, 'localStorage', {get() { throw new Error('denied') }})")
    page = context.new_page()
    page.goto(judge.page.as_uri())
    assert "keeps no progress" in page.inner_text("#storage")
    page.keyboard.press("1")
    assert page.inner_text("#count") == "1 of 3 judged"
    context.close()
