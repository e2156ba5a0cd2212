"""The inputs of a run: settings that the model cannot have are refused before its data is read."""

from pathlib import Path
from typing import Any

import pytest

from qlora_jax.config import Config, DataArgs, LoraArgs, ModelArgs
from qlora_jax.training.run_spec import open_inputs
from tests.e2e.project import write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelArgs:
    return ModelArgs(path=str(write_model(tmp_path_factory.mktemp("model"))))


@pytest.mark.parametrize(
    ("lora", "problem"),
    [
        ({"target_modules": ["w_pack"]}, "lora.target_modules: 'w_pack' matches none of the linear layers"),
        ({"rank_pattern": {"w_pack": 4}}, "lora.rank_pattern: 'w_pack' matches none"),
        ({"target_parameters": ["experts.down_proj"]}, "lora.target_parameters: .* the model has no experts"),
        ({"method": "vera", "target_modules": ["w_pack"]}, "'w_pack' matches none of the linear layers"),
        ({"method": "ia3", "feedforward_modules": ["w_pack"]}, "lora.feedforward_modules: 'w_pack' matches none"),
        ({"method": "oft", "oft_block_size": 48}, "lora.oft_block_size: found 48, but "),
        ({"method": "ln_tuning", "target_modules": ["w_pack"]}, "'w_pack' matches none of the norms"),
        ({"method": "bitfit"}, "lora.method=bitfit: the model has no bias that can train"),
    ],
)
def test_layers_that_the_model_lacks(model: ModelArgs, lora: dict[str, Any], problem: str, tmp_path: Path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    config = Config(model=model, lora=LoraArgs(**lora), data=DataArgs(train=str(rows), max_length=64), output="o")
    with pytest.raises(ValueError, match=problem):
        open_inputs(config)
