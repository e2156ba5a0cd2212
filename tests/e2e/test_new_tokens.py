"""A run with new tokens: their rows train and no others, it resumes to the bit, and what is exported holds them."""

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file

from qlora_jax.config import Config
from qlora_jax.io.export.merged import export_merged
from qlora_jax.io.export.peft import export_peft
from qlora_jax.io.open_model import open_model
from qlora_jax.io.pretrained import (
    apply_adapter,
    load_base,
    open_finetuned,
    open_pretrained,
    parts_before_training,
    weight_settings,
)
from qlora_jax.io.run_folder.checkpoint import Run, open_run
from qlora_jax.models.families import model_config
from qlora_jax.models.partition import combine
from qlora_jax.training.plan.run_plan import compile_run
from qlora_jax.training.run import train
from qlora_jax.training.run_spec import open_inputs
from qlora_jax.training.session import prepare
from tests.e2e.project import project, stop_after

NEW = dict(new_tokens=["<|tool|>", "<|answer|>"], new_special_tokens=["<|turn|>"])
IDS = (258, 259, 260)
TABLES = ("model.embed_tokens", "lm_head")


def tool_project(folder: Path, **changes: Any) -> Config:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": f"say {i} <|tool|>", "completion": "<|answer|>sun<|turn|>"} for i in range(40)]
    (folder / "tools.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sections = {"model": NEW, "data": dict(train=str(folder / "tools.jsonl")), "train": dict(steps=4)}
    return project(folder, **{name: values | changes.pop(name, {}) for name, values in sections.items()}, **changes)


def quiet() -> Console:
    return Console(file=io.StringIO())


def trained(config: Config, *, resume: bool = False) -> Run:
    train(config, Path(config.output), resume=resume, oversized=False, console=quiet())
    return open_run(Path(config.output))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = tool_project(tmp_path_factory.mktemp("finished"))
    trained(config)
    return config


def test_new_tokens_have_ids_of_their_own(finished: Config) -> None:
    inputs = open_inputs(finished)
    assert inputs.new_ids == IDS
    batch = next(inputs.dataset.train_batches())
    supervised = batch.targets[batch.weights > 0]
    assert {259, 260} <= set(supervised.tolist())  # the answers' ids, marks included
    assert 258 in batch.inputs


def test_rows_start_at_the_mean_and_train(finished: Config) -> None:
    run = open_run(Path(finished.output))
    weights = load_file(Path(finished.model.path) / "model.safetensors")
    for name in TABLES:
        moved = np.asarray(run.lora[name]["rows"]) - weights[f"{name}.weight"].mean(axis=0)
        assert moved.shape == (3, 64)
        assert np.abs(moved).max(axis=1).min() > 1e-4 and np.abs(moved).max() < 0.1


def test_a_resumed_run_equals_an_uninterrupted_one(finished: Config, tmp_path: Path, monkeypatch) -> None:
    config = dataclasses.replace(finished, output=str(tmp_path / "run"))
    with monkeypatch.context() as patch:
        stop_after(patch, config, 2)
        assert trained(config).step == 2
    resumed, whole = trained(config, resume=True), open_run(Path(finished.output))
    assert resumed.step == whole.step == 4
    jax.tree.map(np.testing.assert_array_equal, resumed.lora, whole.lora)


def test_paged_it_is_the_same_run(finished: Config, tmp_path: Path) -> None:
    optim = dataclasses.replace(finished.optim, paging="on", paging_budget="512KiB")
    paged = trained(dataclasses.replace(finished, optim=optim, output=str(tmp_path / "run")))
    jax.tree.map(np.testing.assert_array_equal, paged.lora, open_run(Path(finished.output)).lora)


WHOLE = ["embed_tokens", "lm_head"]


@pytest.mark.slow
@pytest.mark.parametrize("new", [True, False])
def test_whole_tables_train_resume_and_are_paged(tmp_path: Path, new: bool, monkeypatch) -> None:
    none: dict[str, list[str]] = {} if new else {name: [] for name in NEW}
    config = tool_project(tmp_path, lora=dict(modules_to_save=WHOLE), model=none)
    whole = trained(config)
    weights = load_file(Path(config.model.path) / "model.safetensors")
    for name in TABLES:
        table = np.asarray(whole.lora[name]["weight"])
        assert table.shape == (258 + 3 * new, 64)
        assert 1e-4 < np.abs(table[:258] - weights[f"{name}.weight"]).max() < 0.1
    optim = dataclasses.replace(config.optim, paging="on", paging_budget="512KiB")
    paged = trained(dataclasses.replace(config, optim=optim, output=str(tmp_path / "paged")))
    jax.tree.map(np.testing.assert_array_equal, paged.lora, whole.lora)
    cut = dataclasses.replace(config, output=str(tmp_path / "cut"))
    with monkeypatch.context() as patch:
        stop_after(patch, cut, 2)
        assert trained(cut).step == 2
    jax.tree.map(np.testing.assert_array_equal, trained(cut, resume=True).lora, whole.lora)


def test_other_modules_are_refused(tmp_path: Path) -> None:
    config = tool_project(tmp_path, lora=dict(modules_to_save=["embed_tokens", "norm"]))
    with pytest.raises(ValueError, match=r"lora.modules_to_save: 'norm': expected some of embed_tokens, lm_head"):
        compile_run(config, open_inputs(config))


def test_another_run_goes_on_from_the_exported_adapter(finished: Config, tmp_path: Path) -> None:
    result = export_peft(open_finetuned(finished.output), tmp_path / "peft")
    assert "base.resize_token_embeddings(261)" in str(result)
    assert "base.resize_token_embeddings(261)" in (tmp_path / "peft/README.md").read_text()
    lora = dataclasses.replace(finished.lora, start=str(tmp_path / "peft"))
    config = dataclasses.replace(finished, lora=lora, output=str(tmp_path / "run"))
    inputs = open_inputs(config)
    session = prepare(compile_run(config, inputs), lambda *_: None)
    jax.tree.map(np.testing.assert_array_equal, dict(session.parts.lora), dict(open_run(Path(finished.output)).lora))
    tokens = np.asarray([[*IDS, 5, 60, 258, 7]], np.int32)
    found = []
    for run in (finished.output, str(tmp_path / "peft")):
        opened = open_pretrained(run=run)
        assert opened.run is not None and opened.tokenizer.encode("<|answer|>") == [259]
        args = weight_settings(opened, "nf4", "float32")
        found.append(logits(apply_adapter(load_base(opened, args), opened.run), tokens))
    np.testing.assert_array_equal(*found)


def test_other_new_tokens_are_another_run(finished: Config) -> None:
    model = dataclasses.replace(finished.model, new_tokens=["<|tool|>", "<|other|>"])
    with pytest.raises(ValueError, match=r"model.new_tokens: \['<\|tool\|>', '<\|answer\|>'\] in the checkpoint"):
        trained(dataclasses.replace(finished, model=model), resume=True)


def logits(parts: Any, tokens: np.ndarray) -> np.ndarray:
    model = combine(parts)
    return np.asarray(model.head.logits(jax.jit(type(model).hidden)(model, tokens)))


@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_merged_model_holds_them(finished: Config, tmp_path: Path, tied: bool) -> None:
    config = finished
    if tied:
        config = tool_project(tmp_path / "tied", train=dict(steps=2), base=dict(tie_word_embeddings=True))
        trained(config)
    export_merged(open_finetuned(config.output), tmp_path / "hf", "hf", dtype="float32")
    tokens = np.asarray([[*IDS, 5, 60, 258, 7]], np.int32)
    opened = open_pretrained(run=config.output)
    assert opened.run is not None
    expected = logits(apply_adapter(load_base(opened, opened.args), opened.run), tokens)
    merged = open_pretrained(model=str(tmp_path / "hf"))
    plain = dataclasses.replace(opened.args, quant_type="none", new_tokens=[], new_special_tokens=[])
    found = logits(parts_before_training(load_base(merged, plain), None), tokens)
    assert found.shape == expected.shape == (7, 261)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert merged.tokenizer.encode("a<|tool|>b<|turn|>") == [*opened.tokenizer.encode("a<|tool|>b<|turn|>")]
    assert merged.tokenizer.encode("<|tool|><|answer|><|turn|>") == list(IDS)
    assert merged.source.config["vocab_size"] == 261
    assert {"lm_head.weight"} - merged.source.tensors.keys() == ({"lm_head.weight"} if tied else set())


def test_tokens_that_are_not_new_are_refused(tmp_path: Path) -> None:
    config = tool_project(tmp_path, model=dict(new_tokens=["a", "<|new|>"], new_special_tokens=["</s>"]))
    with pytest.raises(ValueError, match="already in the vocabulary: 'a', '</s>'"):
        open_inputs(config)


@pytest.mark.slow
def test_a_padded_table_gives_its_rows(tmp_path: Path) -> None:
    """The model has 264 rows and the tokenizer 258 tokens: the new ones are rows 258 to 260, and the table stays."""
    config = tool_project(tmp_path, train=dict(steps=2), base=dict(vocab_size=264))
    trained(config)
    opened = open_pretrained(run=config.output)
    assert opened.run is not None and opened.run.new_ids == IDS
    found = logits(apply_adapter(load_base(opened, opened.args), opened.run), np.asarray([[*IDS, 5]], np.int32))
    assert found.shape == (4, 264)
    export_merged(open_finetuned(config.output), tmp_path / "hf", "hf", dtype="float32")
    assert model_config(open_model(tmp_path / "hf").config).vocab_size == 264
