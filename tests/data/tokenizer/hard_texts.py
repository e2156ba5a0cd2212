"""Texts that tokenizers disagree about, by class. They are a function of the seed alone."""

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool>", "<s>", "</s>", "<unk>", "<bos>", "<start_of_turn>")
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_SCRIPTS = {
    "arabic": "ابتثجحخدذرزسشصضطظعغفقكلمنهويىةءؤئ١٢٣٤٥٬؟،ًَُِّْـ",
    "chinese": "中文字符测试数据模型训练的是不了人我在有他这为之大来以个到说们"
    "\uff0c。\uff01\uff1f、\uff1b\uff1a“”\uff08\uff09《》",
    "japanese": "ひらがなカタカナ日本語漢字々ー・「」、。",
    "korean": "한국어말씨가나다라마바사아자차카타파하",
    "cyrillic": "абвгдежзийклмнопрстуфхцчшщъыьэюяАБВГДЕЖЗИЙ",
    "greek": "αβγδεζηθικλμνξοπρςστυφχψωΑΒΓΔΕΖΗΘάέήίόύώΐΰ",
    "hebrew": "אבגדהוזחטיכךלמםנןסעפףצץקרשתּוֹ",
    "hindi": "अआइईउऊएऐओऔकखगघचछजझटठडढतथदधनपफबभमयरलवशषसहािीुूेैोौं्१२३।",
    "thai": "กขคงจฉชซญฎฏฐณดตถทธนบปผฝพฟภมยรลวศษสหอฮะาิีึืุูเแโใไ่้๊๋๑๒๓",
    "latin": "éèêëàâäïîôöùûüÿçñßæœøåłžščřőűİı\u017fﬁﬂ",
}
_SPACES = ("\t", "\n", "\r", "\r\n", " ", "\v", "\f", "\x85", "\xa0", "\u2003", "\u2028", "\u2029", "\u3000", "\u202f")
_EMOJI = (
    "👍",
    "👍🏽",
    "👩‍👩‍👧‍👦",
    "🏳️‍🌈",
    "🇩🇪",
    "🇯🇵🇫",
    "❤️",
    "☃",
    "1️⃣",
    "👨🏿‍🚀",
    "🫠",
    "©",
    "™",
    "🀄",
    "\u200d",
    "\ufe0f",
)
_MARKS = "\u0300\u0301\u0303\u0308\u0323\u0327\u0338\u20d2\u3099\u0345"
_CODE = (
    "def f(x):", "return", "if x == 1:", "    ", "        ", "\t", "\n", "\n\n", "    for i in range(10):", "# todo",
    "{'a': [1, 2]}", "x += 0x1F", "self._y", "->", "!=", "=====", "//", "/* */", "printf(\"%d\\n\", i);", "};", "<div>",
    "@dataclass", "lambda: None", "  ", "\r\n", "a.b.c()", "---", "***", "```python\n", "$HOME/.x", "\\frac{1}{2}",
)  # fmt: skip
_WORDS = (
    "I'll",
    "they'VE",
    "'S",
    "don\u2019t",
    "camelCase",
    "HTTPServer",
    "x1y2",
    "naïve",
    "e.g.",
    "U.S.",
    "re-use",
    "'\u017f",
)
_NUMBERS = (
    "0",
    "12",
    "345",
    "6789",
    "1234567",
    "3.14",
    "1,000",
    "٤٥٦",
    "\uff11\uff12\uff13",
    "²",
    "½",
    "Ⅷ",
    "१२",
    "1e-5",
    "0x1F",
    "\u3007",
)


class HardText(NamedTuple):
    """A text and the class that it was made for."""

    kind: str
    text: str


def _spaces(draw: random.Random) -> str:
    longest = draw.choice((4, 8, 31, 70))
    return "".join(" " * draw.randint(0, longest) + draw.choice("ab.,;(\n1") for _ in range(draw.randint(1, 5)))


def _join(items: Sequence[str], longest: int) -> Callable[[random.Random], str]:
    return lambda draw: "".join(draw.choices(items, k=draw.randint(1, longest)))


