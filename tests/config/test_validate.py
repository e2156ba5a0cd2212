"""Bounds and contradictions between settings, reported together."""

import dataclasses

import pytest

from qlora_jax.config import (
    Config,
    ConfigError,
    DataArgs,
    LoraArgs,
    ModelArgs,
    OptimArgs,
    QuestionArgs,
    TrainArgs,
    to_dict,
    validate,
)
from qlora_jax.config.parse import from_dict, walk_settings
from qlora_jax.config.suggestions import REPLACEMENTS

MINIMAL = Config(model=ModelArgs(path="m"), data=DataArgs(train="t"), output="o")


def changed(key: str, value: object) -> Config:
    section, _, name = key.rpartition(".")
    if not section:
        return dataclasses.replace(MINIMAL, **{name: value})
    return dataclasses.replace(MINIMAL, **{section: dataclasses.replace(getattr(MINIMAL, section), **{name: value})})


def test_defaults_are_valid():
    validate(MINIMAL)


@pytest.mark.parametrize(
    ("key", "bad", "good"),
    [
        ("model.block_size", 48, 32),
        ("model.block_size", 8192, 4096),
        ("lora.rank", 0, 1),
        ("lora.alpha", 0.0, 0.5),
        ("lora.dropout", 1.0, 0.0),
        ("lora.target_modules", [], ["q_proj"]),
        ("lora.rank_pattern", {"q": 0}, {"q": 1}),
        ("lora.alpha_pattern", {"q": -1.0}, {"q": 1.0}),
        ("data.eval_fraction", 1.0, 0.5),
        ("data.eval_fraction", -0.1, 0.0),
        ("data.max_length", 1, 2),
        ("data.source_max_length", 0, None),
        ("data.source_max_length", 16, None),
        ("optim.learning_rate", -1e-4, 1e-4),
        ("optim.warmup_ratio", 1.1, 1.0),
        ("optim.beta2", 1.0, 0.0),
        ("optim.max_grad_norm", -1.0, 0.0),
        ("train.steps", 0, None),
        ("train.epochs", 0.0, 0.5),
        ("train.eval_every", 5, 0),
        ("train.keep_best", True, False),
        ("train.patience", 3, 0),
        ("output", "", "o"),
    ],
)
def test_bounds(key, bad, good):
    validate(changed(key, good))
    with pytest.raises(ConfigError, match=key):
        validate(changed(key, bad))


def test_adapters_on_parameters_have_neither_dropout_nor_decomposed_weights():
    parameters = dataclasses.replace(MINIMAL.lora, target_modules=[], target_parameters=["mlp.experts.down_proj"])
    validate(dataclasses.replace(MINIMAL, lora=dataclasses.replace(parameters, share_experts=True)))
    with pytest.raises(ConfigError, match=r"lora\.layers_to_transform: it applies to lora\.target_modules, which is"):
        validate(dataclasses.replace(MINIMAL, lora=dataclasses.replace(parameters, layers_to_transform=[0])))
    wrong = dataclasses.replace(parameters, dropout=0.1, init="pissa")
    with pytest.raises(ConfigError) as caught:
        validate(dataclasses.replace(MINIMAL, lora=wrong))
    assert len(caught.value.problems) == 2
    with pytest.raises(ConfigError, match=r"lora\.target_parameters: found .* but lora\.method=dora does not use it"):
        validate(dataclasses.replace(MINIMAL, lora=dataclasses.replace(parameters, method="dora")))
    with pytest.raises(ConfigError, match=r"lora\.share_experts: found true without lora\.target_parameters"):
        validate(changed("lora.share_experts", True))


def asking(**questions) -> Config:
    return dataclasses.replace(MINIMAL, questions=QuestionArgs(**questions), train=TrainArgs(eval_every=5))


def test_questions_need_no_evaluation_data_but_patience_does():
    validate(asking(letters="mmlu.jsonl", shots="dev.jsonl"))
    with pytest.raises(ConfigError, match=r"train\.patience: .*evaluation data is missing"):
        validate(dataclasses.replace(asking(letters="mmlu.jsonl"), train=TrainArgs(eval_every=5, patience=1)))


