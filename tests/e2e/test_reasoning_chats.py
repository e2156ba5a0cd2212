"""Training on chats whose template drops earlier reasoning: each turn has the loss that it has alone."""

import dataclasses
import io
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from qlora_jax.config import Config
from qlora_jax.config.parse import from_dict
from qlora_jax.data.batching.batches import fill_batch
from qlora_jax.data.dataset import Dataset
from qlora_jax.data.loss_mask.reference import EncodedRow
from qlora_jax.data.readers.files import Place
from qlora_jax.data.rows import token_rows
from qlora_jax.models.partition import ModelParts
from qlora_jax.training.metrics.metrics_file import read_metrics
from qlora_jax.training.plan.run_plan import compile_run, planned_rows, step_configs
from qlora_jax.training.plan.settings import PlanArgs
from qlora_jax.training.plan.target import plan_target
from qlora_jax.training.run import train
from qlora_jax.training.run_spec import open_inputs
from qlora_jax.training.session import Session, prepare
from qlora_jax.training.step import evaluation_loss, gradients
from tests.data.loss_mask.reasoning_templates import REASONING_TEMPLATES
from tests.e2e.project import byte_tokenizer_json, project, stop_after
from tests.e2e.run_records import comparable_records

MARKS = {"<|im_start|>": 258, "<|im_end|>": 259}  # special tokens and their ids
LONGEST = 256
TURNS = (3, 1, 2, 2)  # turns per chat
ONE_TURN = (1, 1, 1, 1)


def chat(number: int, turns: int) -> list[dict[str, str]]:
    """Questions and answers with their reasoning, all different in text and length."""
    words = ["one", "seven", "twelve"]
    return [
        message
        for n in range(turns)
        for message in (
            {"role": "user", "content": f"q{number} {words[n]}"},
            {"role": "assistant", "content": words[-n], "reasoning_content": f"r{number}" + " why" * (n + 1)},
        )
    ]


def write_chats(path: Path, turns: tuple[int, ...]) -> str:
    lines = [json.dumps({"messages": chat(number, count)}) + "\n" for number, count in enumerate(turns)]
    path.write_text("".join(lines))
    return str(path)


def chats_project(folder: Path, *, turns: tuple[int, ...] = TURNS, packing: bool = False) -> Config:
    """The settings of a run on chats of so many turns. Its held-out chats have TURNS, unless it packs."""
    folder.mkdir(parents=True, exist_ok=True)
    data = {"train": write_chats(folder / "chats.jsonl", turns), "max_length": LONGEST, "buckets": 1}
    data |= {"eval_fraction": 0.0, "packing": packing}
    if not packing:
        data["eval"] = write_chats(folder / "held_out.jsonl", TURNS)
    base = {"vocab_size": 260, "max_position_embeddings": LONGEST}
    steps = {"steps": 4, "accumulation": 1 if packing else 2, "save_every": 2, "eval_every": 2}
    config = project(folder, base=base, lora={"dropout": 0.0}, data=data, train=steps)
    write_tokenizer(Path(config.model.path))
    return config


def write_tokenizer(folder: Path) -> None:
    """Replaces the tokenizer by one of bytes with the tokens and the template of reasoning chats."""
    whole = json.loads(byte_tokenizer_json())
    whole["added_tokens"] += [{**whole["added_tokens"][0], "id": id, "content": text} for text, id in MARKS.items()]
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    settings = {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings | {"chat_template": REASONING_TEMPLATES["qwen3"]})
    )


def session_of(config: Config) -> Session:
    inputs = open_inputs(config)
    return prepare(compile_run(config, inputs), lambda *_: None)


def with_random_adapter(parts: ModelParts) -> ModelParts:
    rng = np.random.default_rng(0)
    return parts.with_lora(
        jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.05, leaf.shape), leaf.dtype), parts.lora)
    )


