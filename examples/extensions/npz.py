"""An export format, as a package of its own adds it to qlora_jax: the adapter's arrays in one NumPy file."""

from pathlib import Path

import numpy as np

from qlora_jax.atomic_files import staged_folder
from qlora_jax.config.exports import ExportDeclaration, ExportOptions
from qlora_jax.io.export.result import ExportResult
from qlora_jax.io.pretrained import OpenedModel


def run(opened: OpenedModel, output: Path, options: ExportOptions) -> ExportResult:
    if opened.run is None:
        raise ValueError(f"{opened.source.path}: a base model has no adapter to export. Open a run")
    if options.with_base:
        raise ValueError("--with_base: not with --format npz. Remove it")
    arrays = {
        f"{module}.{leaf}": np.asarray(values)
        for module, leaves in opened.run.lora.items()
        for leaf, values in leaves.items()
    }
    with staged_folder(output) as folder:
        np.savez(folder / "adapter.npz", **arrays)  # pyright: ignore[reportArgumentType]
    return ExportResult(path=output, lines=(f"{len(arrays)} arrays of {opened.run.label}: {output}",))


DECLARATION = ExportDeclaration(implementation=run, merged=False)
