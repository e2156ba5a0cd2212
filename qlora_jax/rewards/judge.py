"""A ready-made reward: the score that a model behind an OpenAI-compatible endpoint gives."""

import concurrent.futures
import re
import threading
from collections.abc import Sequence
from pathlib import Path

from qlora_jax.openai_client import Endpoint, RequestFailed, ask_repeatedly, complete, read_key
from qlora_jax.rewards.answers import Completion, text_of

AT_ONCE = 8  # requests
WAITS = (1.0, 4.0)  # seconds before each further attempt
MAX_TOKENS = 1024  # Reviews are short
SYSTEM = "You are a careful and impartial judge of answers."
MESSAGE = (
    "[Conversation]\n{prompt}\n\n[Answer]\n{completion}\n\n[Task]\nJudge how helpful, correct and complete the answer "
    "is. Explain briefly. Then write a last line `Score: N`, where N is a number from 0 (useless) to 10 (perfect)."
)
_SCORE = re.compile(r"Score:\W*(\d+(?:\.\d+)?)")


def judge(
    prompts: Sequence[Completion],
    completions: Sequence[Completion],
    judge_url: str,
    judge_model: str,
    judge_prompt: str | None = None,
    judge_key_variable: str | None = None,
    judge_timeout: float = 30.0,
    **columns: object,
) -> list[float | Exception]:
    """A tenth of the judge's score. A judge that is down is asked no more."""
    key = read_key(judge_key_variable, "rewards.judge_key_variable")
    endpoint = Endpoint(judge_url, judge_model, key, judge_timeout)
    template = MESSAGE if judge_prompt is None else Path(judge_prompt).read_text(encoding="utf-8")
    down = threading.Event()

    def ask(prompt: Completion, completion: Completion) -> float | Exception:
        texts = {"prompt": _conversation(prompt), "completion": text_of(completion)}
        message = re.sub(r"\{(prompt|completion)\}", lambda found: texts[found[1]], template)
        try:
            return _score(_review(endpoint, message, down))
        except (RequestFailed, ValueError) as error:
            if isinstance(error, RequestFailed) and (error.retry or error.refused):
                down.set()
            return ValueError(f"{judge_model}: {error}")

    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        return [*pool.map(ask, prompts, completions)]


def _review(endpoint: Endpoint, message: str, down: threading.Event) -> str:
    if down.is_set():
        raise ValueError("not asked, because the judge did not reply before")
    how = {"temperature": 0.0, "max_tokens": MAX_TOKENS}
    return ask_repeatedly(lambda: complete(endpoint, SYSTEM, message, **how), WAITS, down)


def _score(review: str) -> float:
    scores = [float(found) for found in _SCORE.findall(review)]
    if not scores or scores[-1] > 10:
        raise ValueError(f"found no score from 0 to 10 in the review, which ends with {review[-60:]!r}")
    return scores[-1] / 10


def _conversation(prompt: Completion) -> str:
    return prompt if isinstance(prompt, str) else "\n\n".join(f"{each['role']}: {each['content']}" for each in prompt)