@pytest.mark.parametrize(
    ("questions", "problem"),
    [
        ({"answers": "a", "shots": "b"}, r"questions\.shots: requires questions\.letters"),
        ({"letters": "a", "answer_pattern": "b"}, r"questions\.answer_pattern: requires questions\.answers"),
        (
            {"answers": "a", "answer_pattern": "("},
            r"questions\.answer_pattern: not a regular expression: missing \).*\(found '\('\)",
        ),
        ({"answers": "a", "answer_pattern": "(?=b)"}, r"questions\.answer_pattern: not supported .*: a lookahead"),
        (
            {"file_columns": {"answer": "b"}},
            r"questions\.file_columns: requires one of choices, letters, labels, answers",
        ),
        (
            {"answers": "a", "file_columns": {"options": "b"}},
            r"questions\.file_columns: unknown column \(found 'options', expected",
        ),
        ({"answers": "a", "max_rows": 0}, r"questions\.max_rows: found 0"),
        ({"labels": "a", "label_prompt": "{b}"}, r"questions\.labels: requires questions\.label_texts"),
        ({"label_prompt": "{b}"}, r"questions\.label_prompt: requires questions\.labels"),
        (
            {"labels": "a", "label_prompt": "{b}", "label_texts": {"0": "x", "1": "x"}},
            r"questions\.label_texts: texts are empty or equal",
        ),
        ({"labels": "a", "label_prompt": "{b}", "label_texts": {"0": "x"}}, "expected two or more labels"),
        ({"programs": "a", "pass_at": [1, 5]}, r"questions\.pass_at: more than questions\.program_samples \(found 5"),
        ({"programs": "a", "program_samples": 5}, r"questions\.program_temperature: found 0 with .*all equal"),
    ],
)
def test_settings_of_questions_that_contradict_each_other(questions, problem):
    with pytest.raises(ConfigError, match=problem):
        validate(asking(**questions))


def test_keep_best_requires_several_evaluations():
    held_out = dataclasses.replace(MINIMAL, data=dataclasses.replace(MINIMAL.data, eval_fraction=0.1))
    often = dataclasses.replace(held_out, train=TrainArgs(eval_every=5, keep_best=True, patience=2))
    validate(often)
    with pytest.raises(ConfigError, match=r"train\.keep_best: .*train\.eval_every=0(?s:.*)train\.patience: found 2"):
        validate(dataclasses.replace(often, train=TrainArgs(keep_best=True, patience=2)))


def test_types_of_a_config_made_in_python():
    with pytest.raises(ConfigError, match=r"lora\.rank: found True, expected a whole number"):
        validate(changed("lora.rank", True))


@pytest.mark.parametrize(
    ("key", "word", "ours"),
    [
        ("overlong", "truncate", "truncate-right"),
        ("format", "oasst1", "guanaco"),
        ("format", "longform", "input-output"),
    ],
)
def test_other_trainers_values_get_a_suggestion(key, word, ours):
    raw = {"model": {"path": "m"}, "data": {"train": "t", key: word}, "output": "o"}
    with pytest.raises(ConfigError, match=f"data\\.{key}: found '{word}', .*did you mean {ours}\\?"):
        from_dict(Config, raw)


def test_separate_lengths_fit_into_a_row():
    data = dataclasses.replace(MINIMAL.data, source_max_length=16, target_max_length=512)
    validate(dataclasses.replace(MINIMAL, data=data))
    with pytest.raises(ConfigError, match=r"data\.max_length: found 500, expected at least 528"):
        validate(dataclasses.replace(MINIMAL, data=dataclasses.replace(data, max_length=500)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": {"a.jsonl": 1.0, "b.jsonl": 0.0}}, r"data\.train: found weight 0\.0 for 'b\.jsonl'"),
        ({"train": {"a.jsonl": 1.0}, "format": {"b.jsonl": "guanaco"}}, r"data\.format: found 'b\.jsonl', expected"),
        ({"train": "a.jsonl", "window": 1000}, r"data\.window: found 1000 without data\.cache"),
        ({"train": "a.jsonl", "window": 99, "cache": "c"}, r"data\.window: found 99, expected 100 or more"),
    ],
)
def test_data_settings_that_contradict_each_other(settings, message):
    with pytest.raises(ConfigError, match=message):
        validate(dataclasses.replace(MINIMAL, data=DataArgs(**settings)))