def turns_alone(dataset: Dataset, turns: tuple[int, ...]) -> dict[str, np.ndarray]:
    """The batch [1, turns, T] of all assistant turns, each behind the ids that inference gives the model."""
    tokenizer, rows = dataset.tokenizer, []
    for number, count in enumerate(turns):
        messages = chat(number, count)
        for place in range(1, len(messages), 2):
            prompt = tokenizer.encode(tokenizer.render(messages[:place], add_generation_prompt=True))
            reasoning, answer = messages[place]["reasoning_content"], messages[place]["content"]
            reply = tokenizer.encode(f"<think>\n{reasoning}\n</think>\n\n{answer}<|im_end|>")
            is_reply = np.arange(len(prompt) + len(reply)) >= len(prompt)
            rows.append(EncodedRow(np.array(prompt + reply, np.int32), is_reply, len(prompt), False, False))
    plain = token_rows("turns", rows, [Place(1, index) for index in range(len(rows))])
    return fill_batch(plain, np.arange(len(rows)).reshape(1, -1, 1), LONGEST, 0).arrays()


def mean_loss_alone(session: Session, turns: tuple[int, ...]) -> float:
    batch = {name: array[0] for name, array in turns_alone(session.run.inputs.dataset, turns).items()}
    return float(evaluation_loss(session.parts, batch).sum() / batch["weights"].sum())


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True])
def test_a_step_has_the_loss_and_gradients_of_its_turns_alone(tmp_path: Path, packing: bool):
    session = session_of(chats_project(tmp_path, packing=packing))
    parts, batch = with_random_adapter(session.parts), next(session.run.inputs.dataset.train_batches())
    assert sorted(batch.rows[batch.rows >= 0]) == [0, 1, 2, 3] and session.run.inputs.dataset.branching
    assert batch.rows.shape[-1] == (2 if packing else 1)
    found, loss = session.run.gradients(parts, batch.arrays(), None)
    expected, alone = gradients(parts, turns_alone(session.run.inputs.dataset, TURNS), None, remat="none")
    assert loss.count == alone.count
    np.testing.assert_allclose(loss.total, alone.total, rtol=1e-5)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.max(np.abs(other)))


def run(config: Config, resume: bool = False) -> None:
    train(config, Path(config.output), resume=resume, oversized=False, console=Console(file=io.StringIO()))


def losses(config: Config, name: str) -> list[float]:
    records = read_metrics(Path(config.output) / "metrics.jsonl")
    return [float(record[name]) for record in records if name in record]


@pytest.mark.slow
def test_a_run_on_trees_evaluates_and_resumes(tmp_path: Path):
    config, parted = chats_project(tmp_path / "whole"), chats_project(tmp_path / "parted")
    run(config)
    alone = mean_loss_alone(session_of(config), TURNS)
    assert losses(config, "eval_loss")[0] == pytest.approx(alone, rel=1e-5)  # before the first step
    assert losses(config, "loss")[0] == pytest.approx(alone, rel=1e-5)
    assert losses(config, "eval_loss")[-1] < alone - 0.05
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, parted, 3)
        run(parted)
    run(parted, resume=True)
    records = [comparable_records(Path(one.output) / "metrics.jsonl") for one in (config, parted)]
    assert records[0] == records[1]


@pytest.mark.slow
def test_only_the_held_out_rows_are_trees(tmp_path: Path):
    config = chats_project(tmp_path, turns=ONE_TURN)
    run(config)
    session = session_of(config)
    assert (
        not session.run.inputs.dataset.branching
        and session.run.inputs.dataset.eval is not None
        and session.run.inputs.dataset.eval.branching
    )
    assert set(next(session.run.inputs.dataset.train_batches()).arrays()) == {"inputs", "targets", "weights"}
    assert losses(config, "loss")[0] == pytest.approx(mean_loss_alone(session, ONE_TURN), rel=1e-5)
    assert losses(config, "eval_loss")[0] == pytest.approx(mean_loss_alone(session, TURNS), rel=1e-5)


def test_a_plan_has_the_arrays_of_the_trees(tmp_path: Path):
    config, target = chats_project(tmp_path), plan_target("cpu", None)
    settings = {name: dataclasses.asdict(getattr(config, name)) for name in ("model", "data", "train")}
    args = from_dict(PlanArgs, settings)
    rows, problem = planned_rows(args)
    step, *_ = step_configs(args, target, rows)  # the others are on meshes
    batch = next(open_inputs(config).dataset.train_batches()).arrays()
    assert problem is None and {"parents", "depths"} <= batch.keys()
    assert {name: leaf.shape for name, leaf in step.batch_arrays().items()} == {
        name: array.shape for name, array in batch.items()
    }
