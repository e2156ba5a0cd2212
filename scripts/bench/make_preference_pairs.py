"""Makes preference pairs for preference_pairs.py: the reference answer of a question, and the model's own sample.

    python -m scripts.bench.make_preference_pairs --questions FILE --output pairs.jsonl [--rows 24] [--prompt_share 0.5]

The questions are rows of GSM8K (`question`, `answer`) or of OpenAssistant (`input` with turns that begin with
`### Human:` and `### Assistant:`, `output`). A sample of GSM8K with the right result is not a rejected answer, so the
question is skipped. `--prompt_share` takes the questions whose prompts are nearest to that share of the pair's tokens,
and cuts samples so that the pair has it. Questions whose sample ends much earlier are skipped. Without it, the first
questions are taken.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from qlora_jax import runtime
from qlora_jax.api.generate import generate_text
from qlora_jax.api.load import load
from qlora_jax.data.formats.conversations import GUANACO
from qlora_jax.data.readers.files import read_rows
from qlora_jax.data.tokenizer.template_pipe import Message
from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.untrusted_json import JsonObject
from scripts.bench.support.progress import phases
from scripts.fetch_smollm2 import fetch_smollm2

MIN_ANSWER = 16  # tokens; samples of fewer are hardly answers
LEAST_OF_LIMIT = 0.75  # a sample that ends earlier would leave the prompts a larger share
TEMPERATURE = 1.0
_ROLES = {"Human": "user", "Assistant": "assistant"}
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


class Question(NamedTuple):
    """A question with its reference answer.

    Fields:
      result: the number that the answer ends with; None if only a reader can say what is right.
    """

    prompt: list[Message]
    answer: str
    result: float | None = None


def read_question(row: JsonObject) -> Question:
    """Returns the question of a row of GSM8K or OpenAssistant.

    Raises:
      ValueError: the row has other columns, or its turns do not end with the assistant's.
    """
    if {"question", "answer"} <= row.keys():
        result = _last_number(row["answer"].rpartition("####")[2])
        return Question([{"role": "user", "content": row["question"]}], row["answer"], result)
    if not {"input", "output"} <= row.keys():
        raise ValueError(
            f"questions: found columns {', '.join(row)}, expected question and answer, or input and output"
        )
    _, *parts = GUANACO.split(row["input"])
    spoken = zip(parts[::2], parts[1::2], strict=True)
    turns: list[Message] = [{"role": _ROLES[who], "content": text.strip()} for who, text in spoken]
    if not turns or turns[-1] != {"role": "assistant", "content": ""}:
        raise ValueError("questions: the input has no '### Assistant:' at its end. Add it")
    return Question(turns[:-1], row["output"])


def is_right(question: Question, sample: str) -> bool:
    """Returns True if the last number of a sample is the result of the question."""
    return question.result is not None and _last_number(sample) == question.result


def _last_number(text: str) -> float | None:
    numbers = _NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None


def nearest_to_share(lengths: Sequence[tuple[int, int]], share: float) -> list[int]:
    """Returns the questions from the one whose pair is nearest to the share, if the sample is as long as the answer.

    Args:
      lengths: tokens of the prompt and of the answer of each question.
      share: fraction of the pair's tokens that are prompts; the pair has its prompt twice.
    """
    found = [abs(prompt / (prompt + answer) - share) for prompt, answer in lengths]
    return sorted(range(len(lengths)), key=lambda index: found[index])


def sample_length(prompt: int, answer: int, share: float) -> int:
    """Returns the tokens of a sample with which the prompts have the share of the pair's tokens."""
    return max(round(2 * prompt * (1 - share) / share) - answer, MIN_ANSWER)


def make_pairs(path: str, questions: Sequence[Question], rows: int, share: float | None, most: int) -> Iterator[dict]:
    """Yields preference rows with the model's samples of at most `most` tokens."""
    model, tokenizer = load(path)
    lengths = [_lengths(tokenizer, question) for question in questions]
    order = range(len(questions)) if share is None else nearest_to_share(lengths, share)
    made = 0
    for index in phases("question", order):
        if made == rows:
            return
        question, limit = questions[index], most if share is None else sample_length(*lengths[index], share)
        if limit > most:  # the pair would not have the share
            continue
        sample = generate_text(
            model, tokenizer, question.prompt, max_new_tokens=limit, temperature=TEMPERATURE, seed=index
        ).strip()
        if share is not None and len(tokenizer.encode(sample)) < LEAST_OF_LIMIT * limit:
            continue
        if sample and sample != question.answer.strip() and not is_right(question, sample):
            made += 1
            turns = ({"role": "assistant", "content": text} for text in (question.answer, sample))
            yield {"prompt": question.prompt, "chosen": [next(turns)], "rejected": [next(turns)]}


def _lengths(tokenizer: Tokenizer, question: Question) -> tuple[int, int]:
    asked = tokenizer.encode(tokenizer.render(question.prompt, add_generation_prompt=True))
    return len(asked), len(tokenizer.encode(question.answer))


def main() -> None:
    """Writes the pairs as JSON Lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", required=True, help="JSON Lines of GSM8K or OpenAssistant, gzipped or not")
    parser.add_argument("--output", required=True)
    parser.add_argument("--model", help="a GGUF file or a Hugging Face folder (default: SmolLM2)")
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--prompt_share", type=float, help="share of the prompts in the tokens of padded pairs")
    parser.add_argument("--max_new_tokens", type=int, default=256)
    args = parser.parse_args()
    runtime.start()
    questions = [read_question(row.data) for row in read_rows(args.questions)]
    path = args.model or str(fetch_smollm2())
    made = 0
    with Path(args.output).open("w") as file:
        for row in make_pairs(path, questions, args.rows, args.prompt_share, args.max_new_tokens):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            made += 1
    if made < args.rows:
        sys.exit(
            f"error: {args.output}: found {made} pairs, expected {args.rows}. Give more questions, or fewer --rows"
        )


if __name__ == "__main__":
    main()
