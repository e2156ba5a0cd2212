"""Settings of a study: every contradiction is reported, and conditions differ in one thing."""

import dataclasses

import pytest

from qlora_jax.config import ConfigError
from qlora_jax.config.parse import from_dict
from qlora_jax.studies.variance.settings import VarianceArgs, check_variance, design_of

GOOD = {
    "output": "study",
    "models": {"base": "models/base", "mine": {"path": "runs/mine", "step": 3}},
    "prompts": "rows.jsonl",
    "fixed": {"temperature": 0.7, "max_new_tokens": 32},
    "vary": {
        "seed": [0, 1, 2],
        "decoding": {"greedy": {"temperature": 0}, "top-p": {"temperature": 1, "top_p": 0.9}},
        "system": [None, "Answer briefly."],
        "quant_type": ["nf4", "none"],
    },
}


def problems(tmp_path, **changes):
    args = from_dict(VarianceArgs, GOOD | {"output": str(tmp_path / "new/study")} | changes)
    try:
        check_variance(args)
    except ConfigError as error:
        return "\n".join(error.problems)
    return ""


def test_each_condition_differs_from_the_fixed_one_in_its_factor_alone():
    vary = {**GOOD["vary"], "decoding": {"greedy": {"temperature": 0}, "hot": {"temperature": 1}}}
    design = design_of(from_dict(VarianceArgs, GOOD | {"vary": vary}))
    fixed = dataclasses.asdict(design.fixed)
    changed = {
        (factor, level): {key: value for key, value in dataclasses.asdict(one).items() if value != fixed[key]}
        for factor, levels in design.factors.items()
        for level, one in levels.items()
    }
    assert changed == {
        ("seed", "0"): {},
        ("seed", "1"): {"seed": 1},
        ("seed", "2"): {"seed": 2},
        ("decoding", "greedy"): {"temperature": 0.0},
        ("decoding", "hot"): {"temperature": 1.0},
        ("system", "default"): {},
        ("system", "Answer briefly."): {"system": "Answer briefly."},
        ("quant_type", "nf4"): {"quant_type": "nf4"},
        ("quant_type", "none"): {"quant_type": "none"},
    }
    # Each once, and those of one format of the base follow each other.
    conditions = design.conditions()
    assert len(conditions) == len({*conditions}) == 8
    assert [one.quant_type for one in conditions] == [None] * 6 + ["nf4", "none"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": {"base": "models/base"}}, "models: found 1, expected 2 or more"),
        ({"models": {"a": {"path": "a", "steps": 1}, "b": "b"}}, "models.a.steps: unknown setting"),
        ({"vary": {"mood": [1, 2]}}, "found a list for 'mood', which is not a setting of fixed"),
        ({"vary": {"seed": [1]}}, "vary.seed: found [1], expected 2 or more different levels"),
        ({"vary": {"seed": [1, 1]}}, "vary.seed: found [1, 1], expected 2 or more different levels"),
        ({"vary": {"mood": {"a": {"seed": -1}, "b": {"seed": 1}}}}, "vary.mood.a.seed: found -1, expected 0 or more"),
        ({"vary": {"paraphrase": ["{prompt}", "Hello"]}}, "paraphrase: found 'Hello', expected a text with {prompt}"),
        ({"vary": {"example_order": [1, 2]}}, "vary: example_order needs examples"),
        ({"fixed": {}, "vary": {"seed": [1, 2]}}, "vary.seed: levels do the same with temperature 0"),
        ({"answer_pattern": "(a"}, "answer_pattern: "),
        ({"answer_pattern": r"(a)\1"}, "(found '(a)\\\\1')"),
        ({"measures": ["answer", "answer"]}, "measures: found answer, answer, expected each once"),
        ({"measures": ["judge"]}, "judge.kind: found None, expected one of endpoint, model. Set it"),
        ({"measures": ["judge"], "judge": {"kind": "person"}}, "judge.kind: found 'person', expected one of endpoint"),
        ({"measures": ["judge"], "judge": {"kind": "model", "path": "a"}}, "judge.prompts: missing"),
        ({"judge": {"kind": "model", "path": "a", "prompts": "b"}}, "judge: found a judge, but no measure judge"),
    ],
)
def test_contradictions_are_named(tmp_path, changes, message):
    vary = {"decoding": {"greedy": {"temperature": 0}, "hot": {"temperature": 1}}}
    assert problems(tmp_path, vary=vary) == ""
    assert message in problems(tmp_path, **{"vary": vary} | changes)
