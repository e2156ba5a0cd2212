"""HTML pages share one style sheet."""

from pathlib import Path

import pytest

from qlora_jax.page_template import page_template

ROOT = Path(__file__).resolve().parent.parent
STYLE = ROOT / "qlora_jax/page.css"
PAGES = sorted((ROOT / "qlora_jax").rglob("*.html.jinja"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_page_begins_with_the_shared_style_and_defines_no_shared_colour_again(page):
    text = page.read_text("utf-8")
    own = text[text.index("<style>") : text.index("</style>")]
    assert own.startswith("<style>\n{{ page_style }}\n")
    shared = {word for word in STYLE.read_text("utf-8").split() if word.startswith("--")}
    assert "--ink:" in shared and not shared & {*own.split()}


def test_a_page_gets_the_style_unescaped(tmp_path, monkeypatch):
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages/__init__.py").touch()
    (tmp_path / "pages/small.html.jinja").write_text("<style>{{ page_style }}</style>{{ text | visible }}")
    monkeypatch.syspath_prepend(tmp_path)
    found = page_template("pages", "small.html.jinja").render(text="<b>\x1b")
    style, text = found.removeprefix("<style>").split("</style>")
    assert style == STYLE.read_text("utf-8") and "< " not in style
    assert text.startswith("&lt;b&gt;") and "\x1b" not in text
