"""The examples of docs/extending.md train together."""

import re
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest

import qlora_jax as q
from qlora_jax.config.exports import EXPORTS
from qlora_jax.config.methods import METHODS
from qlora_jax.config.objectives import OBJECTIVES
from qlora_jax.config.row_formats import ROW_FORMATS
from qlora_jax.data.formats.registry import format_of
from tests.e2e.project import write_model

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "docs/extending.md").read_text(), re.DOTALL)


@pytest.fixture
def scope(monkeypatch: pytest.MonkeyPatch) -> dict:
    """The names that the examples define, in a module that declarations can name."""
    for registry in (EXPORTS, METHODS, OBJECTIVES, ROW_FORMATS):
        monkeypatch.setattr(registry, "_values", dict(registry.items()))
    module = types.ModuleType("extending_page")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for example in EXAMPLES:
        exec(compile(example, "extending.md", "exec"), module.__dict__)
    return module.__dict__


def test_what_the_page_registers_trains(scope: dict, tmp_path: Path):
    write_model(tmp_path / "model", attention_bias=True)
    rows = [{"riddle": f"{n} and {n}?", "solution": str(2 * n)} for n in range(8)]
    base, tokenizer = q.load(str(tmp_path / "model"), compute_dtype="float32")
    model = q.add_adapter(base, scope["spec"], key=jax.random.key(0))
    config = {"data.format": "riddles", "optim.warmup_ratio": 0.0}
    run = q.finetune(
        model, tokenizer, rows, output=str(tmp_path / "run"), objective="focal", steps=2, micro_batch_size=2,
        accumulation=1, max_length=64, learning_rate=0.1, config=config,
    )  # fmt: skip
    losses = [record["loss"] for record in run.metrics if "loss" in record]
    assert len(losses) == 2 and all(loss > 0 for loss in losses)
    assert format_of("riddles") is scope["riddles"]
    with pytest.raises(ValueError, match=r"cannot hold lora\.method=shift, because no other program has this adapter"):
        run.save_peft(str(tmp_path / "peft"))
    q.save_peft(run.model, tmp_path / "npz", format="npz")
    assert {name.rpartition(".")[2] for name in np.load(tmp_path / "npz/adapter.npz").files} == {"shift"}
    with pytest.raises(ValueError, match="format: found 'npz', expected hf or gguf"):
        q.merge(run.model, tmp_path / "other", format="npz")
    result = q.merge(run.model, str(tmp_path / "merged"), format="hf", dtype="float32")
    assert "merged" in str(result)
