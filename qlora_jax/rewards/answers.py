"""Ready-made rewards that look at the text or the length of a reply."""

from collections.abc import Sequence

from qlora_jax.answer_text import extract_answer
from qlora_jax.regex import last_match

Completion = str | Sequence[dict[str, str]]
_NUMBER = r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)"


def text_of(completion: Completion) -> str:
    """Returns the text of a reply: in a conversation, that of its last message."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def exact(
    completions: Sequence[Completion], answer: Sequence[object], answer_pattern: str | None = None, **columns: object
) -> list[float | Exception]:
    """1 if the reply is the answer, or one of a list of answers."""
    return _are_right(completions, answer, answer_pattern, "exact")


def number(
    completions: Sequence[Completion], answer: Sequence[object], answer_pattern: str | None = None, **columns: object
) -> list[float | Exception]:
    """1 if the last number of the reply equals the last number of the answer: "$1,000.00" is 1000."""
    return _are_right(completions, answer, answer_pattern or _NUMBER, "number")


def _are_right(
    completions: Sequence[Completion], answers: Sequence[object], pattern: str | None, match: str
) -> list[float | Exception]:
    rewards: list[float | Exception] = []
    for completion, given in zip(completions, answers, strict=True):
        texts = [str(each) for each in (given if isinstance(given, list) else [given])]
        right = {extract_answer(text, pattern, match) or extract_answer(text, None, match) for text in texts}
        if match == "number" and not all(text and last_match(_NUMBER, text) for text in right):
            rewards.append(ValueError(f"found the answer {given!r}, expected a number"))
        else:
            rewards.append(float(extract_answer(text_of(completion), pattern, match) in right))
    return rewards


def regex(completions: Sequence[Completion], pattern: str | Sequence[str], **columns: object) -> list[float]:
    """1 if the pattern occurs in the reply; the pattern is a setting, or a column."""
    patterns = [pattern] * len(completions) if isinstance(pattern, str) else pattern
    texts = map(text_of, completions)
    return [float(last_match(each, text) is not None) for text, each in zip(texts, patterns, strict=True)]


def length(
    completion_ids: Sequence[Sequence[int]], max_completion_len: int, soft_punish_cache: int = 0, **columns: object
) -> list[float]:
    """0, falling to -1 over the last `soft_punish_cache` tokens up to `max_completion_len` (Yu et al. 2025, DAPO)."""
    over = [len(ids) - (max_completion_len - soft_punish_cache) for ids in completion_ids]
    return [0.0 if each <= 0 else -1.0 if each > soft_punish_cache else -each / soft_punish_cache for each in over]
