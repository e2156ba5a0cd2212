"""Exported files end replies where the run's own replies end, and hold the chat template that it was trained with."""

import json
from pathlib import Path

import jax
import pytest

import qlora_jax as q
from qlora_jax.io.export.result import ExportResult
from qlora_jax.io.open_model import open_model
from qlora_jax.models.decoder import CausalLM
from tests.e2e.project import write_model

TURNS = ["<|im_start|>", "<|im_end|>"]
IDS = (258, 259)  # after the vocabulary of `write_model`


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> CausalLM:
    """A base model whose adapter learns ChatML, of which its files know nothing."""
    folder = write_model(tmp_path_factory.mktemp("base") / "model")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"]["use_regex"] = True  # GGUF's gpt2
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    base, _ = q.load(str(folder), new_special_tokens=TURNS, chat_template="chatml", compute_dtype="float32")
    return q.add_adapter(base, q.LoRA(rank=2), key=jax.random.key(0))


def test_a_merged_folder_lists_the_end_of_a_turn(model: CausalLM, tmp_path: Path):
    q.merge(model, tmp_path / "hf", dtype="float32")
    assert json.loads((tmp_path / "hf/generation_config.json").read_text())["eos_token_id"] == [257, IDS[1]]
    assert "<|im_start|>" in (tmp_path / "hf/chat_template.jinja").read_text()


def test_a_gguf_file_lists_the_end_of_a_turn(model: CausalLM, tmp_path: Path):
    written: ExportResult = q.merge(model, tmp_path / "gguf", format="gguf", dtype="float32")
    (file,) = written.path.glob("*.gguf")
    assert open_model(file).tokenizer["stop_token_ids"] == [257, IDS[1]]

    # A run of that file with another template, whose end of a turn the file does not list.
    template = tmp_path / "own.jinja"
    template.write_text("{% for m in messages %}{{ m.role + ':' + m.content + '<|im_start|>' }}{% endfor %}")
    base, _ = q.load(str(file), chat_template=str(template), compute_dtype="float32")
    own = q.add_adapter(base, q.LoRA(rank=2), key=jax.random.key(1))
    written = q.merge(own, tmp_path / "own", format="gguf", dtype="float32")
    (file,) = written.path.glob("*.gguf")
    assert open_model(file).tokenizer["stop_token_ids"] == [257, IDS[1], IDS[0]]
    assert open_model(file).tokenizer["chat_template"] == template.read_text()
    told = str(q.save_peft(own, tmp_path / "lora", format="gguf-lora"))
    assert f"--chat-template-file {tmp_path / 'lora/chat_template.jinja'}" in told
    assert (tmp_path / "lora/chat_template.jinja").read_text() == template.read_text()


def test_an_adapter_has_its_template(model: CausalLM, tmp_path: Path):
    told = str(q.save_peft(model, tmp_path / "peft"))
    assert f"pass eos_token_id=[257, {IDS[1]}] to generate" in told
    assert "<|im_start|>" in (tmp_path / "peft/chat_template.jinja").read_text()


def test_an_adapter_without_new_tokens_is_opened_with_its_template(tmp_path: Path):
    path = write_model(tmp_path / "model")
    (path / "generation_config.json").write_text('{"eos_token_id": 257}')
    base, tokenizer = q.load(str(path), chat_template="zephyr", compute_dtype="float32")
    model = q.add_adapter(base, q.LoRA(rank=2), key=jax.random.key(0))
    assert "eos_token_id" not in str(q.save_peft(model, tmp_path / "peft"))  # zephyr ends turns with eos
    adapter, found = q.load(str(tmp_path / "peft"))
    assert found.chat_template == tokenizer.chat_template
    q.save_peft(adapter, tmp_path / "again")
    assert (tmp_path / "again/chat_template.jinja").read_text() == tokenizer.chat_template


def test_a_base_that_does_not_list_its_own_end_of_a_turn(tmp_path: Path):
    path = write_model(tmp_path / "model")
    changed = json.loads((path / "tokenizer_config.json").read_text())
    template = "{% for m in messages %}{{ m.role + ':' + m.content + '<s>' }}{% endfor %}"
    (path / "tokenizer_config.json").write_text(json.dumps(changed | {"chat_template": template}))
    base, _ = q.load(str(path), compute_dtype="float32")
    told = str(q.save_peft(q.add_adapter(base, q.LoRA(rank=2), key=jax.random.key(0)), tmp_path / "peft"))
    assert "pass eos_token_id=[256, 257] to generate" in told
    assert not (tmp_path / "peft/tokenizer.json").exists()
