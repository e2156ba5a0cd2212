"""Settings of a tournament: short forms, and errors that name the setting."""

import pytest

from qlora_jax.config import ConfigError
from qlora_jax.studies.tournament.judges.registry import BUILDERS
from qlora_jax.studies.tournament.settings import (
    JUDGE_SETTINGS,
    RecordedRepliesArgs,
    SystemArgs,
    judge_settings,
    system_settings,
)
from tests.studies.tournament.tiny_tournament import arena_args

ENDPOINT = {"kind": "endpoint", "url": "http://localhost/v1", "model": "m", "prompts": "p"}


def test_a_path_stands_for_settings():
    assert system_settings("runs/mine") == SystemArgs(path="runs/mine")
    assert system_settings({"replies": "x.jsonl"}) == RecordedRepliesArgs(replies="x.jsonl")
    assert system_settings({"path": "m", "top_p": 0.9, "raw": True}) == SystemArgs(path="m", top_p=0.9, raw=True)


def test_every_kind_of_judge_has_settings_and_a_builder():
    assert BUILDERS.keys() == JUDGE_SETTINGS.keys()
    assert judge_settings(ENDPOINT).temperature == 0.2
    assert judge_settings(ENDPOINT).max_tokens == 1024


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({}, r"systems, judges: found neither"),
        ({"systems": {"a": "x", "b": "y"}}, r"prompts: missing, because there are systems"),
        ({"systems": {"a": "x"}, "prompts": "p"}, r"systems: found 1 \(a\), expected 2 or more"),
        ({"systems": {"../a": "x", "b": "y"}, "prompts": "p"}, r"systems.\.\./a: not a name for a file"),
        ({"systems": {"a": {"path": "x", "topp": 1}, "b": "y"}, "prompts": "p"}, r"systems.a.topp: unknown setting"),
        (
            {"systems": {"a": {"path": "x", "top_p": 2}, "b": "y"}, "prompts": "p"},
            r"systems.a.top_p: found 2, expected",
        ),
        ({"judges": {"j": {"kind": "gpt"}}}, r"judges.j.kind: found 'gpt', expected one of endpoint, model, verdicts"),
        ({"judges": {"j": {"kind": "verdicts"}}}, r"judges.j.path: missing"),
        ({"judges": {"j": {"kind": "person"}}}, r"judges.j: a judge of kind person needs replies"),
        ({"judges": {"j": ENDPOINT | {"url": "file:///x"}}}, r"judges.j.url: found .*expected an address that begins"),
    ],
)
def test_wrong_settings_are_named(tmp_path, settings, problem):
    with pytest.raises(ConfigError, match=problem):
        arena_args(**{"output": str(tmp_path / "arena")} | settings)
