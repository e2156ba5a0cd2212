"""Opens a model on disk, whatever its format."""

from pathlib import Path

from qlora_jax.io.entries import ModelSource
from qlora_jax.io.gguf import open_gguf
from qlora_jax.io.safetensors import open_folder


def open_model(path: str | Path) -> ModelSource:
    """The model at `path`, a Hugging Face folder or a GGUF file: metadata read and checked, tensors not yet read.

    Raises:
      ValueError: nothing there, an unknown format, or a file that is truncated, corrupt or not supported.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return open_folder(path)
    if path.is_file() and path.suffix != ".safetensors":
        return open_gguf(path)
    if path.is_file():
        raise ValueError(f"{path} is a weight file: give its folder, which holds config.json too: {path.parent}")
    raise ValueError(
        f"{path}: no such file or folder. Models are read from disk: give a Hugging Face folder (config.json and "
        "safetensors files) or a .gguf file, downloaded first."
    )
