"""Makes examples/titles from BoolQ: a Wikipedia passage without its title, and the title as the answer.

    python scripts/make_title_data.py boolq_labelled.jsonl.gz examples/titles

The source holds lines {"question", "passage", "label"}; a passage begins "Title -- text".
"""

import argparse
import gzip
import json
import random
from pathlib import Path

QUESTION = "What is the title of this article?"
HELD_OUT = 400
SHORTEST, LONGEST = 100, 600  # characters of a passage, both excluded


def read_passages(path: Path) -> dict[str, str]:
    """Title -> passage, the first one of each title, of those neither too short nor too long."""
    passages: dict[str, str] = {}
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            title, separator, passage = json.loads(line)["passage"].partition(" -- ")
            if separator and SHORTEST < len(passage) < LONGEST:
                passages.setdefault(title, passage)
    return passages


def split(passages: dict[str, str]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(train, held out): no title and no passage is on both sides."""
    pairs = list(passages.items())
    random.Random(0).shuffle(pairs)
    held_out = pairs[:HELD_OUT]
    seen = {passage for _, passage in held_out}
    return [pair for pair in pairs[HELD_OUT:] if pair[1] not in seen], held_out


def to_lines(pairs: list[tuple[str, str]]) -> bytes:
    """One conversation a line."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{passage}\n\n{QUESTION}"},
                {"role": "assistant", "content": f"Title: {title}"},
            ]
        }
        for title, passage in pairs
    ]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def main() -> None:
    """Writes train.jsonl.gz and heldout.jsonl; the same source gives the same rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    train, held_out = split(read_passages(args.source))
    args.folder.mkdir(parents=True, exist_ok=True)
    (args.folder / "train.jsonl.gz").write_bytes(gzip.compress(to_lines(train), mtime=0))
    (args.folder / "heldout.jsonl").write_bytes(to_lines(held_out))
    print(f"{len(train)} rows to train on, {len(held_out)} held out, in {args.folder}")


if __name__ == "__main__":
    main()
