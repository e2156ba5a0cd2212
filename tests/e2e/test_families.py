"""Whole runs of the families that differ most from Llama: training, generation and export."""

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from qlora_jax.inference.decode import generate
from qlora_jax.inference.sampling_params import Sampling
from qlora_jax.io.export.merged import export_merged
from qlora_jax.io.export.peft import export_peft
from qlora_jax.io.open_model import open_model
from qlora_jax.io.peft.reader import read_adapter
from qlora_jax.io.pretrained import apply_adapter, load_base, open_finetuned, open_pretrained
from qlora_jax.training.metrics.metrics_file import read_metrics
from qlora_jax.training.run import train
from tests.e2e.project import TEMPLATE, byte_tokenizer_json, project
from tests.io.gguf_families import FAMILIES, random_tensors
from tests.io.tiny_models import write_folder
from tests.marks import some_in_ci

VOCABULARY = dict(vocab_size=258, max_position_embeddings=256, bos_token_id=256, eos_token_id=257)
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "chat_template": TEMPLATE}


def write_model(folder: Path, name: str) -> Path:
    """Writes a random model of a family with a byte tokenizer."""
    config = FAMILIES[name][1] | VOCABULARY
    files = {"tokenizer.json": byte_tokenizer_json(), "tokenizer_config.json": json.dumps(SPECIAL)}
    return write_folder(folder, config, random_tensors(config), **files)


def _train(config, resume: bool = False):
    settings = dict(resume=resume, oversized=False, console=Console(file=io.StringIO()))
    return train(config, Path(config.output), **settings).finished


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", some_in_ci([("gptneox",), ("gemma3",), ("smollm3",), ("phi3, longrope",)], lambda i: i < 2)
)
def test_a_whole_run(tmp_path: Path, name: str) -> None:
    whole = project(tmp_path / "run", model=dict(path=str(write_model(tmp_path / "model", name))), train=dict(steps=8))
    _train(whole)
    losses = [record["loss"] for record in read_metrics(Path(whole.output) / "metrics.jsonl") if "loss" in record]
    assert len(losses) == 8 and np.mean(losses[-3:]) < np.mean(losses[:3])
    opened = open_pretrained(run=whole.output)
    assert opened.run is not None
    parts = apply_adapter(load_base(opened, opened.args), opened.run)
    prompts = [opened.tokenizer.encode("say sun 1"), opened.tokenizer.encode("say moon")]
    replies = generate(parts, prompts, sampling=Sampling(), max_new_tokens=5, stop_ids=[257])
    assert all(reply.ids or reply.end == "stop" for reply in replies)
    export_peft(open_finetuned(whole.output), tmp_path / "peft")
    adapter = read_adapter(tmp_path / "peft", opened.features)
    for module, matrices in opened.run.lora.items():
        for matrix, values in matrices.items():
            np.testing.assert_array_equal(adapter.lora[module][matrix], values)
    assert dataclasses.replace(adapter.args, target_modules=whole.lora.target_modules) == whole.lora
    # The merge is compared with base and adapter as it is exported.
    export_merged(open_finetuned(whole.output), tmp_path / "merged", "hf", dtype="float32")
    assert open_model(tmp_path / "merged").tensors.keys() == opened.source.tensors.keys()
