"""load_dataset: from settings to batches, mixtures, and the example data."""

import dataclasses
import gzip
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qlora_jax.data.readers.files import read_rows
from qlora_jax.data.report.text import report_lines
from qlora_jax.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from tests.data.loading import load, question

ROOT = Path(__file__).parents[2]


def test_settings_become_batches(tokenizer: Tokenizer, write_rows: Callable):
    path = write_rows([question(number) for number in range(10)])
    dataset = load(tokenizer, train=path)
    assert dataset.steps_per_epoch == 3 and dataset.eval is None and list(dataset.eval_batches(4)) == []
    batch = next(dataset.train_batches())
    assert batch.inputs.shape == (2, 2, 64)
    supervised = batch.targets[0, 0][batch.weights[0, 0] == 1]
    assert tokenizer.decode(supervised.tolist()) == "yes<|im_end|>"
    assert dataset.train.where(int(batch.rows[0, 0, 0])) == f"{path}:{batch.rows[0, 0, 0] + 1}"


def test_equal_fingerprints_mean_equal_batches(tokenizer: Tokenizer, write_rows: Callable):
    path = write_rows([question(number) for number in range(10)])
    dataset = load(tokenizer, train=path)
    assert dataset.fingerprint == load(tokenizer, train=path).fingerprint
    changed = write_rows([question(number, "no" if number == 9 else "yes") for number in range(10)], "changed.jsonl")
    others = [
        load(tokenizer, train=changed),
        dataclasses.replace(dataset, seed=1),
        dataclasses.replace(dataset, accumulation=4),
        dataclasses.replace(dataset, packed=True),
    ]
    assert len({dataset.fingerprint, *(other.fingerprint for other in others)}) == 5


def test_the_split_of_a_step_into_micro_batches_changes_neither_fingerprint_nor_rows(
    tokenizer: Tokenizer, write_rows: Callable
):
    dataset = load(tokenizer, train=write_rows([question(number) for number in range(10)]))
    other = dataclasses.replace(dataset, accumulation=1, micro_batch_size=4)
    assert other.fingerprint == dataset.fingerprint
    for _, a, b in zip(range(4), dataset.train_batches(), other.train_batches(), strict=False):
        assert (a.position, a.rows.ravel().tolist()) == (b.position, b.rows.ravel().tolist())
    assert dataset.fingerprint_of_split(2, 2) != other.fingerprint_of_split(1, 4)


def test_earlier_fingerprints_of_known_rows_never_change(tokenizer: Tokenizer, write_rows: Callable):
    dataset = load(tokenizer, train=write_rows([question(number) for number in range(10)]))
    order = ((64,), False, 2, 2, dataset.seed)  # as earlier versions hashed it
    expected = hashlib.sha256(repr((order, dataset.train.digest)).encode()).hexdigest()
    assert dataset.fingerprint_of_split(2, 2) == expected


def test_the_digest_of_known_rows_never_changes(tokenizer: Tokenizer, write_rows: Callable):
    """A run resumes only with the digest in its checkpoint, which another version may have written."""
    turns = [{"role": "user", "content": "Is 7 odd?"}, {"role": "assistant", "content": "Yes."}]
    rows = {"pairs": [question(number) for number in range(10)], "chats": [{"messages": turns}] * 3}
    digests = [load(tokenizer, train=write_rows(found, f"{name}.jsonl")).train.digest for name, found in rows.items()]
    assert [digest[:16] for digest in digests] == ["f78949acd0d55a9c", "0d3ae5290bd137fb"]


def test_settings_that_rows_do_not_fit_are_told(tokenizer: Tokenizer, plain_tokenizer: Tokenizer, write_rows: Callable):
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant")]
    path = write_rows([question(1), question(2)])
    twice = write_rows([{"messages": turns * 2}, {"messages": turns}], "twice.jsonl")
    with pytest.raises(
        ValueError, match=r"1 of 2 rows(.|\n)*:1: found 2 answers, expected one: data\.source_max_length"
    ):
        load(tokenizer, train=twice, source_max_length=64, target_max_length=64)
    for row_format, rows in (("text", [{"text": "a"}]), ("guanaco", [{"text": "### Human: Q### Assistant: A"}])):
        with pytest.raises(ValueError, match=r"1 of 1 rows(.|\n)*without turns, so data\.learn last"):
            load(plain_tokenizer, train=write_rows(rows, "text.jsonl"), format=row_format, learn="last")
    assert load(plain_tokenizer, train=path, learn="last").report.train.supervised == 4
    learned = load(plain_tokenizer, train=path, learn="all").report.train
    assert learned.supervised == learned.tokens


def test_bos_is_counted(smollm2_source: dict, templates: dict, write_rows: Callable):
    path = write_rows([question(1), {"prompt": "<|endoftext|><|endoftext|>Q", "completion": "A"}])
    named = {**smollm2_source, "bos_token": "<|endoftext|>", "add_bos_token": True}
    report = load(load_tokenizer({**named, "chat_template": None}), train=path).report.train
    assert (report.doubled_bos, report.without_bos) == (1, 0)
    # The model's own template writes none, so none is added, and the report counts such rows.
    report = load(load_tokenizer(named), train=path).report.train
    assert (report.doubled_bos, report.without_bos) == (0, 2)
    report = load(load_tokenizer({**named, "chat_template": templates["llama3"]}), train=path).report.train
    assert (report.doubled_bos, report.without_bos) == (0, 0)


