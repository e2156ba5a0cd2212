"""Runs the study behind docs/paged-optimizers.md: the moves of paging, its cost, and its effect on the longest row.

    python -m scripts.study_paging compile [--most 10]        compile steps (bash scripts/setup_gpu_compile.sh)
    python -m scripts.study_paging costs FILE                 store the output of scripts.study_paging.costs
    python -m scripts.study_paging lengths "NAME=FILE" ...    measure real rows; names of lengths.SOURCES
    python -m scripts.study_paging report                     write the plots, print the tables

Each part stores its numbers in docs/paged-optimizers.json, from which `report` makes plots and tables. Measured,
compiled and simulated numbers, and arithmetic on data sheets, are kept apart as in the document.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from scripts.study_paging.lengths import batch_lengths
from scripts.study_paging.memory import Point, compile_point, missing
from scripts.study_paging.report import Numbers, report

DOCS = Path(__file__).resolve().parents[2] / "docs"
NUMBERS = DOCS / "paged-optimizers.json"


def read() -> Numbers:
    """Returns the stored numbers of the study."""
    return json.loads(NUMBERS.read_text())


def write(numbers: Numbers) -> None:
    """Writes one line per point, so that a changed point is a changed line."""
    parts = [f'"points": [\n{_lines(numbers["points"])}\n]', f'"costs": {json.dumps(numbers["costs"])}']
    parts.append(f'"lengths": [\n{_lines(numbers["lengths"])}\n]')
    NUMBERS.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def _lines(items: Sequence[object]) -> str:
    return ",\n".join(json.dumps(item) for item in items)


def add_lengths(numbers: Numbers, sources: list[str]) -> None:
    """Measures and stores the data sets, given as NAME=FILE; replaces earlier entries."""
    for source in sources:
        name, path = source.split("=", 1)
        numbers["lengths"] = [known for known in numbers["lengths"] if known["name"] != name]
        numbers["lengths"].append(batch_lengths(name, Path(path)))
    write(numbers)


def main() -> None:
    """Runs one part of the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("compile", "costs", "lengths", "report"))
    parser.add_argument("sources", nargs="*", metavar="FILE or NAME=FILE")
    parser.add_argument("--most", type=int, default=10)
    args = parser.parse_args()
    numbers = read()
    if args.part == "compile":
        wanted = list(missing([Point(*point) for point in numbers["points"]]))
        for model, card, remat, length in wanted[: args.most]:
            numbers["points"].append(list(compile_point(model, card, remat, length)))
            write(numbers)
            print(*numbers["points"][-1], flush=True)
        print(f"{max(0, len(wanted) - args.most)} left")
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
