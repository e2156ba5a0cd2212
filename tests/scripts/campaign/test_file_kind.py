"""Verdicts on damaged files: only our one error, or the sound result, passes."""

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_jax.line_digests import warn_without_digests
from scripts.campaign.file_kind import FileKind, judge_message
from scripts.campaign.ledger import FAILURES, Case


def _write(folder: Path) -> None:
    (folder / "x.json").write_text('{"rank": 4}')


def _damage(chance: random.Random, folder: Path) -> str:
    (folder / "x.json").write_text('{"rank": "5"}')
    return "rank"


def _kind(read: Callable[[Path], list[object]]) -> FileKind:
    return FileKind(write=_write, damage=_damage, read=read)


def _refuses(folder: Path) -> list[object]:
    rank = json.loads((folder / "x.json").read_text())["rank"]
    if not isinstance(rank, int):
        raise ValueError(f"{folder / 'x.json'}: rank: not a number (found {rank!r})")
    return [rank]


def _nameless(folder: Path) -> list[object]:
    rank = json.loads((folder / "x.json").read_text())["rank"]
    if not isinstance(rank, int):
        raise ValueError("not a number")
    return [rank]


def _broken(folder: Path) -> list[object]:
    return [json.loads((folder / "x.json").read_text())["rank"] + 1]


def _accepts(folder: Path) -> list[object]:
    return [int(json.loads((folder / "x.json").read_text())["rank"])]


def _warns(folder: Path) -> list[object]:
    if (folder / "x.json").read_text() != '{"rank": 4}':
        warn_without_digests(folder)
    return _accepts(folder)


CASES = {
    "refused": _kind(_refuses),
    "unclear": _kind(_nameless),
    "traceback": _kind(_broken),
    "other": _kind(_accepts),
    "silent": dataclasses.replace(_kind(_accepts), digested=True),
    "warned": dataclasses.replace(_kind(_warns), digested=True),
    "same": _kind(lambda folder: [1]),
}


@pytest.mark.parametrize("outcome", CASES)
def test_each_outcome(tmp_path: Path, outcome: str):
    sound = tmp_path / "sound"
    sound.mkdir()
    kind = CASES[outcome]
    kind.write_sound(sound)
    verdict = kind.start(sound, tmp_path)(Case("planted", 0, 0))
    assert verdict.outcome == outcome
    assert "rank" in verdict.detail
    assert (outcome in FAILURES) == (outcome in ("unclear", "traceback", "silent"))


def test_a_variant_is_compared_with_its_own_sound_files(tmp_path: Path):
    def write(folder: Path) -> None:
        for rank in range(3):
            (folder / f"rank-{rank}").mkdir()
            (folder / f"rank-{rank}" / "x.json").write_text(f'{{"rank": {rank}}}')

    def damage(chance: random.Random, folder: Path) -> str:
        (path,) = folder.iterdir()  # other variants are not copied
        path.write_text(path.read_text() + " ")
        return path.read_text()

    sound = tmp_path / "sound"
    sound.mkdir()
    write(sound)
    kind = FileKind(write=write, damage=damage, read=_accepts, variants=True, digested=True)
    run = kind.start(sound, tmp_path)
    verdicts = [run(Case("planted", 0, number)) for number in range(20)]
    assert {verdict.outcome for verdict in verdicts} == {"same"}
    assert {verdict.detail for verdict in verdicts} == {f' | rank-{n}: {{"rank": {n}}} ' for n in range(3)}


@pytest.mark.parametrize(
    ("message", "outcome"),
    [
        ("error: lora.rank: not a number. Give one\n", "unclear"),  # such a word may stand in a library's error
        ("error: /case/x.json: damaged\n", "refused"),
        ("error: Expecting value: line 1\n", "unclear"),
        ("error: /case/x.json: found \x1b[31mred\n", "unclear"),
        ("error: /case/x.json: " + "x" * 30_000, "unclear"),
    ],
)
def test_messages_name_a_file_or_key_and_are_fit_for_a_terminal(message: str, outcome: str):
    assert judge_message(message, Path("/case"), None).outcome == outcome
