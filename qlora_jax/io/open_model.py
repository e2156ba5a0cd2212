"""Opens a model of any format, from a path or by its name on the Hub."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from qlora_jax.io.gguf.reader import open_gguf
from qlora_jax.io.hf.hub import fetch_model, hub_name_of
from qlora_jax.io.hf.reader import open_folder
from qlora_jax.model_source import ModelSource


def open_model(path: str | Path, before_weights: Callable[[], object] = lambda: None) -> ModelSource:
    """Opens a Hugging Face folder, a GGUF file, or `org/name` on the Hub, which is fetched unless it is cached.

    Metadata is read and checked; tensors are not read.

    Args:
      before_weights: called when the model's description is known to be supported, before weights are fetched or
        looked at. A GGUF file on the Hub contains its description, so it is called before that file is fetched.

    Raises:
      ValueError: there is nothing at `path`; the format is unknown; a file is truncated, corrupt or not supported; or a
        model cannot be fetched from the Hub.
    """
    on_hub = hub_name_of(path)
    if on_hub is not None:
        fetched = fetch_model(on_hub, before_weights)
        return dataclasses.replace(_open(fetched.path, lambda: None), hub_name=str(fetched.name))
    return _open(Path(path).expanduser(), before_weights)


def _open(path: Path, before_weights: Callable[[], object]) -> ModelSource:
    if path.is_dir():
        return open_folder(path, before_weights)
    if path.is_file() and path.suffix != ".safetensors":
        source = open_gguf(path)
        before_weights()
        return source
    if path.is_file():
        raise ValueError(
            f"{path}: a weight file, expected a model. Give its folder, which has config.json: {path.parent}"
        )
    raise ValueError(
        f"{path}: no such file or folder. Give a Hugging Face folder (config.json and safetensors files), a .gguf "
        "file, or a name on the Hub: org/name, org/name@revision or org/name/file.gguf"
    )
