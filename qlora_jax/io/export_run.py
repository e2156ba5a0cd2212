"""Exports a run, from its checkpoint and its base on disk."""

from pathlib import Path

from rich.console import Console

from qlora_jax.data.tokenizer import load_tokenizer
from qlora_jax.io.checkpoint import Run, open_run
from qlora_jax.io.dense_folder import write_dense_folder, write_tokenizer
from qlora_jax.io.entries import ModelSource
from qlora_jax.io.folders import staged_folder
from qlora_jax.io.loader import load_model
from qlora_jax.io.peft import adapter_config, adapter_tensors, is_gguf, write_adapter
from qlora_jax.io.progress import loading
from qlora_jax.io.source import open_model
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.families import model_config
from qlora_jax.models.precision import weight_format

BASE = "base"


def export_peft(path: Path, output: Path, *, step: int | None, with_base: bool, console: Console) -> None:
    """Writes the adapter of the run at `path` to the new folder `output`, and with `with_base` its base to output/base.

    Raises:
      ValueError: no run or no such step, an output that is there already, or (with_base) another base than the run's.
    """
    run = open_run(path, step)
    source = open_model(run.config.model.path)
    features = model_config(source.config)
    base = (output / BASE if with_base else source.path).absolute()
    linears = [f"model.layers.{name}" for name in features.linear_shapes()]
    config = adapter_config(run.lora, run.config.lora, linears, str(base))
    with staged_folder(output) as folder:
        write_adapter(folder, adapter_tensors(run.lora), config)
        if with_base:
            _write_base(folder / BASE, run, source, features, console)
    _tell(output, run, base, console)


def _write_base(folder: Path, run: Run, source: ModelSource, features: ModelConfig, console: Console) -> None:
    """The base as the run saw it: quantized, and dequantized again."""
    with loading(console) as progress:
        loaded = load_model(source, features, weight_format(run.config.model), progress)
    if loaded.fingerprint != run.fingerprint:
        raise ValueError(
            f"{source.path} is not the base that {run.path} was trained on: its fingerprint is "
            f"{loaded.fingerprint[:12]}, expected {run.fingerprint[:12]}. Put the original files back."
        )
    folder.mkdir()
    write_dense_folder(folder, loaded.model, source.config)
    write_tokenizer(folder, load_tokenizer(source.tokenizer), source.tokenizer["stop_token_ids"])


def _tell(output: Path, run: Run, base: Path, console: Console) -> None:
    lines = [f"adapter of {run.path}, step {run.step}: {output}", f"its base model: {base}"]
    if is_gguf(str(base)):
        lines.append("peft loads no GGUF file: export again with --with-base to get a base that it loads")
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
