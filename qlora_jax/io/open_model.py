"""Opens a model, whatever its format, on disk or by its name on the Hub."""

import dataclasses
from pathlib import Path

from qlora_jax.io.gguf.reader import open_gguf
from qlora_jax.io.hf.hub import fetch_model, named
from qlora_jax.io.hf.reader import open_folder
from qlora_jax.io.model_source import ModelSource


def open_model(path: str | Path) -> ModelSource:
    """The model at `path`, a Hugging Face folder, a GGUF file, or `org/name` on the Hub, fetched unless it is cached.

    Metadata is read and checked, tensors are not yet read.

    Raises:
      ValueError: nothing there, an unknown format, a file that is truncated, corrupt or not supported, or (of the Hub)
        whatever keeps a model from being fetched.
    """
    on_hub = named(path)
    if on_hub is not None:
        fetched = fetch_model(on_hub)
        return dataclasses.replace(_open(fetched.path), hub_name=str(fetched.name))
    return _open(Path(path).expanduser())


def _open(path: Path) -> ModelSource:
    if path.is_dir():
        return open_folder(path)
    if path.is_file() and path.suffix != ".safetensors":
        return open_gguf(path)
    if path.is_file():
        raise ValueError(f"{path} is a weight file: give its folder, which holds config.json too: {path.parent}")
    raise ValueError(
        f"{path}: no such file or folder. Give a Hugging Face folder (config.json and safetensors files), a .gguf "
        "file, or a name on the Hub: org/name, org/name@revision or org/name/file.gguf"
    )
