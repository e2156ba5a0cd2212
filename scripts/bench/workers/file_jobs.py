"""Worker of bench/versions.py: one sample of a job per line on standard input, one line of JSON per sample.

    python scripts/bench/workers/file_jobs.py JOB FOLDER

It runs as a file and imports qlora_jax from PYTHONPATH, so that it can measure other versions of the package. A record
has the seconds that passed, and the processor seconds of the process and its children. FOLDER is what bench/versions.py
prepared.
"""

import contextlib
import itertools
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from qlora_jax import allocator

if __name__ == "__main__":
    allocator.tune()  # restarts the process, so it comes before slow imports

import jax
import jax.numpy as jnp
from flax import nnx

from qlora_jax import export, runtime
from qlora_jax.config import DataArgs
from qlora_jax.data.dataset import load_dataset
from qlora_jax.data.encoder import CHUNK, make_encoder
from qlora_jax.data.formats.detect import detect_format
from qlora_jax.data.readers.files import read_rows
from qlora_jax.data.tokenizer.tokenizer import Tokenizer, load_tokenizer, with_chat_template
from qlora_jax.io.loading.loader import load_model
from qlora_jax.io.open_model import open_model
from qlora_jax.io.run_folder.checkpoint import Checkpoints
from qlora_jax.models.config import WeightFormat
from qlora_jax.models.families import model_config

CHECKPOINT_VALUES = 1 << 24  # float32 parameters; with both moments of Adam, 192 MiB
PROJECTIONS = 7

Job = Callable[[], object]


def render(folder: Path, name: str) -> Job:
    """Renders the rows of a file, with the process for templates running."""
    path = folder / f"{name}.jsonl"
    rows = read_rows(path)
    encoder = make_encoder(detect_format(str(path), rows), _tokenizer(folder, name))

    def work() -> None:
        for chunk in itertools.batched(rows, CHUNK):
            encoder.segment_rows(chunk, problems := [])
            assert not problems, problems[0]

    return work


def load_data(folder: Path, name: str) -> Job:
    """Loads a data set from its file and makes its first batch, with the process for templates running."""
    data = DataArgs(train=str(folder / f"{name}.jsonl"), max_length=2048, packing=True)
    tokenizer = _tokenizer(folder, name)

    def work() -> None:
        next(load_dataset(data, tokenizer, seed=0, micro_batch_size=1, accumulation=16).train_batches())

    return work


def _tokenizer(folder: Path, name: str) -> Tokenizer:
    tokenizer = load_tokenizer(open_model(folder / "hf").tokenizer)
    template = folder / f"{name}.jinja"
    return with_chat_template(tokenizer, template) if template.exists() else tokenizer


def in_new_process(folder: Path, job: str) -> Job:
    """Takes one sample of another job in a new process, from its start to its end."""
    command = [sys.executable, "-P", __file__, job, str(folder)]
    return lambda: subprocess.run(command, input=b"\n", check=True, capture_output=True)


def read(folder: Path, name: str) -> Job:
    """Reads the rows of a file."""
    return lambda: read_rows(folder / name)


def tokenizer_json(folder: Path) -> Job:
    """Loads the tokenizer of a Hugging Face folder, its model files opened before."""
    from qlora_jax.io.hf.tokenizer import read_tokenizer

    return lambda: load_tokenizer(read_tokenizer(folder / "hf"))


def load(folder: Path, model: str) -> Job:
    """Loads a model as training does."""

    def work() -> None:
        source = open_model(folder / model)
        load_tokenizer(source.tokenizer)
        loaded = load_model(source, model_config(source.config), WeightFormat())
        jax.block_until_ready(jax.tree.leaves(nnx.state(loaded.model)))

    return work


def save(folder: Path) -> Job:
    """Saves a checkpoint of 192 MiB, with one kept, as in a run."""
    lora, moments = _checkpoint_trees()
    checkpoints, steps = Checkpoints(_scratch(), keep=1), itertools.count()
    return lambda: checkpoints.save(next(steps), lora, moments, {})


def restore(folder: Path) -> Job:
    """Restores a checkpoint of 192 MiB."""
    lora, moments = _checkpoint_trees()
    checkpoints = Checkpoints(_scratch(), keep=1)
    checkpoints.save(1, lora, moments, {"step": 1})
    return lambda: jax.block_until_ready(checkpoints.restore(lora, moments)[:2])


def _checkpoint_trees() -> tuple[dict, dict]:
    shape = (2, 32, CHECKPOINT_VALUES // (64 * 2 * PROJECTIONS))
    keys = iter(jax.random.split(jax.random.key(0), 6 * PROJECTIONS))

    def tree() -> dict:
        leaves = ("lora_a", "lora_b")
        return {f"p{i}": {leaf: jax.random.normal(next(keys), shape) for leaf in leaves} for i in range(PROJECTIONS)}

    return tree(), {"count": jnp.zeros((), jnp.int32), "mu": tree(), "nu": tree()}


def exported(folder: Path, *options: str) -> Job:
    """Runs the command `export`, which loads the run and writes a new folder."""
    output = _scratch() / "exported"

    def work() -> None:
        shutil.rmtree(output, ignore_errors=True)
        export.main(["--run", str(folder / "run"), "--output", str(output), *options])

    return work


def _scratch() -> Path:
    """Returns a folder that bench/versions.py removes."""
    return Path(tempfile.mkdtemp())


JOBS: dict[str, Callable[[Path], Job]] = {
    "render": lambda folder: render(folder, "chat"),
    "render-tools": lambda folder: render(folder, "tools"),
    "read-jsonl": lambda folder: read(folder, "chat.jsonl"),
    "read-gzip": lambda folder: read(folder, "chat.jsonl.gz"),
    "load-data": lambda folder: load_data(folder, "chat"),
    "load-data-tools": lambda folder: load_data(folder, "tools"),
    "start": lambda folder: in_new_process(folder, "load-data"),
    "start-tools": lambda folder: in_new_process(folder, "load-data-tools"),
    "tokenizer": tokenizer_json,
    "load-safetensors": lambda folder: load(folder, "hf"),
    "load-gguf": lambda folder: load(folder, "model.gguf"),
    "save": save,
    "restore": restore,
    "export-peft": lambda folder: exported(folder, "--format", "peft", "--with_base"),
    "export-hf": lambda folder: exported(folder, "--format", "hf"),
    "export-gguf": lambda folder: exported(folder, "--format", "gguf"),
}


def processor_seconds() -> float:
    """Returns the processor time of this process and all its children."""
    own, ended = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    running = sum(int(Path(f"/proc/{child}/schedstat").read_text().split()[0]) for child in _children())
    return own.ru_utime + own.ru_stime + ended.ru_utime + ended.ru_stime + running * 1e-9


def _children() -> Iterator[str]:
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the thread has ended
            yield from (task / "children").read_text().split()


def main() -> None:
    """Prepares the job, then takes one sample per input line; the job prints to standard error."""
    runtime.start()
    replies, sys.stdout = sys.stdout, sys.stderr
    work = JOBS[sys.argv[1]](Path(sys.argv[2]))
    for _ in sys.stdin:
        began, computed = time.perf_counter(), processor_seconds()
        work()
        record = {"seconds": time.perf_counter() - began, "processor_seconds": processor_seconds() - computed}
        print(json.dumps(record), file=replies, flush=True)


if __name__ == "__main__":
    main()
