"""A ready-made reward: the score of a task of reasoning-gym (extra `reasoning-gym`)."""

from collections.abc import Sequence

from qlora_jax.data.readers.reasoning_gym_rows import open_task
from qlora_jax.regex import last_match
from qlora_jax.rewards.answers import Completion, text_of
from qlora_jax.untrusted_json import JsonObject

_TAGS = r"(?s)<answer>(.*?)</answer>"  # as the package's own prompts ask for


def reasoning_gym(
    completions: Sequence[Completion],
    question: Sequence[str],
    answer: Sequence[str | None],
    metadata: Sequence[JsonObject],
    reasoning_gym: Sequence[str],
    answer_pattern: str | None = None,
    **columns: object,
) -> list[float]:
    """The score of the answer in the last `<answer>` tags, or in a match of the pattern; else of the whole reply."""
    scores = []
    for completion, asked, right, more, address in zip(
        completions, question, answer, metadata, reasoning_gym, strict=True
    ):
        entry = {"question": asked, "answer": right, "metadata": more}
        found = _answer(text_of(completion), answer_pattern or _TAGS)
        scores.append(float(open_task(address).score_answer(found, entry)))
    return scores


def _answer(text: str, pattern: str) -> str:
    """Returns the first group of the pattern's last match; the whole text without a match."""
    found = last_match(pattern, text)
    if found is None:
        return text.strip()
    whole, *groups = found
    return next((group for group in groups if group is not None), whole or "").strip()
