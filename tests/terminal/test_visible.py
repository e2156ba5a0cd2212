"""Text for terminals: no control character is left, JSON keeps its value, and URLs lose their passwords."""

import json
import unicodedata

import pytest

from qlora_jax.terminal.visible import visible, visible_json, without_passwords

# Characters that terminals obey: C0 and C1 controls, overrides of the direction of text, and lone surrogates.
OBEYED = [
    character
    for character in map(chr, range(0x11_0000))
    if unicodedata.category(character) in ("Cc", "Cs")
    or unicodedata.bidirectional(character)
    in {
        *("LRE", "RLE", "LRO", "RLO", "PDF"),
        *("LRI", "RLI", "FSI", "PDI"),
    }
]


def test_no_obeyed_character_is_left_but_line_ends_and_tabs():
    left = [character for character in OBEYED if character in visible(character)]
    assert left == ["\t", "\n"]


def test_pictures_and_numbers_stand_for_them():
    shown = visible("a\u202eb\u2066c\x1b[31m\x1b]52;c;eA==\x07\r\x08\x7f\x85\ud800\tline\n")
    assert shown == "a<U+202E>b<U+2066>c␛[31m␛]52;c;eA==␇␍␈␡��\tline\n"


@pytest.mark.parametrize("text", ["日本語, Ünïcödé, العربية, עברית, 👩‍👩‍👧, é", "a\nb\tc", "[red]x[/red] :warning:"])
def test_other_text_stays(text):
    assert visible(text) == visible_json(text) == text


def test_json_keeps_its_value_and_has_no_control_character():
    text = " ".join(OBEYED) + "ä"  # JSON joins the escapes of neighbouring surrogates
    line = json.dumps({"reply": text}, ensure_ascii=False)
    shown = visible_json(line)
    assert json.loads(shown) == json.loads(line) == {"reply": text}
    assert not set(OBEYED) & set(shown) and "ä" in shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://ann:secret@hub.example/org/name", "https://***@hub.example/org/name"),
        ("http://secret@127.0.0.1:9 does not answer", "http://***@127.0.0.1:9 does not answer"),
        ("proxy socks5://a:p@ss@host:1 and ftp://b:q@c/d@e", "proxy socks5://***@host:1 and ftp://***@c/d@e"),
        ("https://hub.example/org/name@main", "https://hub.example/org/name@main"),
        ("hf://datasets/org/name@v1?split=train", "hf://datasets/org/name@v1?split=train"),
        ("https://hub.example?mail=a@b.c", "https://hub.example?mail=a@b.c"),
        ("org/name@main, ann@example.org", "org/name@main, ann@example.org"),
    ],
)
def test_passwords_of_urls_are_hidden(text, shown):
    assert without_passwords(text) == shown
