"""Finds the answer in a text, and compares it as question answering does."""

import collections
import decimal
import re
import string
from collections.abc import Callable

from qlora_jax.regex import last_match

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)")


def normalize_words(text: str) -> str:
    """Returns the text in lower case without ASCII punctuation and articles, its words one space apart.

    SQuAD, Natural Questions and TriviaQA compare answers so (Rajpurkar et al. 2016).
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def normalize_number(text: str) -> str:
    """Returns a number without dollar signs, commas, a final full stop and zeros that add nothing; other text as it is.

    "$1,000.00" and "1000." become "1000".
    """
    bare = re.sub(r"[$,\s]", "", text).removesuffix(".")
    if not _NUMBER.fullmatch(bare):
        return text
    with decimal.localcontext(prec=len(bare)):
        return f"{decimal.Decimal(bare).normalize() + 0:f}"


NORMALIZE: dict[str, Callable[[str], str]] = {
    "exact": lambda text: text,
    "words": normalize_words,
    "number": normalize_number,
}


def extract_answer(text: str, pattern: str | None, match: str = "exact") -> str | None:
    """Finds the answer in a text, in the form in which it is compared.

    Without a pattern that is the whole text, without surrounding white space. With one, it is the pattern's last match:
    its first group that matched, or all of it if it has no groups. White space around it, commas between thousands and
    a final full stop are removed. Returns None if nothing matches.

    Args:
      match: a name in NORMALIZE.
    """
    normalize = NORMALIZE[match]
    if pattern is None:
        return normalize(text.strip())
    found = last_match(pattern, text)
    if found is None:
        return None
    whole, *groups = found
    answer = next((group for group in groups if group is not None), whole) or ""
    return normalize(_THOUSANDS.sub("", answer.strip()).removesuffix("."))


def contains_words(reply: str, answer: str) -> bool:
    """Returns True if the words of a normalized answer follow one another in a normalized reply."""
    return bool(answer) and f" {answer} " in f" {reply} "


def words_f1(reply: str, answer: str) -> float:
    """Returns the harmonic mean of precision and recall of the words of a normalized reply, repeats included."""
    found, expected = reply.split(), answer.split()
    common = (collections.Counter(found) & collections.Counter(expected)).total()
    return 2 * common / (len(found) + len(expected)) if found and expected else float(reply == answer)
