"""Writes the training rows of configs/studies/data_quality.yaml: few right titles, and many, right or partly wrong.

    python scripts/make_noisy_titles.py    # writes runs/data_quality/rows/

Rows are the first of examples/titles/train.jsonl.gz. In the file with wrong titles, every row whose hash says so has
the title of the next such row. So the titles, their lengths and the passages are those of the right rows.
"""

import argparse
import copy
import gzip
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FEW, MANY = 75, 600
WRONG = 0.3
SEARCH_ROWS = 100

Row = dict[str, Any]  # as in JSON: {"messages": [...]}


def is_wrong(row: Row) -> bool:
    """Returns True for a share WRONG of all rows, by a hash of the passage."""
    digest = hashlib.sha256(row["messages"][0]["content"].encode()).digest()
    return int.from_bytes(digest[:8], "big") < WRONG * 2**64


def with_wrong_titles(rows: Sequence[Row]) -> list[Row]:
    """Returns the rows; those that are wrong have the title of the next of them."""
    chosen = [index for index, row in enumerate(rows) if is_wrong(row)]
    changed = copy.deepcopy([*rows])
    for index, donor in zip(chosen, [*chosen[1:], *chosen[:1]], strict=True):
        changed[index]["messages"][-1]["content"] = rows[donor]["messages"][-1]["content"]
    return changed


def main() -> None:
    """Writes a file per size and kind, and the rows of the search."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/data_quality/rows"))
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    with gzip.open(ROOT / "examples/titles/train.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    files = {
        f"right_{FEW}": rows[:FEW],
        f"right_{MANY}": rows[:MANY],
        f"wrong_{MANY}": with_wrong_titles(rows[:MANY]),
        "search": rows[MANY : MANY + SEARCH_ROWS],
    }
    for name, made in files.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in made]
        (output / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    print(f"wrote {output}: {', '.join(path.name for path in sorted(output.iterdir()))}")


if __name__ == "__main__":
    main()