def test_files_with_weights_forms_and_windows():
    train = {"a.jsonl": 1.0, "b.jsonl": 0.5}
    data = DataArgs(train=train, format={"b.jsonl": "guanaco", "e": "text"}, eval="e", window=1000, cache="c")
    validate(dataclasses.replace(MINIMAL, data=data))


def test_a_configuration_from_before_columns_and_bad_rows_has_their_defaults():
    raw = to_dict(MINIMAL)
    assert raw["data"].pop("columns") is None and raw["data"].pop("bad_rows") == "error"
    assert from_dict(Config, raw) == MINIMAL


def test_eval_and_eval_fraction_exclude_each_other():
    both = dataclasses.replace(MINIMAL, data=DataArgs(train="t", eval="e", eval_fraction=0.1))
    with pytest.raises(ConfigError, match="expected one of them"):
        validate(both)


def test_every_synonym_points_at_a_setting():
    keys = {found if isinstance(found, str) else found.key for found in REPLACEMENTS.values()}
    assert keys - {None} <= {key for key, _, _ in walk_settings(Config)}


def test_every_setting_has_help():
    assert all(field.metadata["help"] for _, field, _ in walk_settings(Config))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            dict(method="ia3", rank=8, dropout=0.1),
            ["lora.rank: found 8, but lora.method=ia3 does not use it", "lora.dropout"],
        ),
        (dict(method="ia3", dtype="bfloat16"), ["lora.dtype: found 'bfloat16'"]),
        (
            dict(feedforward_modules=["down_proj"]),
            ["lora.feedforward_modules: found ['down_proj']"],
        ),
        (
            dict(method="oft", rank=8, dropout=0.1, d_initial=0.5, oft_blocks=4, oft_block_size=16),
            [
                "lora.rank: found 8, but lora.method=oft does not use it",
                *("lora.dropout", "lora.d_initial", "lora.oft_block_size: found 16, but lora.oft_blocks=4"),
            ],
        ),
        (
            dict(method="oft", use_cayley_neumann=False, num_cayley_neumann_terms=7),
            ["lora.num_cayley_neumann_terms: found 7, but lora.use_cayley_neumann=false"],
        ),
        (dict(method="vera", alpha=8.0, dtype="bfloat16", block_share=True), ["lora.alpha", "lora.dtype"]),
        (dict(projection_prng_key=3), ["lora.projection_prng_key: found 3, but lora.method=lora"]),
        (dict(method="dora", feedforward_modules=[]), ["lora.feedforward_modules: found [], but lora.method=dora"]),
        (
            dict(method="ln_tuning", rank=8, target_modules="all-linear"),
            ["lora.rank: found 8", "lora.target_modules: found 'all-linear' with lora.method=ln_tuning"],
        ),
        (dict(method="bitfit", start="adapter", dtype="bfloat16"), ["lora.start: found 'adapter'", "lora.dtype"]),
        (
            dict(method="houlsby", alpha=8.0, target_modules=["q_proj"]),
            ["lora.alpha: found 8.0, but lora.method=houlsby does not use it", "lora.target_modules: found ['q_proj']"],
        ),
        (dict(method="dora", bottleneck_activation="relu"), ["lora.bottleneck_activation: found 'relu'"]),
        (
            dict(method="full", rank=8, target_modules=["q_proj"], modules_to_save=["lm_head"], start="adapter"),
            [
                "lora.rank: found 8, but lora.method=full does not use it",
                *("lora.target_modules", "lora.modules_to_save", "lora.start"),
                "model.quant_type: found 'nf4' with lora.method=full, expected none",
            ],
        ),
    ],
)
def test_settings_that_a_method_does_not_use(settings, message):
    with pytest.raises(ConfigError) as caught:
        validate(dataclasses.replace(MINIMAL, lora=LoraArgs(**settings)))
    assert all(part in str(caught.value) for part in message)
    unquantized = dataclasses.replace(MINIMAL.model, quant_type="none")
    validate(dataclasses.replace(MINIMAL, model=unquantized, lora=LoraArgs(method=settings.get("method", "lora"))))


