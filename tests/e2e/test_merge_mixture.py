"""Whole runs with `lora.merge_into` of a mixture: types are found once, and codes are those of the exported file."""

import dataclasses
import json
from pathlib import Path

import pytest

from qlora_jax.config import read_config
from qlora_jax.export import main
from tests.e2e.project import TEMPLATE, stop_after
from tests.e2e.test_merge_into import merged_project
from tests.e2e.test_paging import assert_same_runs
from tests.e2e.tiny_runs import numbers, run
from tests.io.tiny_tokenizers import byte_level

WIDE = dict(hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2, head_dim=64)
WIDE |= dict(vocab_size=460, bos_token_id=1, eos_token_id=2)


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.usefixtures("quantizer")
def test_resume_and_export_need_no_quantizer(tmp_path, monkeypatch, capsys):
    case = dict(lora=dict(merge_into="q4_k_m"), model=dict(quant_type="none"))
    config = merged_project(tmp_path / "whole", case, WIDE)
    model, named = Path(config.model.path), {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    (model / "tokenizer.json").write_text(byte_level())  # one that GGUF's metadata can describe
    template = TEMPLATE.replace("</s>", "<|im_end|>").replace("<s>", "<|im_start|>")
    (model / "tokenizer_config.json").write_text(json.dumps(named | {"chat_template": template}))
    assert run(config)
    losses = [record["eval_loss"] for record in numbers(config) if "eval_loss" in record]
    assert losses[-1] < 0.9 * losses[0]
    resumed = dataclasses.replace(config, output=str(tmp_path / "resumed"))
    with monkeypatch.context() as patch:
        stop_after(patch, resumed, 4)
        assert not run(resumed)
    monkeypatch.undo()  # the package is not there any more
    with pytest.raises(ValueError, match=r"requires llama\.cpp's quantizer"):
        run(dataclasses.replace(config, output=str(tmp_path / "new")))
    assert run(resumed, resume=True)
    assert_same_runs(resumed, config)
    types = read_config(Path(config.output) / "config.yaml").lora.merge_types
    assert types["self_attn.q_proj"] == "Q4_K" and types["mlp.down_proj"] == "Q4_K Q6_K"
    main(["--run", resumed.output, "--format", "gguf", "--output", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "weights are those that training computed with" in printed and "q4_k" in printed, printed
