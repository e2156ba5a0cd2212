"""Writes preference pairs in which the shorter answer is preferred, from the passages of examples/titles.

    python scripts/make_short_answers.py    # writes examples/short_answers/train.jsonl and heldout.jsonl

A pair has one prompt, the title of a passage, and two answers: one sentence of the passage, which is preferred, and two
other neighbouring sentences of it. A draw decides which comes first in the passage, so that only the length differs.
Passages of less than three sentences are left out, and pairs with long answers, or in which the shorter answer has
more than two thirds of the characters of the longer one. The first pairs are held out.
"""

import argparse
import gzip
import json
import random
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SENTENCE_END = re.compile(r"(?<=[a-z)]{3}[.!?])\s+(?=[A-Z])")  # not after initials such as "J." and numbers
MIN_CHARACTERS = 30  # shortest sentence
HELD_OUT = 100  # pairs
MAX_CHARACTERS = 220  # longest answer
MAX_RATIO = 2 / 3  # characters of the shorter answer over those of the longer one


def preference_pair(passage: str, title: str, rng: random.Random) -> dict[str, str] | None:
    """Returns a pair in the format prompt, chosen, rejected; None if the passage does not have one."""
    sentences = SENTENCE_END.split(passage)
    if len(sentences) < 3 or min(map(len, sentences)) < MIN_CHARACTERS:
        return None
    first = rng.randrange(2)
    short, others = (sentences[0], sentences[1:3]) if first else (sentences[2], sentences[:2])
    longer = " ".join(others)
    if len(longer) > MAX_CHARACTERS or len(short) > MAX_RATIO * len(longer):
        return None
    return {"prompt": f"Write about {title}.", "chosen": short, "rejected": longer}


def read_passages(path: Path) -> list[tuple[str, str]]:
    """Returns the (passage, title) of each row of examples/titles."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        conversations = [json.loads(line)["messages"] for line in file]
    return [
        (question["content"].rpartition("\n\n")[0], answer["content"].removeprefix("Title: "))
        for question, answer in conversations
    ]


def main() -> None:
    """Writes the training pairs and the held-out pairs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "examples/short_answers")
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    drawn = [preference_pair(*row, rng) for row in read_passages(ROOT / "examples/titles/train.jsonl.gz")]
    found = [pair for pair in drawn if pair is not None]
    for name, pairs in {"heldout": found[:HELD_OUT], "train": found[HELD_OUT:]}.items():
        lines = [json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs]
        (output / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{output / name}.jsonl: {len(pairs)} pairs")


if __name__ == "__main__":
    main()
