"""Damages differ from case to case, are the same for the same case, and can be written."""

import json
import random

from qlora_jax.io.gguf.header import parse_header
from scripts.campaign.model_files import gguf_bytes
from scripts.campaign.mutations import MAX_TEXT, damage_bytes, damage_json, damage_lines, damage_text

CONFIG = json.dumps({"rank": 4, "scale": 1.5, "targets": ["q", "v"], "rope": {"factor": 8.0, "type": "linear"}})


def test_damage_is_a_function_of_the_case():
    texts = [[damage_json(random.Random(f"0/config/{n}"), CONFIG) for n in range(300)] for _ in range(2)]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 200 and CONFIG.encode() not in texts[0][:50]


def test_damage_covers_depth_size_types_and_invalid_json():
    texts = [damage_json(random.Random(n), CONFIG) for n in range(3000)]
    assert any(text.count(b"[") > 50_000 for text in texts)
    assert any(b"NaN" in text for text in texts) and any(len(text) > 100_000 for text in texts)
    assert any(b'"rank": "' in text for text in texts) and any(b'"targets": {' in text for text in texts)
    assert sum(not _is_json(text) for text in texts) > 100


def test_a_large_text_is_not_repeated_beyond_a_limit():
    large = json.dumps({"text": "x" * (MAX_TEXT // 4)})
    assert max(len(damage_json(random.Random(n), large)) for n in range(60)) < 2 * MAX_TEXT


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def test_bytes_and_texts_of_any_length_are_damaged():
    for number in range(500):
        chance = random.Random(number)
        assert isinstance(damage_bytes(chance, bytes(number % 20)), bytes)
        assert isinstance(damage_text(chance, ["a", "b"][: number % 3], ["{{"]), str)


def test_undamaged_values_are_a_gguf_file(tmp_path):
    metadata = {
        "general.architecture": "llama",
        "n": 3,
        "big": 2**40,
        "less": -1,
        "f": 0.5,
        "on": True,
        "list": ["a", "b"],
    }
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf_bytes(metadata, [{"name": "t", "shape": [8], "type": 0, "offset": 0}], bytes(32), 0))
    header = parse_header(path)
    assert dict(header.metadata) == metadata
    assert [(info.name, info.shape) for info in header.tensors] == [("t", (8,))]


def test_every_damage_of_lines_occurs_and_most_change_the_file(tmp_path):
    path, sound = tmp_path / "lines", b"one\ntwo\nthree\nfour\n"
    found = {}
    for number in range(300):
        path.write_bytes(sound)
        way = damage_lines(random.Random(number), path)
        found.setdefault(way, set()).add(path.read_bytes() if path.exists() else None)
    assert found["lines: missing"] == {None} and found["lines: empty"] == {b""} and len(found) == 8
    assert all(len(results - {sound}) >= 4 for results in (*found.values(),) if len(results) > 1)
    assert {content.count(b"\n") for content in found["lines: line break"]} == {3}
    assert all(sorted(content) == sorted(sound) for content in found["lines: swapped"])
