"""Checks prose: docstrings open with a verb or a noun, and phrases that readers stumble over are absent."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CODE = ("qlora_jax", "pallas_kernels", "scripts", "tests")
PROSE = ("docs", "examples", "configs")

# A docstring opens with a verb or with the noun that is returned, never with one of these.
BAD_OPENINGS = ("Of", "As", "With", "What", "Which", "Whether", "How", "Likewise", "Where", "From", "Who")

# A comment after code opens with a phrase that stands by itself, never with one that continues the code's name.
BAD_TRAILING = re.compile(r"(?:of|whose|(?:in|to|with|for|by|at|on|from) which|those of|that of) ")

# pattern -> the plain form
STUMBLES = {
    r"\bis no (?!longer\b|more than\b|less than\b)[a-z]+": "is not a ...",
    r"\bare no (?!longer\b|more than\b|less than\b)[a-z]+": "are not ...",
    r"\b(?:is|are|was|were|be|been) told\b": "is reported, is printed, is given",
    r"\b(?:tells|told) (?:what|which|how|that|of|whether|where)\b": "says, reports, prints",
    r"\b(?:tokens|rows|bytes|steps|bits|bit|operations|seconds|batches|compilations) an? "
    r"(?:second|row|step|token|layer|weight|page|epoch|parameter|element|block|run|call|position)\b": "per step",
    r"\bgoes on (?!top|the|a )": "continues, resumes",
    r"\bwent on\b": "continued, resumed",
    r"\bof its own\b": "separate, own",
    r"\bas \w+ has (?:it|them)\b": "as in ..., in the format of ...",
    r"\b(?:can|could) not\b": "cannot",
    r"(?:^|[.:;] )What (?!if\b)[^?\n]*[^?]$": "a sentence with an actor; no headless What",
    r"\brefused by name\b": "raises an error that names it",
    r"\bat the most\b": "at most",
    r"\bone after the other\b": "in order",
    r"\bto the bit what\b": "bit-identical to",
    r"\bis there already\b": "exists",
    r"\bbeforehand\b": "before",
    r"\blikewise\b": "also, the same",
    r"\bnames of columns\b": "column names",
    r"\bone behind the other\b": "concatenated",
    r"\b(?:divides?|divisible) by (?:the number of |the |its )?devices\b": "a multiple of the number of devices",
    r"\bthereof\b|\btherein\b|\bwherein\b": "plain words",
}
# Texts that are data, and stay: figures depend on the prompt of scripts/bench/decode.py, and the split of the rows of
# tests/e2e/project.py on their words.
DATA = ("What follows is a short account of how such towers", "a much longer word that fills another bucket")
PATTERNS = {re.compile(pattern, re.IGNORECASE | re.MULTILINE): plain for pattern, plain in STUMBLES.items()}


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, text) of every docstring."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=True)
            if text:
                yield node.body[0].lineno, text


def strings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, text) of every string literal, docstrings included; parts of an f-string one by one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def comments(source: str) -> Iterator[tuple[int, str]]:
    """(line, text) of every comment."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string.lstrip("# ")


def trailing_fragments(source: str) -> Iterator[int]:
    """Lines whose comment after code is a fragment, such as `WIDTH = 120  # of tables`."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        after_code = token.line[: token.start[1]].strip()
        if token.type == tokenize.COMMENT and after_code and BAD_TRAILING.match(token.string.lstrip("# ")):
            yield token.start[0]


def stumbles(text: str) -> Iterator[str]:
    """The phrases of a text that match STUMBLES, with their plain form; none for DATA."""
    if any(data in text for data in DATA):
        return
    for pattern, plain in PATTERNS.items():
        for match in pattern.finditer(text):
            yield f"{match.group().strip()!r}: write {plain}"


def problems_of_code(path: Path) -> list[str]:
    """Bad openings of docstrings, and stumbles in docstrings, comments and other strings of a Python file."""
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    found = [
        f"{path}:{line}: docstring opens with {text.split()[0]!r}"
        for line, text in docstrings(tree)
        if text.split()[0].rstrip(",:") in BAD_OPENINGS
    ]
    found += [f"{path}:{line}: the comment continues the code" for line in trailing_fragments(source)]
    texts = [*strings(tree), *comments(source)]
    return found + [f"{path}:{line}: {problem}" for line, text in texts for problem in stumbles(text)]


def problems_of_prose(path: Path) -> list[str]:
    """Stumbles in a Markdown or YAML file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [f"{path}:{number}: {problem}" for number, line in enumerate(lines, 1) for problem in stumbles(line)]


def files() -> Iterator[Path]:
    """Every file whose prose is checked; this one quotes the phrases, so it is left out."""
    for folder in CODE:
        yield from (path for path in sorted((ROOT / folder).rglob("*.py")) if path != Path(__file__).resolve())
    for folder in PROSE:
        yield from sorted([*(ROOT / folder).rglob("*.md"), *(ROOT / folder).rglob("*.yaml")])
    yield ROOT / "README.md"


def problems(path: Path) -> list[str]:
    """All problems of one file."""
    return (problems_of_code if path.suffix == ".py" else problems_of_prose)(path)


def test_prose_is_plain():
    found = [problem.replace(f"{ROOT}/", "") for path in files() for problem in problems(path)]
    assert not found, f"{len(found)} places:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ('"""Of pages on the device."""', 1),
        ('"""Sharding of device pages."""', 0),
        ("# a GGUF file is no folder", 1),
        ("x = 'micro-batches: 4 rows a step'", 1),
        ('"""The bytes per step."""', 0),
        ("WIDTH = 120  # of tables", 1),
        ("WIDTH = 120  # columns of a table", 0),
    ],
)
def test_stumbles_are_found(tmp_path, source, count):
    path = tmp_path / "module.py"
    path.write_text(source + "\n")
    assert len(problems(path)) == count
