"""A tiny model and its data, and one finetuned run that the tests of this folder share."""

from pathlib import Path
from typing import NamedTuple

import pytest

import qlora_jax as q
from qlora_jax.api.finetune import FinetuneRun
from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.models.decoder import CausalLM
from tests.e2e.project import write_model, write_rows

# Settings of a run of three quick steps.
QUICK = {"steps": 3, "micro_batch_size": 2, "accumulation": 2, "max_length": 160, "learning_rate": 1e-2}


class Project(NamedTuple):
    """A model folder, a file of rows, a base, the base with a fresh adapter, and the run that trained it."""

    model_folder: Path
    rows: Path
    tokenizer: Tokenizer
    base: CausalLM
    adapted: CausalLM
    run: FinetuneRun


@pytest.fixture(scope="session")
def project(tmp_path_factory) -> Project:
    folder = tmp_path_factory.mktemp("api")
    path, rows = write_model(folder / "model"), write_rows(folder / "rows.jsonl")
    base, tokenizer = q.load(str(path), compute_dtype="float32")
    adapted = q.add_adapter(base, q.LoRA(rank=4, dropout=0.1))
    run = q.finetune(adapted, tokenizer, rows, output=folder / "run", eval_fraction=0.2, **QUICK)
    return Project(path, rows, tokenizer, base, adapted, run)