def _lines(draw: random.Random) -> str:
    return "".join(
        draw.choice(("x", "Y", "7", "", "", "", "")) + draw.choice(_SPACES) for _ in range(draw.randint(1, 12))
    )


def _scripts(draw: random.Random) -> str:
    letters = [_SCRIPTS[name] for name in draw.choices(sorted(_SCRIPTS), k=draw.randint(1, 3))]
    words = ["".join(draw.choices(draw.choice(letters), k=draw.randint(1, 9))) for _ in range(draw.randint(1, 7))]
    return draw.choice((" ", "", "  ", "\n", "-")).join(words)


def _one_script(name: str) -> Callable[[random.Random], str]:
    def text(draw: random.Random) -> str:
        return " ".join("".join(draw.choices(_SCRIPTS[name], k=draw.randint(1, 9))) for _ in range(draw.randint(1, 7)))

    return text


def _control(draw: random.Random) -> str:
    found = [chr(draw.choice((draw.randrange(0x20), draw.randrange(0x7F, 0xA1)))) for _ in range(draw.randint(1, 8))]
    found += draw.choices(
        ("\x00", "\x1b[31m", "\ufeff", "\u200b", "\u202e", "\u2066", "\ufffd", "ab", " ", "\U000e0001"), k=4
    )
    draw.shuffle(found)
    return "".join(found)


def _combining(draw: random.Random) -> str:
    pieces = (*"aeiounAEkがは", "é", "Å", "ế", "한", "\u1112\u1161\u11ab", "Ω", " ", "q")
    return "".join(draw.choice(pieces) + "".join(draw.choices(_MARKS, k=draw.randint(0, 3))) for _ in range(8))


def _special(draw: random.Random) -> str:
    cut = [token[: draw.randint(1, len(token))] for token in SPECIAL]
    pieces = (*SPECIAL, *cut, " ", "  ", "\n", "a", "user", "<", ">", "|", "<0x0A>", "[PAD]", "▁", "▁▁", "\u0120")
    return "".join(draw.choices(pieces, k=draw.randint(1, 8)))


def _long(draw: random.Random) -> str:
    unit = draw.choice((draw.choice(_LETTERS), "ab", "=", "-", "ha", "中", "\n", "é", "👍", "1", "\t", "xyz.", "' "))
    pattern = "".join(draw.choices(_LETTERS, k=400)) if draw.random() < 0.3 else unit * draw.randint(60, 400)
    return draw.choice(("", " ", "a ")) + pattern


def _any(draw: random.Random) -> str:
    planes = ((0x20, 0x7F), (0xA0, 0x2000), (0x2000, 0x3100), (0x3100, 0xD800), (0xE000, 0x10000), (0x10000, 0x30000))
    return "".join(chr(draw.randrange(*draw.choice(planes))) for _ in range(draw.randint(1, 20)))


_KINDS: dict[str, Callable[[random.Random], str]] = {
    "spaces": _spaces,
    "lines": _lines,
    "code": _join(_CODE, 12),
    "digits": _join((*_NUMBERS, " ", "  ", "\n", "x", "-"), 10),
    "emoji": _join((*_EMOJI, " ", "ok", "5", "\n"), 8),
    "arabic": _one_script("arabic"),
    "chinese": _one_script("chinese"),
    "scripts": _scripts,
    "control": _control,
    "combining": _combining,
    "special": _special,
    "long": _long,
    "words": _join((*_WORDS, " ", " the", ". ", "\n", " A"), 10),
    "any": _any,
}


def hard_texts(count: int, seed: int = 0) -> list[HardText]:
    """Returns `count` texts: the empty one, then all classes in turn, and mixtures of them."""
    draw, names = random.Random(seed), [*_KINDS, "mixed"]
    found = [HardText("empty", "")]
    for index in range(count - 1):
        name = names[index % len(names)]
        chosen = draw.choices(sorted(_KINDS), k=draw.randint(2, 5)) if name == "mixed" else [name]
        found.append(HardText(name, "".join(_KINDS[one](draw) for one in chosen)))
    return found
