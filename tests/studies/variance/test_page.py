"""The page of a study in a narrow browser."""

import shutil

import pytest

from qlora_jax.page_template import page_template
from qlora_jax.studies.variance.analysis import Part, Split

CHROMIUM = shutil.which("chromium")
ENDS = (-1.23e-05, 1.23e-05)
NAMES = ("model", "prompts", "levels", "residual")
SPLIT = Split(
    measure="likelihood",
    factor="seed",
    models=["a", "b"],
    mean=1.23e-05,
    mean_interval=ENDS,
    level_means={"0": 1.0},
    sd_between_levels=1.0,
    parts=[Part(name=name, value=1.23e-05, interval=ENDS, share=1.0) for name in NAMES],
)
# The words of all cells that are not on one line.
BROKEN_WORDS = """[...document.querySelectorAll('.factor th, .factor td')].flatMap(cell => {
  const nodes = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT), found = [];
  for (let node = nodes.nextNode(); node; node = nodes.nextNode())
    for (const word of node.data.matchAll(/\\S+/g)) {
      const range = document.createRange();
      range.setStart(node, word.index);
      range.setEnd(node, word.index + word[0].length);
      if (range.getClientRects().length > 1) found.push(word[0]);
    }
  return found;
})"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="requires chromium (Debian: apt-get install chromium)")
def test_no_word_of_a_table_is_broken_on_a_phone(tmp_path):
    from playwright.sync_api import sync_playwright

    template = page_template("qlora_jax.studies.variance", "variance.html.jinja")
    shown = dict(first="a", others=["b"], prompts=1, fixed={}, examples=[], first_measure="length")
    (tmp_path / "page.html").write_text(template.render(**shown, measures=[("length", [("b - a", [SPLIT])])]))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 390, "height": 800})
        page.goto((tmp_path / "page.html").as_uri())
        assert page.inner_text(".factor td:last-child").split() == ["[-1.23e-05,", "1.23e-05]"]
        assert page.evaluate(BROKEN_WORDS) == []
        assert page.evaluate("document.querySelector('.scroll').scrollWidth") <= 390
        browser.close()
