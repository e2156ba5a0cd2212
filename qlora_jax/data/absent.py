"""What was probably meant where a file of rows is not there."""

import difflib
from pathlib import Path


def what_was_meant(path: Path) -> str:
    """The end of a message about a name that is no file's: one beside it, or how such a source is written."""
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    # What follows the dot is alike in most names, and half of a short one.
    if near := difflib.get_close_matches(path.name, siblings, n=1, cutoff=0.85):
        return f"; did you mean {path.parent / near[0]}?"
    if str(path).startswith(("http:", "https:")):
        return "; addresses are not fetched, give a file, or hf://datasets/org/name for a data set on the Hub"
    if "," in str(path):
        return "; several files are given with weights: {a.jsonl: 1, b.jsonl: 1}"
    return "" if path.suffix else "; a data set on the Hub is given as hf://datasets/org/name"
