"""Training starts from an adapter with a head only under the objective, labels and pooling that trained it."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from qlora_jax.config import LoraArgs
from qlora_jax.io.head_file import HEAD_FILE, write_head
from qlora_jax.io.peft.head_adapters import with_head
from qlora_jax.io.peft.reader import read_adapter
from qlora_jax.io.peft.start_adapter import read_start_adapter
from qlora_jax.io.peft.writer import in_peft_format, write_adapter
from qlora_jax.objectives.head_objective import TrainedHead
from tests.io.peft.test_reader import ARGS, MODEL, random_lora

LORA = LoraArgs(rank=4, alpha=8.0, rank_pattern={"down_proj": 2})
HEAD = TrainedHead(objective="classification", labels=("no", "yes"))


def write(folder: Path, head: TrainedHead, args: LoraArgs = ARGS) -> Path:
    lora = random_lora()
    score = {"score": {"weight": np.ones((64, head.outputs), np.float32)}} if head.outputs else {}
    config, tensors = in_peft_format(lora, args, MODEL, "a/base")
    config, tensors = with_head(config, tensors, score, head, MODEL)
    write_adapter(folder, tensors, config)
    return folder


def described(folder: Path, head: TrainedHead) -> Path:
    write_head(folder, head)
    return folder


@pytest.mark.parametrize(
    "other",
    [
        dataclasses.replace(HEAD, labels=("yes", "no")),
        TrainedHead(objective="multi_label", labels=HEAD.labels),
        dataclasses.replace(HEAD, pooling="mean"),
        None,
    ],
    ids=str,
)
def test_another_head_is_refused_with_both(tmp_path: Path, other: TrainedHead | None):
    folder = described(write(tmp_path, HEAD), HEAD)
    assert "score" in read_start_adapter(folder, MODEL, LORA, (), HEAD)
    with pytest.raises(ValueError) as caught:
        read_start_adapter(folder, MODEL, LORA, (), other)
    assert f"found {HEAD}; expected {other or 'none'}" in str(caught.value)


def test_an_adapter_of_another_library_is_compared_by_size(tmp_path: Path):
    folder = write(tmp_path, HEAD)
    assert not (folder / HEAD_FILE).exists()
    assert "score" in read_start_adapter(folder, MODEL, LORA, (), HEAD)
    with pytest.raises(ValueError, match="objective=reward"):
        read_start_adapter(folder, MODEL, LORA, (), TrainedHead(objective="reward"))


def test_an_embedding_adapter_starts_other_objectives_but_no_other_pooling(tmp_path: Path):
    last = TrainedHead(objective="embedding")
    folder = described(write(tmp_path, last), last)
    for head in (None, HEAD, last):
        assert read_start_adapter(folder, MODEL, LORA, (), head).keys() == random_lora().keys()
    with pytest.raises(ValueError, match="pooling=mean"):
        read_start_adapter(folder, MODEL, LORA, (), dataclasses.replace(last, pooling="mean"))


def test_patterns_of_an_embedding_adapter_name_modules_of_the_body(tmp_path: Path):
    patterns = {"model.layers.0.mlp.down_proj": 2, r"^model\.layers\.1\.mlp\.down_proj": 2}
    folder = write(tmp_path, TrainedHead(objective="embedding"), dataclasses.replace(ARGS, rank_pattern=patterns))
    assert read_adapter(folder, MODEL).args.rank_pattern == {
        "layers.0.mlp.down_proj": 2,
        r"^layers\.1\.mlp\.down_proj": 2,
    }
