"""Likelihoods of options and of answers, SmolLM2 in f32, against torch with transformers."""

from pathlib import Path

import numpy as np
import pytest

from qlora_jax.data.readers.files import read_rows
from qlora_jax.evaluation.loglikelihood import score_rows
from qlora_jax.evaluation.tasks.choices import choices_task, score_choices
from qlora_jax.evaluation.tasks.rows import rows_task
from qlora_jax.io.pretrained import load_base, open_pretrained, weight_settings
from qlora_jax.models.partition import partition

ORACLE = Path(__file__).parent.parent / "oracle/reply_likelihoods.py"
EXAMPLES = Path(__file__).parents[2] / "examples"
QUESTIONS, ROWS = EXAMPLES / "multiple_choice/openbookqa_500.jsonl.gz", EXAMPLES / "titles/heldout.jsonl"
COUNT = 8  # replies of each kind


@pytest.mark.slow
def test_options_and_answers_are_as_likely_as_torch_finds_them(smollm2_gguf, oracle):
    questions, rows = ([row.data for row in read_rows(path)[:COUNT]] for path in (QUESTIONS, ROWS))
    options = [(q["question"], option[len("A. ") :]) for q in questions for option in q["options"].split("\n")]
    answers = [(user["content"], f"{reply['content']}<|im_end|>") for user, reply in (row["messages"] for row in rows)]
    opened = open_pretrained(model=str(smollm2_gguf))
    template = opened.tokenizer.chat_template
    theirs = oracle(ORACLE, gguf=str(smollm2_gguf), template=template, pairs=[*options, *answers])

    parts = partition(load_base(opened, weight_settings(opened, "none", "float32")))
    limits = {"max_rows": COUNT, "max_positions": opened.features.max_positions}
    choices = choices_task(str(QUESTIONS), opened.tokenizer, **limits).choices
    ours = score_rows(parts, [option for choice in choices for option in choice.options])
    of_options, of_answers = slice(len(options)), slice(len(options), None)
    np.testing.assert_allclose(ours.nll, theirs["nll"][of_options], rtol=1e-3)
    np.testing.assert_array_equal(ours.tokens, theirs["counts"][of_options])

    by_sum, by_mean = (
        (each.reshape(COUNT, 4).argmin(axis=1) == ["ABCD".index(q["answer"][0]) for q in questions]).tolist()
        for each in (theirs["nll"][of_options], (theirs["nll"] / theirs["counts"])[of_options])
    )
    verdicts = score_choices(parts, choices)
    assert (verdicts.by_sum.tolist(), verdicts.by_mean.tolist()) == (by_sum, by_mean)

    replies = score_rows(parts, rows_task(str(ROWS), opened.tokenizer, **limits).rows)
    np.testing.assert_allclose(replies.nll, theirs["nll"][of_answers], rtol=1e-3)
    for name, found in {"counts": replies.tokens, "begins": replies.begins, "exact": replies.exact}.items():
        np.testing.assert_array_equal(found, theirs[name][of_answers])
