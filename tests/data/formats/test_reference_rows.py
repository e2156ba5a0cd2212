"""Every format against rows that artidoro/qlora's own mappings and collator made (tests/golden/make_rows.py)."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qlora_jax.config.suggestions import CHOICES
from qlora_jax.data.encoder import check_rows, encode_rows, expand_examples, make_encoder
from qlora_jax.data.formats.detect import detect_format
from qlora_jax.data.formats.registry import FORMATS
from qlora_jax.data.readers.files import Place, Row, read_rows
from qlora_jax.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from qlora_jax.data.truncation import LengthLimits, fit_lengths

GOLDEN = json.loads((Path(__file__).parents[2] / "golden/reference_rows.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def with_bos(smollm2_json: str) -> Tokenizer:
    return load_tokenizer({"tokenizer_json": smollm2_json, "add_bos_token": True, **GOLDEN["special"]})


def examples(name: str) -> tuple[list[Row], Any]:
    rows = [Row(Place(n + 1, n), columns) for n, columns in enumerate(GOLDEN["forms"][name]["rows"])]
    row_format = FORMATS[CHOICES.get(name, name)]
    check_rows("rows.jsonl", rows, row_format)
    found, row_format = expand_examples(rows, row_format)
    return list(found), row_format


@pytest.mark.parametrize("name", GOLDEN["forms"])
def test_prompts_and_answers_are_the_references(name: str):
    rows, row_format = examples(name)
    made = [row_format.plain(row.data) for row in rows]
    ours = [
        {key: "".join(s.text for s in row if s.supervised == (key == "output")) for key in ("input", "output")}
        for row in made
    ]
    assert ours == [{key: pair[key] for key in ("input", "output")} for pair in GOLDEN["forms"][name]["pairs"]]


@pytest.mark.parametrize("name", GOLDEN["forms"])
@pytest.mark.parametrize("which", range(len(GOLDEN["limits"])))
def test_ids_and_labels_are_the_references(with_bos: Tokenizer, name: str, which: int):
    """Also with separate lengths, where a long answer loses its eos, and with training on the source."""
    source, target, on_source = GOLDEN["limits"][which]
    rows, row_format = examples(name)
    learn = "all" if on_source else "assistant"
    encoder, problems = make_encoder(row_format, with_bos, learn, one_answer=True), []
    texts = encoder.segment_rows(rows, problems)
    places, encoded = encoder.mask_rows(texts, encoder.encode_texts(texts), problems)
    assert problems == [] and len(encoded) == len(rows)
    limits = LengthLimits(max_length=source + target, overlong="error", source=source, target=target)
    fitted = fit_lengths(encoded, places, limits)
    for ours, theirs in zip(fitted.rows, GOLDEN["forms"][name]["tokens"][which], strict=True):
        assert ours.ids.tolist() == theirs["ids"]
        # No position predicts the first label.
        labels = np.where(ours.supervised, ours.ids, -100)[1:]
        assert labels.tolist() == theirs["labels"][1:]


def pairs(form_name: str, row: dict[str, Any]) -> list[tuple[str, str]]:
    """(prompt, answer) of each example of one row, for a model without a template."""
    rows = [Row(Place(1, 0), row)]
    check_rows("rows.jsonl", rows, FORMATS[form_name])
    found, row_format = expand_examples(rows, FORMATS[form_name])
    assert row_format.plain is not None
    prompts = [row_format.plain(example.data) for example in found]
    return [(prompt.text, answer.text) for prompt, answer in prompts]


def expected(*pairs: dict[str, str]) -> list[tuple[str, str]]:
    return [(pair["input"], pair["output"]) for pair in pairs]


def test_instances_of_seed_tasks_are_the_references_alpaca_rows():
    golden = GOLDEN["forms"]["alpaca"]
    for row, pair in zip(golden["rows"], golden["pairs"], strict=True):
        instance = {"input": row["input"], "output": row["output"]}
        task = {"id": "seed_task_0", "instruction": row["instruction"], "instances": [instance, instance]}
        assert pairs("seed-tasks", task) == expected(pair, pair)


def test_reformulations_are_examples_as_instances_are():
    (row,), theirs = (
        GOLDEN["forms"]["unnatural-instructions"]["rows"],
        GOLDEN["forms"]["unnatural-instructions"]["pairs"],
    )
    first, second = row["instances"]
    full = {**row, "instances": [first], "reformulations": [second]}
    assert pairs("unnatural-instructions-full", full) == expected(*theirs)
    assert pairs("unnatural-instructions", full) == expected(theirs[0])
    for none in ({}, {"reformulations": None}, {"reformulations": []}):
        assert pairs("unnatural-instructions-full", {**row, **none}) == expected(*theirs)


def test_seed_tasks_of_self_instruct(local_data, with_bos: Tokenizer):
    path = str(local_data("seed_tasks.jsonl.gz"))
    rows = read_rows(path)
    row_format = detect_format(path, rows)
    check_rows(path, rows, row_format)
    found, row_format = expand_examples(rows, row_format)
    assert (row_format.name, len(found)) == ("seed-tasks", 175)
    for row, encoded in zip(found, encode_rows(path, found, row_format, with_bos), strict=True):
        assert with_bos.decode(encoded.ids[encoded.supervised].tolist()) == row.data["output"] + "<|im_end|>"


def test_the_goldens_cut_something():
    """Otherwise the test above would not test lengths."""
    whole, short = (sum(len(row["ids"]) for row in GOLDEN["forms"]["alpaca"]["tokens"][n]) for n in (0, 1))
    assert short < whole
