"""Fuzzes the headers of GGUF and safetensors files, guided by coverage (atheris, which is libFuzzer for Python).

    pip install atheris
    python -m scripts.campaign.headers --seconds 1800 --seed 0 --output DIR [--formats gguf safetensors]

Inputs that reach new code stay in DIR/corpus, so that the next piece continues there. Every campaign starts from
scripts/campaign/corpus, to which they can be copied. A line per piece is appended to DIR/headers.jsonl. An error that
is not ours or does not name the file, 5 s or 1 GiB for an input: each is a finding.
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from scripts.campaign.command import commit

FORMATS = ("gguf", "safetensors")
KEPT = Path(__file__).parent / "corpus"
LONGEST = 4096  # bytes of an input
LIMITS = ("-timeout=5", "-rss_limit_mb=2048", "-malloc_limit_mb=1024", f"-max_len={LONGEST}", "-print_final_stats=1")


class Piece(NamedTuple):
    """One stretch of fuzzing."""

    executions: int
    findings: list[str]
    corpus: int


def fuzz(form: str, seconds: int, seed: int, output: Path) -> Piece:
    """Fuzzes one format; inputs that end the process are findings, too, and fuzzing continues after them."""
    corpus, artifacts = output / "corpus" / form, output / "artifacts" / form
    for folder in (corpus, artifacts):
        folder.mkdir(parents=True, exist_ok=True)
    found = output / f"findings-{form}.jsonl"
    before = _findings(found)
    flags = [*LIMITS, f"-max_total_time={seconds}", f"-seed={seed + 1}", f"-artifact_prefix={artifacts}/"]
    arguments = [*flags, str(corpus), str(KEPT / form)]
    command = [sys.executable, "-m", "scripts.campaign.header_target", form, str(found), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    executed = re.search(r"number_of_executed_units: *(\d+)", done.stderr)
    ended = [f"ended the process: {path.name}" for path in artifacts.iterdir()]
    return Piece(
        int(executed[1]) if executed else 0, _findings(found)[len(before) :] + ended, len(list(corpus.iterdir()))
    )


def _findings(path: Path) -> list[str]:
    return [json.loads(line)["finding"] for line in path.read_text().splitlines()] if path.exists() else []


def main(argv: Sequence[str]) -> int:
    """Fuzzes each format; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.campaign.headers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seconds", type=int, default=1800, help="per format")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    args = parser.parse_args(argv)
    version = commit()  # the code that runs, even if the tree changes later
    pieces = {form: fuzz(form, args.seconds, args.seed, args.output) for form in args.formats}
    for form, piece in pieces.items():
        line = {"format": form, "seconds": args.seconds, "seed": args.seed, "commit": version, **piece._asdict()}
        with (args.output / "headers.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        found = "".join(f"\n    {finding}" for finding in piece.findings)
        print(f"headers, {form}: {piece.executions:,} inputs, {len(piece.findings)} findings{found}")
    return int(any(piece.findings for piece in pieces.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
