"""Every file in configs/ is valid, and those named after the paper have the paper's numbers."""

from pathlib import Path

import pytest

from qlora_jax.config import Config, read_arguments

ROOT = Path(__file__).resolve().parent.parent.parent
FILES = sorted((ROOT / "configs").glob("*.yaml"))


def shipped(file: Path) -> Config:
    text = file.read_text()
    given = ["--config", str(file), "--model.path", "a model"]
    return read_arguments(given if "\n  train: " in text else [*given, "--data.train", "rows.jsonl"])


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_it_reads_and_its_data_is_there(file):
    config = shipped(file)
    assert config.output == f"runs/{file.stem}"
    named = [path for path in (config.data.train, config.data.eval) if path not in (None, "rows.jsonl")]
    assert [path for path in named if not (ROOT / path).exists()] == []


# Table 9 of the paper, column OASST1.
@pytest.mark.parametrize(
    ("size", "learning_rate", "dropout"),
    [("7b", 2e-4, 0.1), ("13b", 2e-4, 0.1), ("33b", 1e-4, 0.05), ("65b", 1e-4, 0.05)],
)
def test_guanaco_is_the_papers(size, learning_rate, dropout):
    config = shipped(ROOT / f"configs/guanaco_{size}.yaml")
    assert (config.optim.learning_rate, config.lora.dropout) == (learning_rate, dropout)
    assert (config.model.quant_type, config.model.double_quant, config.model.compute_dtype) == ("nf4", True, "bfloat16")
    assert (config.lora.rank, config.lora.alpha, config.lora.target_modules) == (64, 16.0, "all-linear")
    assert (config.optim.name, config.lora.dtype) == ("paged_adamw_32bit", "bfloat16")
    assert (config.optim.schedule, config.optim.beta2, config.optim.max_grad_norm) == ("constant", 0.999, 0.3)
    assert config.train.micro_batch_size * config.train.accumulation == 16
    assert config.train.steps == 1875
