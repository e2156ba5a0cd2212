"""Patterns mean what they mean to Python's re, and none of them takes long."""

import re
import time

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from qlora_jax.regex import (
    PatternError,
    file_pattern_problems,
    last_match,
    matches_end,
    matches_whole,
    pattern_problems,
    text_pattern_problems,
)
from qlora_jax.training.time_limit import finishes_within

NAMES = [
    *(f"model.layers.{layer}.self_attn.{name}_proj" for layer in (0, 3, 11) for name in "qkvo"),
    *(f"model.layers.{layer}.mlp.{name}_proj" for layer in (0, 12) for name in ("gate", "up", "down")),
    *("gpt_neox.layers.1.attention.query_key_value", "model.layers.2.mlp.fc1", "lm_head", ""),
]
ATOMS = [
    "model",
    "layers",
    "proj",
    "q",
    "mlp",
    "_",
    "a",
    "1",
    r"\d",
    r"\w",
    r"\.",
    ".",
    "[qkv]",
    "[^.]",
    "[0-9a-f_]",
    "^",
    "$",
]
ATOMS += [r"\b", r"\A", "(?:q|k)", "up", "down", r"\S", r"\D", r"\W", "[]a]", "[a-]", "fc1"]
PATTERNS = st.recursive(
    st.sampled_from(ATOMS),
    lambda inner: (
        st.lists(inner, min_size=1, max_size=4).map("".join)
        | st.lists(inner, min_size=2, max_size=3).map(lambda parts: f"({'|'.join(parts)})")
        | st.tuples(inner, st.sampled_from(["*", "+", "?", "*?", "+?", "??", "{1,3}", "{2}", "{0,2}", "{1,}"])).map(
            lambda parts: f"(?:{parts[0]}){parts[1]}"
        )
    ),
    max_leaves=8,
)


@given(pattern=PATTERNS)
@example(pattern=r"(?:(?:(?:\w|[^.])+)+)+q\d")
def test_ordinary_patterns_match_what_re_and_peft_match(pattern: str):
    expected = []
    # Python's engine would take hours for some nested repetitions.
    assume(finishes_within(1, lambda: expected.extend(_matches_of_re(pattern))))
    assert [(matches_whole(pattern, name), matches_end(pattern, name)) for name in NAMES] == expected


def _matches_of_re(pattern: str) -> list[tuple[bool, bool]]:
    whole, end = re.compile(pattern), re.compile(rf"(.*\.)?({pattern})$")
    return [(whole.fullmatch(name) is not None, end.match(name) is not None) for name in NAMES]


TEXT_ATOMS = st.sampled_from(
    [
        *"aé3٣ #",
        "\\d",
        "\\w",
        "\\s",
        "\\D",
        "\\W",
        "\\S",
        "[\\w.]",
        "[^\\d]",
        "[\\s,]",
        "[]a]",
        "[^]a]",
        "[\\D]",
        "\\$",
        "[$]",
        ".",
    ]
)
TEXT_PATTERNS = st.recursive(
    TEXT_ATOMS,
    lambda inner: (
        st.lists(inner, min_size=1, max_size=4).map("".join)
        | inner.map(lambda part: f"({part})")
        | st.lists(inner, min_size=2, max_size=3).map(lambda parts: f"(?:{'|'.join(parts)})")
        | st.tuples(TEXT_ATOMS, st.sampled_from(["*", "+", "?", "*?", "+?", "{1,3}"])).map("".join)
    ),
    max_leaves=6,
)
ENDS = st.sampled_from(["", "$", "\\Z"])
TEXTS = st.text("aé3٣ #$.,]\n\r\t\x0b\x1c\x85\xa0\u2028\u3000答Ⅷ²_-", max_size=12)