@pytest.mark.parametrize(
    ("lora", "optim", "message"),
    [
        (dict(method="ia3"), dict(loraplus_lr_ratio=16.0), "optim.loraplus_lr_ratio: found 16.0 with lora.method=ia3"),
        ({}, dict(loraplus_lr_ratio=0.0), "optim.loraplus_lr_ratio: found 0.0, expected more than 0"),
        (dict(layers_to_transform="3-1"), {}, "lora.layers_to_transform: found the range 3-1 in '3-1'"),
        (dict(layers_to_transform=[0], target_modules=".*q_proj"), {}, "with a regular expression in"),
        (dict(layers_to_transform=[0], method="dora"), {}, "found [0], but lora.method=dora does not use it"),
        (dict(method="lora_fa", init="pissa"), {}, "lora.init: found 'pissa', but lora.method=lora_fa does not use it"),
    ],
)
def test_settings_of_loraplus_and_of_layers_that_cannot_be(lora, optim, message):
    changed = dataclasses.replace(MINIMAL, lora=LoraArgs(**lora), optim=OptimArgs(**optim))
    with pytest.raises(ConfigError) as caught:
        validate(changed)
    assert message in str(caught.value)


def test_layers_in_16_bits_need_others_in_4_bits():
    kept = dataclasses.replace(MINIMAL.model, keep_16bit=["down_proj"])
    validate(dataclasses.replace(MINIMAL, model=kept))
    with pytest.raises(ConfigError, match=r"model.keep_16bit: found \['down_proj'\] with model.quant_type=none"):
        validate(dataclasses.replace(MINIMAL, model=dataclasses.replace(kept, quant_type="none")))
    with pytest.raises(ConfigError, match=r"lora.init: found 'loftq' with model\.keep_16bit"):
        validate(dataclasses.replace(MINIMAL, model=kept, lora=LoraArgs(init="loftq")))


def test_offloaded_experts_need_recomputation_and_one_format():
    model = dataclasses.replace(MINIMAL.model, experts="offload")
    validate(dataclasses.replace(MINIMAL, model=model))
    model = dataclasses.replace(model, keep_16bit=["down_proj"])
    train = dataclasses.replace(MINIMAL.train, remat="none")
    with pytest.raises(ConfigError) as caught:
        validate(dataclasses.replace(MINIMAL, model=model, train=train))
    assert [problem.partition(":")[0] for problem in caught.value.problems] == ["train.remat", "model.keep_16bit"]


def test_what_cannot_train_with_merged_weights_is_reported_together():
    lora = LoraArgs(merge_into="q4_0", dropout=0.1, layers_to_transform=[0], modules_to_save=["lm_head"])
    config = dataclasses.replace(changed("model.new_tokens", ["<a>"]), lora=lora)
    with pytest.raises(ConfigError) as error:
        validate(config)
    names = [problem.split(":")[0] for problem in error.value.problems]
    assert names == ["lora.dropout", "lora.layers_to_transform", "lora.modules_to_save", "model.new_tokens"]
    assert all("with lora.merge_into=q4_0, but" in problem for problem in error.value.problems)
    with pytest.raises(ConfigError, match=r"lora.merge_into: found 'q4_0', but lora.method=full does not use it"):
        validate(dataclasses.replace(MINIMAL, lora=LoraArgs(method="full", merge_into="q4_0")))
    types = LoraArgs(merge_into="q4_0", merge_types={"mlp.up_proj": "Q4_K"})
    with pytest.raises(ConfigError, match=r"lora.merge_types: found types with lora.merge_into=q4_0, expected one of"):
        validate(dataclasses.replace(MINIMAL, lora=types))
    with pytest.raises(ConfigError, match=r"lora.merge_from: found 0.7 without lora.merge_into"):
        validate(dataclasses.replace(MINIMAL, lora=LoraArgs(merge_from=0.7)))
    tables = dataclasses.replace(lora, merge_into="nf4", dropout=0.0, layers_to_transform=None)
    validate(dataclasses.replace(config, lora=tables))  # bitsandbytes rounds no table
