"""Settings of the head that the objective ignores, or that contradict each other."""

import pytest

from qlora_jax.config import Config, ConfigError, DataArgs, LoraArgs, ModelArgs, TrainArgs, validate
from qlora_jax.config.objectives import OBJECTIVES, HeadArgs, ObjectiveDeclaration, PreferenceArgs, objective_problems


def head_problems(head: HeadArgs, objective: str) -> list[str]:
    return objective_problems(PreferenceArgs(), head, objective)


@pytest.mark.parametrize("objective", OBJECTIVES.names())
def test_defaults_fit_every_objective(objective):
    assert head_problems(HeadArgs(), objective) == []


@pytest.mark.parametrize(
    ("name", "value", "objective"),
    [
        ("labels", ["a", "b"], "regression"),
        ("pooling", "mean", "reward"),
        ("temperature", 0.1, "classification"),
        ("center_rewards_coefficient", 0.01, "sft"),
    ],
)
def test_settings_that_the_objective_ignores_are_named(name, value, objective):
    (problem,) = head_problems(HeadArgs(**{name: value}), objective)
    assert problem.startswith(f"head.{name}: found {value!r}, but objective={objective} does not use it")


def test_labels_are_unique_and_at_least_two():
    assert head_problems(HeadArgs(labels=["a", "b", "a"]), "classification") == [
        "head.labels: found 'a' several times, expected unique names. Remove it"
    ]
    assert "expected at least 2 labels" in head_problems(HeadArgs(labels=["a"]), "classification")[0]
    assert head_problems(HeadArgs(labels=["a"]), "multi_label") == []


def test_settings_that_need_a_language_model_head_are_refused_together():
    config = Config(
        model=ModelArgs(path="m"),
        lora=LoraArgs(modules_to_save=["lm_head"]),
        data=DataArgs(train="t"),
        train=TrainArgs(samples="prompts.jsonl"),
        objective="reward",
        output="o",
    )
    with pytest.raises(ConfigError) as error:
        validate(config)
    for name, value in (("lora.modules_to_save", "lm_head"), ("train.samples", "prompts.jsonl")):
        assert f"{name}: found {value!r} with objective=reward, whose model has no language-model head" in str(
            error.value
        )


@pytest.mark.parametrize("of_head", [{}, {"task": "images"}, {"task": "labels", "values": "margin"}])
def test_a_head_that_no_task_scores_is_refused_when_it_is_declared(of_head):
    with pytest.raises(ValueError, match=r"head=True with task=.* expected one of labels, pairs, embeddings"):
        ObjectiveDeclaration(implementation="package:make", rows="class", head=True, **of_head)
