"""A task with a checkable reward: name the last word of a list.

    python examples/rewards/last_word.py prompts.jsonl held_out.jsonl
    qlora-jax train --objective grpo --reward examples/rewards/last_word.py:last_word --data.train prompts.jsonl ...

Writes 480 prompts to train on and 120 others, each with its answer.
"""

import json
import random
import re
import sys
from pathlib import Path

WORDS = [
    "apple",
    "river",
    "stone",
    "cloud",
    "horse",
    "piano",
    "garden",
    "window",
    "silver",
    "forest",
    "butter",
    "candle",
    "dragon",
    "engine",
    "flower",
    "guitar",
    "hammer",
    "island",
    "jacket",
    "kitten",
    "lemon",
    "market",
    "needle",
    "orange",
    "pencil",
    "rabbit",
    "school",
    "tiger",
    "violin",
    "winter",
    "yellow",
    "zebra",
    "bridge",
    "castle",
    "desert",
]


def last_word(completions, answer, **columns):
    """Returns 1 for a reply whose last word is the answer, otherwise 0."""
    words = [re.findall("[a-z]+", reply.lower())[-1:] for reply in completions]
    return [float(own == [right]) for own, right in zip(words, answer, strict=True)]


def rows(count: int) -> list[dict[str, str]]:
    """Returns so many different prompts with their answers."""
    lists: dict[tuple[str, ...], None] = {}
    generator = random.Random(1)
    while len(lists) < count:
        lists[tuple(generator.sample(WORDS, 3))] = None
    return [
        {"prompt": f"Repeat the last word of this list: {', '.join(words)}", "answer": words[-1]} for words in lists
    ]


if __name__ == "__main__":
    training, held_out = map(Path, sys.argv[1:])
    found = rows(600)
    for path, part in ((training, found[:480]), (held_out, found[480:])):
        path.write_text("".join(json.dumps(row) + "\n" for row in part))
