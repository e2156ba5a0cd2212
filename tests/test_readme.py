"""The README's links lead to files; tests/api/test_docs.py runs its example."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_file_that_the_readme_points_to_exists():
    links = re.findall(r"\]\(([^)#:]+)\)", README) + re.findall(r"bash (scripts/\w+\.sh)", README)
    assert links and not [link for link in links if not (ROOT / link).exists()]