@given(start=st.sampled_from(["", "^", "(?i)", "(?m)", "(?s)"]), pattern=TEXT_PATTERNS, end=ENDS, text=TEXTS)
@example(start="", pattern="(\\w+)", end="$", text="答\n")
def test_the_last_match_in_any_text_is_that_of_re(start: str, pattern: str, end: str, text: str):
    expected = [[match.group(), *match.groups()] for match in re.finditer(start + pattern + end, text)]
    assume(all(match[0] for match in expected))  # after an empty match, RE2 continues elsewhere
    assume(not (end == "$" and len(expected) > 1 and expected[-1][0] == "\n"))  # it belongs to the match before
    found = last_match(start + pattern + end, text)
    if not expected or found is None:
        assert not expected and found is None
        return
    whole, *groups = found
    assert groups == expected[-1][1:]
    assert whole == expected[-1][0] or (end == "$" and whole == expected[-1][0] + "\n")


def test_a_class_that_re2_cannot_negate_is_refused():
    assert text_pattern_problems(r"[\W_]") == [
        r"not supported in a pattern: \W in a class of characters. Write it outside of one"
    ]
    assert not text_pattern_problems(r"\W|_")


@pytest.mark.parametrize(
    "pattern",
    [r"(([a-z_.0-9]+)+)+!", r"(.*)*x\d", r"(a|aa)+b$", "(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)!", "(?:(?:.?)*)*!"],
)
def test_no_pattern_takes_exponential_time(pattern: str):
    start = time.process_time()
    for name in NAMES:
        assert not matches_end(pattern, name + "a" * 200)
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", "not a regular expression: missing \\)"),
        ("*", "not a regular expression: nothing to repeat"),
        ("a)|(b", "not a regular expression: unbalanced parenthesis"),
        ("(?=q).*", "a lookahead"),
        ("(?!q).*", "a negative lookahead"),
        (".*(?<=q)", "a lookbehind"),
        (".*(?<!q)", "a lookbehind"),
        (r"(q)\1", "a backreference"),
        ("(?P<a>q)(?P=a)", "a backreference"),
        ("(q)?(?(1)a|b)", "a conditional group"),
        ("(?>a)b", "an atomic group"),
        ("a++", "a possessive quantifier"),
        ("a{1001}", "a repetition of more than 1000"),
        ("a{,3}", r"write \{0,n\}"),
        ("[[:alpha:]]", "in a class of characters"),
        ("((a{100}){100}){100}", "not supported in a pattern"),
        ("a" * 2001, "too long for a pattern"),
        ("\ud83d", "half of a surrogate pair"),
        ("(" * 900 + ")" * 900, "not a regular expression|not supported"),
        ("a{99999999999999999999}", "not a regular expression: the repetition number is too large"),
    ],
)
def test_patterns_that_are_refused_by_name(pattern: str, message: str, capfd: pytest.CaptureFixture[str]):
    start = time.process_time()
    with pytest.raises(PatternError, match=message):
        matches_whole(pattern, "q")
    assert len(pattern_problems(pattern)) == 1 and not pattern_problems("q")
    assert time.process_time() - start < 1
    assert capfd.readouterr() == ("", "")  # RE2 logs to standard error unless it is asked not to


WIDE = "(?i)" + "[\u0100-\U0010ffff]" * 390  # Python's compiler takes two seconds for it


def test_a_pattern_is_not_compiled_by_python(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(re, "compile", pytest.fail)
    assert not pattern_problems(WIDE) and not matches_whole(WIDE, "q")


def test_the_patterns_of_a_file_share_a_budget():
    large = ["[a-z]{1000}" * 100 + str(number) for number in range(30)]
    (problem,) = file_pattern_problems({"rank_pattern": ["q_proj"], "alpha_pattern": large})
    assert problem.startswith("alpha_pattern: the file's patterns are too large (found more than 2,000,000")
    names = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(2_000)]
    assert not file_pattern_problems({"rank_pattern": names})


def test_a_message_lists_the_first_of_many_broken_patterns():
    problems = file_pattern_problems({"rank_pattern": [f"({number}" for number in range(10_000)]})
    assert len(problems) == 20 and problems[0].startswith("rank_pattern: '(0': not a regular expression: missing )")
