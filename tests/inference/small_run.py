"""A tiny model folder, and a run's folder over it with an adapter that does something; nothing is trained."""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.config import Config, DataArgs, LoraArgs, ModelArgs, write_config
from qlora_jax.io.loading.loader import load_model
from qlora_jax.io.open_model import open_model
from qlora_jax.io.run_folder.checkpoint import CONFIG_FILE, Checkpoints
from qlora_jax.methods.attach import attach_method
from qlora_jax.models.families import model_config
from qlora_jax.models.partition import partition
from qlora_jax.models.precision import weight_format
from tests.e2e.project import write_model

STEPS = (3, 7)


def write_run(folder: Path, seed: int = 0, keep_16bit: Sequence[str] = ()) -> Path:
    """folder/model and folder/run; the checkpoints of STEPS hold different random adapters."""
    path = write_model(folder / "model", seed)
    config = Config(
        model=ModelArgs(path=str(path), compute_dtype="float32", keep_16bit=[*keep_16bit]),
        lora=LoraArgs(rank=2),
        data=DataArgs(train="rows.jsonl"),
        output=str(folder / "run"),
    )
    source = open_model(path)
    features = model_config(source.config)
    loaded = load_model(source, features, weight_format(config.model, features))
    attach_method(loaded.model, config.lora, jax.random.key(0))
    lora = partition(loaded.model).lora
    run = folder / "run"
    run.mkdir()
    with Checkpoints(run, keep=2) as checkpoints:
        for step in STEPS:
            rng = np.random.default_rng(step)
            random = jax.tree.map(lambda leaf, rng=rng: jnp.array(rng.normal(0, 0.3, leaf.shape), jnp.float32), lora)
            checkpoints.save(step, random, {"count": np.int32(step)}, {"fingerprint": loaded.fingerprint})
    write_config(config, run / CONFIG_FILE)
    return run
