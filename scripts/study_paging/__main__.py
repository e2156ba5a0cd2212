"""The study behind docs/paged-optimizers.md: what paging moves, what it costs, and what it makes possible.

    python -m scripts.study_paging compile [--most 10]        steps of absent cards (bash scripts/setup_gpu_compile.sh)
    python -m scripts.study_paging costs FILE                 what scripts/study_paging/costs.py measured
    python -m scripts.study_paging lengths "NAME=FILE" ...    real rows; names as in lengths.SOURCES
    python -m scripts.study_paging report                     plots, and the tables on standard output

Each part keeps its numbers in docs/paged-optimizers.json, from which `report` makes the rest. What is measured,
compiled, simulated and arithmetic on data sheets stays apart there as in the document.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from scripts.study_paging.lengths import batch_lengths
from scripts.study_paging.memory import Point, compile_point, missing
from scripts.study_paging.report import report

DOCS = Path(__file__).resolve().parents[2] / "docs"
NUMBERS = DOCS / "paged-optimizers.json"


def read() -> dict[str, Any]:
    """The study's numbers so far."""
    return json.loads(NUMBERS.read_text()) if NUMBERS.exists() else {"points": [], "costs": None, "lengths": []}


def write(numbers: dict[str, Any]) -> None:
    """One line a point, so that a changed one is a changed line."""
    parts = [f'"points": [\n{_lines(numbers["points"])}\n]', f'"costs": {json.dumps(numbers["costs"])}']
    parts.append(f'"lengths": [\n{_lines(numbers["lengths"])}\n]')
    NUMBERS.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def _lines(items: list[Any]) -> str:
    return ",\n".join(json.dumps(item) for item in items)


def compile_points(numbers: dict[str, Any], most: int) -> None:
    """Up to `most` of the steps that are not there yet."""
    wanted = list(missing([Point(*point) for point in numbers["points"]]))
    for model, card, remat, length in wanted[:most]:
        numbers["points"].append(list(compile_point(model, card, remat, length)))
        write(numbers)
        print(*numbers["points"][-1], flush=True)
    print(f"{max(0, len(wanted) - most)} left")


def add_lengths(numbers: dict[str, Any], sources: list[str]) -> None:
    """The data sets that are named, in place of what was known of them."""
    for source in sources:
        name, path = source.split("=", 1)
        numbers["lengths"] = [known for known in numbers["lengths"] if known["name"] != name]
        numbers["lengths"].append(batch_lengths(name, Path(path)))
    write(numbers)


def main() -> None:
    """One part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("compile", "costs", "lengths", "report"))
    parser.add_argument("sources", nargs="*", metavar="FILE or NAME=FILE")
    parser.add_argument("--most", type=int, default=10)
    args = parser.parse_args()
    numbers = read()
    if args.part == "compile":
        compile_points(numbers, args.most)
    elif args.part == "costs":
        (file,) = args.sources
        numbers["costs"] = json.loads(Path(file).read_text())
        write(numbers)
    elif args.part == "lengths":
        add_lengths(numbers, args.sources)
    else:
        report(numbers, DOCS)


if __name__ == "__main__":
    main()
