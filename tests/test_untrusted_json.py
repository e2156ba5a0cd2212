"""Metadata is decoded as its type says, or all of its problems are reported in one error."""

import json
import math
import time
import tracemalloc
from pathlib import Path
from typing import Annotated, NotRequired, TypedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, with_config

from qlora_jax.untrusted_json import MAX_DEPTH, Count, MetadataError, decode_json, find_problems, read_json


class Scaling(TypedDict):
    """Numbers of a rotary scaling."""

    factor: float
    kind: NotRequired[str | None]


@with_config(extra="allow")
class Example(TypedDict, total=False):
    """A model's config."""

    layers: Count
    tied: bool
    stop: int | list[int] | None
    scaling: Scaling | None
    names: dict[str, str]


SOUND = {"layers": 2, "tied": False, "stop": [1, 2], "scaling": {"factor": 8.5}, "names": {"a": "b"}, "new": [None]}


def test_sound_metadata_is_what_the_json_module_gives():
    assert decode_json(json.dumps(SOUND), Example, "config.json") == SOUND
    assert decode_json(json.dumps(SOUND).encode(), dict[str, object], "config.json") == SOUND


def test_numbers_are_not_converted_but_whole_ones_to_floats():
    found = decode_json('{"scaling": {"factor": 8}, "layers": 3}', Example, "c")
    assert type(found["scaling"]["factor"]) is float and type(found["layers"]) is int
    for text in ('{"layers": 3.0}', '{"layers": "3"}', '{"layers": true}', '{"tied": 1}', '{"tied": "true"}'):
        with pytest.raises(MetadataError):
            decode_json(text, Example, "c")


def test_numbers_that_are_not_finite_are_read_as_before():
    found = decode_json("[NaN, Infinity, -Infinity, 1e999]", list[float], "c")
    assert math.isnan(found[0]) and found[1:] == [math.inf, -math.inf, math.inf]


def test_every_problem_is_reported_with_its_key():
    wrong = {
        "layers": 0,
        "tied": 1,
        "stop": "</s>",
        "scaling": {"factor": "x", "kind": 3},
        "names": {"a": 1, "b": "c", "d": None},
    }
    with pytest.raises(MetadataError) as caught:
        decode_json(json.dumps(wrong), Example, "m/config.json")
    assert str(caught.value).splitlines() == [
        "m/config.json: 7 values are wrong. Correct them, or download the file again:",
        "  layers: found 0, expected at least 1",
        "  tied: found 1, expected true or false",
        "  stop: found '</s>', expected a whole number or a list",
        "  scaling.factor: found 'x', expected a number",
        "  scaling.kind: found 3, expected text",
        "  names.a: found 1, expected text",
        "  names.d: found None, expected text",
    ]


def test_one_problem_is_one_line():
    with pytest.raises(MetadataError) as caught:
        decode_json('{"scaling": {}}', Example, "c.json")
    assert str(caught.value) == "c.json: scaling.factor: missing. Correct it, or download the file again."


def test_a_union_reports_the_member_that_got_furthest():
    assert find_problems({"stop": [1, "2"]}, Example, "top") == ["top.stop.1: found '2', expected a whole number"]


def test_many_problems_are_counted_and_long_values_are_shortened():
    with pytest.raises(MetadataError) as caught:
        decode_json(json.dumps({"names": dict.fromkeys(map(str, range(500)), ["x" * 100] * 100)}), Example, "c")
    assert "500 values are wrong" in str(caught.value) and "and 480 more" in str(caught.value)
    assert len(str(caught.value)) < 10_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "c.json, line 1, column 2: not JSON: Expecting property name"),
        ('{\n"a": 1,}', r"c.json, line 2, column \d: not JSON"),
        (b'{"a": "\xff"}', "c.json: not UTF-8 text at byte 7"),
        (b"", "c.json, line 1, column 1: not JSON"),
        (b"\xef\xbb\xbf{}", "c.json, line 1, column 1: not JSON: Unexpected UTF-8 BOM"),
        ("[]", r"c.json: found \[\], expected an object"),
        ("9" * 5000, "c.json: not JSON: Exceeds the limit"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "c.json: keys that occur twice in one object: 'c'"),
    ],
)
def test_content_that_is_not_json(content, message):
    with pytest.raises(MetadataError, match=message):
        decode_json(content, dict[str, object], "c.json")


@pytest.mark.parametrize("opened", ["[", '{"a":', '[{"a":', '["",'])
def test_depth_is_refused_before_decoding(opened, monkeypatch):
    monkeypatch.setattr(json, "loads", lambda *_, **__: pytest.fail("it was decoded"))
    start = time.process_time()
    for text in (opened * 100_000, opened * 100_000 + '"'):
        with pytest.raises(MetadataError, match=r"c.json: nested too deeply \(found more than 200 levels"):
            decode_json(text, object, "c.json")
    assert time.process_time() - start < 1


@pytest.mark.parametrize("text", ['"', "]", "}", "[]", "\\"])
def test_brackets_out_of_order_are_left_to_the_decoder(text):
    with pytest.raises(MetadataError, match="not JSON"):
        decode_json(text * 1000, object, "c.json")


def _levels(value: object) -> int:
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if values is None else 1 + max(map(_levels, values), default=0)


TEXTS = st.text(st.sampled_from('[]{}":\\a\n'), max_size=4)
VALUES = st.recursive(
    TEXTS | st.none(), lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4)
)


@given(value=VALUES, outer=st.integers(MAX_DEPTH - 6, MAX_DEPTH), key=TEXTS)
def test_the_limit_is_exact(value: object, outer: int, key: str):
    for number in range(outer):
        value = [value, key] if number % 2 else {key: value}
    text = json.dumps([value, '"'])
    if _levels(value) + 1 > MAX_DEPTH:
        with pytest.raises(MetadataError, match="nested too deeply"):
            decode_json(text, object, "c")
    else:
        assert decode_json(text, object, "c") == [value, '"']


@given(pairs=st.lists(st.tuples(TEXTS, VALUES), min_size=1, max_size=4), outer=st.lists(TEXTS, max_size=2))
def test_a_repeated_key_is_found_at_any_depth(pairs: list[tuple[str, object]], outer: list[str]):
    items = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in pairs]
    text = "{" + ", ".join(items) + "}"
    value: object = dict(pairs)
    for key in outer:
        text, value = f'[":", {{{json.dumps(key)}: {text}}}]', [":", {key: value}]
    if len(dict(pairs)) < len(pairs):
        with pytest.raises(MetadataError, match="c: keys that occur twice in one object"):
            decode_json(text, object, "c")
    else:
        assert decode_json(text, object, "c") == value


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path):
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(2 << 30)  # a sparse file
    tracemalloc.start()
    with pytest.raises(MetadataError, match=r"config.json: too large for a metadata file \(found 2147483648 bytes"):
        read_json(path, dict[str, object])
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_bounds_are_part_of_a_type():
    ratio = dict[str, Annotated[float, Field(gt=0, le=1)]]
    assert find_problems({"a": 2.0, "b": 0, "c": math.nan, "d": 1}, ratio) == [
        "a: found 2.0, expected at most 1.0",
        "b: found 0, expected more than 0.0",
        "c: found nan, expected at most 1.0",
    ]
