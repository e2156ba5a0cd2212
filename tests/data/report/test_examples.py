"""Example rows as text: complete, and supervised where the mask is."""

import re

import numpy as np

from qlora_jax.config.schema import DataArgs
from qlora_jax.data.branch_tree import Branch
from qlora_jax.data.dataset import load_dataset
from qlora_jax.data.loss_mask.reference import EncodedRow
from qlora_jax.data.readers.files import Place
from qlora_jax.data.report.stats import ONE_TEXT, decode_row
from qlora_jax.data.report.text import example_rows, split_runs
from qlora_jax.data.rows import token_rows

ANSWERS = ["<b>4</b>\nand more", "", "漢字 & <script>", " leading <|im_end|> inside", "x" * 300]


def test_text_is_cut_at_special_tokens_and_line_ends():
    runs = split_runs("<s>a\n\nb</s>", re.compile("<s>|</s>"))
    assert [tuple(run) for run in runs] == [
        ("<s>", "special"),
        ("a", "text"),
        ("\n", "newline"),
        ("\n", "newline"),
        ("b", "text"),
        ("</s>", "special"),
    ]
    assert split_runs("", re.compile("(?!)")) == ()
    assert [run.kind for run in split_runs("a<s>", re.compile("(?!)"))] == ["text"]


def test_marked_text_is_what_the_mask_decodes_to(write_rows, tokenizer):
    rows = [
        {"prompt": f"{n} <img src=x>\nplease", "completion": answer or str(n)} for n, answer in enumerate(ANSWERS * 8)
    ]
    path = write_rows(rows)
    dataset = load_dataset(DataArgs(train=path, max_length=512), tokenizer, seed=0, micro_batch_size=1, accumulation=1)
    marked = example_rows(dataset.train, tokenizer, 12)
    by_place = {dataset.train.where(int(n)): index for index, n in enumerate(dataset.train.numbers)}
    assert len(marked) == 12 and [row.tokens for row in marked] == sorted(row.tokens for row in marked)
    assert {marked[0].tokens, marked[-1].tokens} == {dataset.train.lengths.min(), dataset.train.lengths.max()}
    for row in marked:
        ids, supervised = dataset.train.row(by_place[row.place])
        seen = ["".join(run.text for run in runs) for runs, learned, _ in row.segments if learned]
        assert seen == [tokenizer.decode(ids[supervised].tolist())]  # one turn: one stretch
        assert "".join(run.text for runs, _, _ in row.segments for run in runs) == tokenizer.decode(ids.tolist())
        assert row.supervised == supervised[1:].sum() and row.tokens == len(ids) - 1


def test_fewer_rows_than_asked_for_are_all_shown_once(write_rows, tokenizer):
    path = write_rows([{"prompt": "a", "completion": "b"}] * 3)
    dataset = load_dataset(DataArgs(train=path), tokenizer, seed=0, micro_batch_size=1, accumulation=1)
    places = [row.place for row in example_rows(dataset.train, tokenizer, 32)]
    assert places == [dataset.train.where(int(n)) for n in np.arange(3)]


def test_the_first_token_of_a_branch_is_shown(plain_tokenizer):
    first, second, end = plain_tokenizer.encode(" one two three")
    cases = {
        (1, second): " one two|branch 1| two three|branch 2| one three",  # it leaves the trunk earlier
        (2, end): " one two|branch 1| three three|branch 2| one three",
        (2, first): " one two one|branch 1| three|branch 2| three",  # all branches begin with this id
    }
    for (depth, begin), expected in cases.items():
        ids, supervised = np.array([first, second, begin, end, first, end], np.int32), np.arange(6) % 2 == 1
        row = EncodedRow(ids, supervised, 1, False, False, (Branch(2, depth), Branch(4, 2)))
        pieces = decode_row(token_rows("rows.jsonl", [row], [Place(1, 0)]), 0, plain_tokenizer, ONE_TEXT)
        assert "".join(f"|{piece.name}|{piece.text}" if piece.name else piece.text for piece in pieces) == expected