def test_a_row_may_hold_several_examples(tokenizer: Tokenizer, write_rows: Callable):
    instances = [{"instruction_with_input": f"Is {n} odd?", "output": "yes"} for n in (1, 3)]
    path = write_rows([{"instruction": "Odd?", "instances": instances}, {"instances": instances[:1]}])
    dataset = load(tokenizer, train=path)
    assert [dataset.train.where(n) for n in range(3)] == [f"{path}:1", f"{path}:1 (row 2)", f"{path}:2 (row 3)"]
    assert (dataset.report.train.form, dataset.report.train.ignored_columns) == (
        "unnatural-instructions",
        ("instruction",),
    )
    broken = write_rows(
        [{"instances": [{"output": "x"}, {"instruction_with_input": " ", "output": 3}]}], "broken.jsonl"
    )
    with pytest.raises(
        ValueError, match=r"instance 0: needs .* found 'output'; instance 1: .* is empty; instance 1: out"
    ):
        load(tokenizer, train=broken)


def test_a_template_of_ones_own(tokenizer: Tokenizer, write_rows: Callable, tmp_path: Path):
    (tmp_path / "own.jinja").write_text("{% for m in messages %}{{ m.role + ':' + m.content + eos_token }}{% endfor %}")
    dataset = load(tokenizer, train=write_rows([question(1)]), chat_template=str(tmp_path / "own.jinja"))
    assert dataset.tokenizer.decode(dataset.train.row(0)[0].tolist()) == (
        "user:Is 1 odd?<|im_end|>assistant:yes<|im_end|>"
    )


PAIRS = [{"prompt": f"Is {n} odd?", "completion": "yes", "more": None} for n in range(5)]


def test_files_are_mixed_and_reported_each(tokenizer: Tokenizer, write_rows: Callable):
    guanaco = write_rows([{"text": f"### Human: {n}### Assistant: yes, yes"} for n in range(4)], "guanaco.jsonl")
    pairs = write_rows(PAIRS, "pairs.jsonl")
    dataset = load(tokenizer, train={pairs: 2.0, guanaco: 0.5}, format={guanaco: "guanaco"})
    assert len(dataset.train) == 12 and dataset.steps_per_epoch == 3
    assert dataset.report.train.kept == 9 and dataset.report.train.path == f"{pairs}, {guanaco}"
    told = [value for name, value in report_lines(dataset.report) if name == "source"]
    assert told == [
        f"{pairs}, format completion: 5 rows, weight 2, 71.4% of the supervised targets; columns not used: more",
        f"{guanaco}, format guanaco: 4 rows, weight 0.5, 28.6% of the supervised targets",
    ]
    assert dataset.train.where(5) == f"{guanaco}:1"
    other = load(tokenizer, train={pairs: 2.0, guanaco: 1.0}, format={guanaco: "guanaco"})
    assert dataset.fingerprint != other.fingerprint


def test_titles_ship_with_a_clean_split(tokenizer: Tokenizer):
    folder = ROOT / "examples/titles"
    train, held = read_rows(folder / "train.jsonl.gz"), read_rows(folder / "heldout.jsonl")
    assert (len(train), len(held)) == (4978, 400)
    for turn in (0, 1):
        sides = [{row.data["messages"][turn]["content"] for row in side} for side in (train, held)]
        assert not sides[0] & sides[1]
    titles = [row.data["messages"][1]["content"] for row in (*train, *held)]
    assert all(title.startswith("Title: ") for title in titles) and len(set(titles)) == 5378


def test_titles_load(tokenizer: Tokenizer, tmp_path: Path):
    some = gzip.decompress((ROOT / "examples/titles/train.jsonl.gz").read_bytes()).splitlines(keepends=True)[:300]
    (tmp_path / "some.jsonl").write_bytes(b"".join(some))
    dataset = load(tokenizer, train=str(tmp_path / "some.jsonl"), eval=str(ROOT / "examples/titles/heldout.jsonl"))
    assert (dataset.report.train.cut, dataset.report.train.lossy, dataset.report.train.special_text) == (0, 0, 0)
    for index, line in enumerate(some[:50]):
        ids, supervised = dataset.train.row(index)
        answer = json.loads(line)["messages"][1]["content"]
        assert tokenizer.decode(ids[supervised].tolist()) == answer + "<|im_end|>"
    assert np.unique(dataset.train.numbers).size == 300


def test_the_shipped_multiple_choice_questions_are_whole():
    rows = read_rows(ROOT / "examples/multiple_choice/openbookqa_500.jsonl.gz")
    assert len(rows) == 500
    assert all(row.data["answer"] in row.data["options"].split("\n") for row in rows)


def test_data_needs_no_jax():
    code = "import sys, qlora_jax.data.dataset, qlora_jax.data.report.text; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("settings", [{}, {"cache": True}, {"cache": True, "window": 4}])
def test_ids_beyond_the_embedding_are_errors(
    tokenizer: Tokenizer, write_rows: Callable, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """In memory, from a cache that was written for a larger embedding, and in windows of it."""
    path = write_rows([question(number) for number in range(8)] + [question(9, tokenizer.decode([49000]))])
    if settings:
        settings = {**settings, "cache": str(tmp_path / "cache")}
        load(tokenizer, train=path, **settings)
    ids = np.concatenate([load(tokenizer, train=path).train.row(index)[0] for index in range(9)])
    load(dataclasses.replace(tokenizer, rows=int(ids.max()) + 1), train=path, **settings)
    with pytest.raises(
        ValueError, match=rf"rows\.jsonl:9: an id has no row in the model's embedding .found {ids.max()}, expected 0 to"
    ):
        dataset = load(dataclasses.replace(tokenizer, rows=int(ids.max())), train=path, **settings)
        list(zip(range(20), dataset.train_batches(), strict=False))
