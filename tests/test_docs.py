"""The documentation names files, modules, commands and options that exist."""

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from qlora_jax.__main__ import COMMANDS, module_of
from qlora_jax.config.command_line import ALL, SHORT_NAMES
from qlora_jax.config.parse import walk_settings

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").rglob("README.md")),
    ROOT / "tests/golden/README.md",
]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
# Folders that a page may leave out of a path.
PREFIXES = (
    "",
    "examples/extensions",
    "qlora_jax",
    "pallas_kernels",
    "pallas_kernels/nf4_matmul",
    "qlora_jax/models",
    "tests/e2e",
)
# Files of other projects, and placeholders.
FOREIGN = {
    "convert_lora_to_gguf.py",
    "qlora.py",
    "scripts/finetune_guanaco_7b.sh",
    "FILE.py",
    "counting.py",
    "game.py",
    "families/NAME.py",
    "methods/NAME.py",
}

page = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


def exists(path: str) -> bool:
    """Returns True if a path exists under one of PREFIXES; a bare file name may be anywhere."""
    if any((ROOT / prefix / path).exists() for prefix in PREFIXES):
        return True
    folders = ("qlora_jax", "pallas_kernels", "tests", "scripts")
    return "/" not in path and any(any((ROOT / folder).rglob(path)) for folder in folders)


@page
def test_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert not [link for link in links if "://" not in link and not (page.parent / link).exists()]


@page
def test_source_files_exist(page):
    paths = set(re.findall(r"(?<![\w./*{-])[\w./-]+\.(?:py|sh)\b", page.read_text(encoding="utf-8")))
    assert not [path for path in paths - FOREIGN if not exists(path)]


@page
def test_modules_of_commands_exist(page):
    modules = re.findall(r"python -m ((?:qlora_jax|pallas_kernels|scripts)[\w.]*)", page.read_text(encoding="utf-8"))
    assert not [module for module in modules if importlib.util.find_spec(module) is None]


def commands(path: Path) -> Iterator[list[str]]:
    """Yields the words of each `qlora-jax` command of a page, without `qlora-jax`."""
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in re.findall(r"qlora-jax ([a-z-]+ --?[^`\n]*)", text):
        yield shlex.split(line, comments=True)


@pytest.mark.parametrize("path", [*PAGES, *CONFIGS], ids=lambda path: str(path.relative_to(ROOT)))
def test_options_of_commands_exist(path):
    unknown = []
    for command, *words in commands(path):
        assert command in COMMANDS
        schema = module_of(command).COMMAND
        names = {name for name, *_ in walk_settings(schema.schema)} | {
            *schema.flags,
            *SHORT_NAMES,
            "config",
            "help",
            ALL,
        }
        options = [word.removeprefix("--").partition("=")[0] for word in words if word.startswith("--")]
        unknown += [f"{command} --{option}" for option in options if option not in names]
    assert not unknown
