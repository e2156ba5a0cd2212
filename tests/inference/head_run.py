"""The folder of a run with a sequence head that does something; nothing is trained."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.config import Config, DataArgs, LoraArgs, ModelArgs, write_config
from qlora_jax.io.head_file import write_head
from qlora_jax.io.loading.loader import load_model
from qlora_jax.io.open_model import open_model
from qlora_jax.io.run_folder.checkpoint import CONFIG_FILE, Checkpoints
from qlora_jax.methods.attach import attach_method
from qlora_jax.models.families import model_config
from qlora_jax.models.partition import partition
from qlora_jax.models.precision import weight_format
from qlora_jax.objectives.head_objective import TrainedHead
from tests.e2e.project import write_model


def write_head_run(folder: Path, head: TrainedHead) -> Path:
    """Writes folder/model and folder/run, whose adapter and head are random."""
    path = write_model(folder / "model")
    config = Config(
        model=ModelArgs(path=str(path), compute_dtype="float32"),
        lora=LoraArgs(rank=2),
        data=DataArgs(train="rows.jsonl"),
        objective=head.objective,
        output=str(folder / "run"),
    )
    config = dataclasses.replace(config, head=dataclasses.replace(config.head, pooling=head.pooling))
    source = open_model(path)
    features = model_config(source.config)
    loaded = load_model(source, features, weight_format(config.model, features))
    attach_method(loaded.model, config.lora, jax.random.key(0))
    loaded.model.add_sequence_head(head.spec(), jax.random.key(0))
    run, rng = folder / "run", np.random.default_rng(0)
    run.mkdir()
    random = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), jnp.float32), partition(loaded.model).lora
    )
    write_config(config, run / CONFIG_FILE)
    write_head(run, head)
    with Checkpoints(run, keep=1) as checkpoints:
        checkpoints.save(1, random, {"count": np.int32(1)}, {"fingerprint": loaded.fingerprint})
    return run
