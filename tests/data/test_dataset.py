"""load_dataset: from settings to batches, mixtures, and the example data."""

import dataclasses
import gzip
import hashlib
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qlora_jax.config.schema import DataArgs
from qlora_jax.data.batching.packing import NO_ROW, Batch
from qlora_jax.data.dataset import Dataset, load_dataset
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


def pair(number: int) -> dict[str, str]:
    return {"prompt": f"Is {number} odd?" + " Think." * (number % 5), "chosen": " yes" * 9, "rejected": f" no {number}"}


def labelled(number: int) -> dict[str, Any]:
    answer = " no" * (1 + number % 4)
    return {"prompt": f"Is {number} odd?" + " Think." * (number % 5), "completion": answer, "label": number % 2 == 1}


def epoch_of(dataset: Dataset) -> list[Batch]:
    return list(itertools.islice(dataset.train_batches(), dataset.steps_per_epoch))


def sequences_of(batches: Iterable[Batch]) -> dict[int, list[list[int]]]:
    """The inputs of each sequence of a row with two, by the row's number."""
    found = {}
    for batch in batches:
        for at in np.ndindex(*batch.inputs.shape[:2]):
            for nth, number in enumerate(batch.rows[at][batch.rows[at] != NO_ROW]):
                slots = (2 * nth, 2 * nth + 1)
                found[int(number)] = [batch.inputs[at][batch.sequences[at] == slot].tolist() for slot in slots]
    return found


def test_pairs_become_trees_with_slots(plain_tokenizer: Tokenizer, write_rows: Callable):
    path = write_rows([pair(number) for number in range(21)])
    dataset = load(plain_tokenizer, "dpo", train=path, eval_fraction=0.3)
    assert dataset.sequences == 2 and dataset.branching and dataset.labels == ()
    found = sequences_of(epoch_of(dataset)) | sequences_of(dataset.eval_batches(4))
    assert sorted(found) == list(range(21))
    for number, (chosen, rejected) in found.items():
        # Both begin with the prompt's last id; the last id is only a target.
        answers = [plain_tokenizer.decode(ids[1:]) for ids in (chosen, rejected)]
        assert answers == [" yes" * 9, f" no {number}"]
        assert chosen[0] == rejected[0]


def test_packs_and_buckets_hold_a_tree_that_is_longer_than_max_length(plain_tokenizer: Tokenizer, write_rows: Callable):
    long = {"prompt": "Q?", "chosen": " yes" * 55, "rejected": " no" * 55}
    path = write_rows([pair(1), long])
    for packing in (False, True):
        dataset = load(plain_tokenizer, "dpo", train=path, max_length=64, packing=packing)
        assert dataset.train.lengths.max() > 64 and dataset.buckets[-1] == 128
        assert len(sequences_of(epoch_of(dataset))) == 2


@pytest.mark.slow
def test_kl_pairs_depend_neither_on_packing_nor_on_batches_nor_on_memory(
    tokenizer: Tokenizer, write_rows: Callable, tmp_path: Path
):
    path = write_rows([labelled(number) for number in range(30)])
    common = {"train": path, "max_length": 64}
    plain = load(tokenizer, "kto", kl_pairs=True, **common)
    expected = sequences_of(epoch_of(plain))
    assert len(expected) == 30 and plain.sequences == 2
    cache = {"cache": str(tmp_path / "cache")}
    for settings in ({"packing": True}, cache, {**cache, "window": 7}, {**cache, "window": 11, "packing": True}):
        other = load(tokenizer, "kto", kl_pairs=True, **common, **settings)
        assert sequences_of(epoch_of(other)) == expected, settings
        assert sequences_of(other.each_row_once(3)) == expected
        for batch in other.each_row_once(3):
            labels = np.where(batch.rows[0] == NO_ROW, 0, batch.rows[0] % 2)
            np.testing.assert_array_equal(batch.slots["labels"][0], np.repeat(labels, 2, axis=1))
    # Other seeds give other pairs; apo_zero_unpaired has none.
    settings = {"micro_batch_size": 1, "accumulation": 1, "objective": "kto"}
    again = load_dataset(DataArgs(**common), tokenizer, seed=0, kl_pairs=True, **settings)
    assert sequences_of(epoch_of(again)) == expected
    seeds = [load_dataset(DataArgs(**common), tokenizer, seed=seed, kl_pairs=True, **settings) for seed in range(3)]
    assert len({dataset.fingerprint for dataset in seeds}) == 3
    assert len({str(sequences_of(epoch_of(dataset))) for dataset in seeds}) == 3
    unpaired = load_dataset(DataArgs(**common), tokenizer, seed=0, **settings)
    assert unpaired.sequences == 1 and not unpaired.branching


def test_a_file_of_one_labelled_row_is_refused(tokenizer: Tokenizer, write_rows: Callable):
    path = write_rows([labelled(1)])
    with pytest.raises(ValueError, match=r"found 1 row, expected at least 2.*apo_zero_unpaired"):
        load(tokenizer, "kto", kl_pairs=True, train=path)
    assert load(tokenizer, "kto", train=path).sequences == 1


@pytest.mark.parametrize("settings", [{}, {"cache": True, "window": 8}])
def test_attached_values_are_in_the_slots_of_their_rows(
    tokenizer: Tokenizer, write_rows: Callable, tmp_path: Path, settings: dict[str, Any]
):
    path = write_rows([pair(number) for number in range(20)])
    if settings:
        settings = {**settings, "cache": str(tmp_path / "cache")}
    dataset = load(tokenizer, "dpo", train=path, eval_fraction=0.3, packing=True, **settings)
    values = np.random.default_rng(0).random((dataset.train.number_limit, 2)).astype(np.float32)
    attached = dataset.with_values("reference", values)
    assert attached.fingerprint == dataset.fingerprint
    seen = 0
    for batch in epoch_of(attached):
        for at in np.ndindex(*batch.inputs.shape[:2]):
            numbers = batch.rows[at][batch.rows[at] != NO_ROW]
            expected = np.zeros(batch.slots["reference"].shape[2], np.float32)
            expected[: 2 * len(numbers)] = values[numbers].ravel()
            np.testing.assert_array_equal(batch.slots["reference"][at], expected)
            seen += len(numbers)
    assert seen == dataset.report.train.kept
    assert all("reference" not in batch.slots for batch in attached.eval_batches(3))
    with pytest.raises(ValueError, match=r"they belong to other rows \(found shape \(3, 2\), expected"):
        dataset.with_values("reference", values[:3])


def test_the_longest_row_is_used_though_only_the_second_epoch_has_it(tokenizer: Tokenizer, write_rows: Callable):
    """An epoch goes through half of the file."""
    path = write_rows([question(number, "yes" + " yes" * 200 * (number == 3)) for number in range(8)])
    for seed in range(4):
        dataset = load_dataset(DataArgs(train={path: 0.5}), tokenizer, seed=seed, micro_batch_size=1, accumulation=1)
        batches = itertools.islice(dataset.train_batches(), 8)
        assert sorted(int(batch.rows[0, 0, 0]) for batch in batches) == list(range(8))
