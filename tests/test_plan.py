"""The command `plan`: its table, its JSON, its exit code, and what it reports while it compiles."""

import json

import pytest

import qlora_jax as q
from qlora_jax import plan as command
from qlora_jax.config import DataArgs
from qlora_jax.config.sizes import format_bytes
from qlora_jax.data.dataset import load_dataset
from qlora_jax.data.tokenizer.tokenizer import load_tokenizer
from qlora_jax.io.open_model import open_model
from qlora_jax.training.plan import run_plan
from tests.e2e.project import write_model, write_rows
from tests.io.tiny_models import random_weights, tiny_config
from tests.training.plan.steps import Compiler


@pytest.fixture
def compiler(monkeypatch) -> Compiler:
    """A compiler in place of XLA's, for the sake of speed."""
    made = Compiler()
    monkeypatch.setattr(run_plan, "compiler_for", lambda target: (made, None))
    return made


def test_it_prints_a_table_or_json_and_says_by_its_exit_whether_it_fits(tmp_path, capsys, compiler):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    base = ["--model", str(tmp_path), "--card", "cpu", "--data.max_length", "64", "--lora.rank", "4"]
    command.main(base)
    table, progress = capsys.readouterr()
    assert "saved activations" in table and "fits:" in table
    assert progress.startswith("compiling a step of 1 x 64 tokens, remat names (program 1 of at most 3; each usually")
    assert len(progress.splitlines()) == len(compiler.asked)
    with pytest.raises(SystemExit) as stopped:
        command.main([*base, "--memory", "100KiB", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert stopped.value.code == 1 and told["fits"] is False
    assert told["roofs"] is None and "roofs" not in table  # a CPU has none
    assert told["asked"]["total"] == sum(told["asked"]["device"].values()) > told["limit"]
    with pytest.raises(ValueError, match="longer than the model allows"):
        command.main([*base[:-4], "--data.max_length", "100000"])


@pytest.mark.slow
def test_it_plans_for_the_lengths_that_rows_have(tmp_path, capsys, compiler):
    model, rows = write_model(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl")
    given = ["--card", "cpu", "--data.train", str(rows), "--data.max_length", "250", "--lora.rank", "4", "--json"]
    options = [*given, "--train.accumulation", "1", "--train.micro_batch_size", "2"]
    command.main(["--model", str(model), *options])
    told = json.loads(capsys.readouterr().out)
    data = DataArgs(train=str(rows), max_length=250)
    tokenizer = load_tokenizer(open_model(model).tokenizer)
    dataset = load_dataset(data, tokenizer, seed=0, micro_batch_size=2, accumulation=1)
    lengths = [need["batch"][2] for need in (told["asked"], *told["shorter"])]
    assert lengths == sorted(dataset.buckets, reverse=True) and len(lengths) > 1 and lengths[0] < 250
    command.main(["--model", str(model / "config.json"), *options])
    told, notes = capsys.readouterr()
    assert json.loads(told)["asked"]["batch"] == [1, 2, 250]
    assert "every row counts as 250 tokens (data.max_length)" in notes


def test_a_config_that_is_not_supported_is_one_clear_error(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config() | {"model_type": "mamba"}))
    with pytest.raises(ValueError, match="mamba"):
        command.main(["--model", str(tmp_path), "--card", "cpu"])


def test_it_counts_the_replies_of_a_rollout_phase(tmp_path, capsys, compiler):
    config = tiny_config()
    (tmp_path / "config.json").write_text(json.dumps(config))
    base = ["--model", str(tmp_path), "--card", "cpu", "--data.max_length", "64", "--lora.rank", "4"]
    base += ["--model.compute_dtype", "float32", "--objective", "grpo", "--rollouts.max_completion_length", "16"]
    base += ["--train.micro_batch_size", "2", "--train.accumulation", "3"]
    command.main([*base, "--json"])
    told = json.loads(capsys.readouterr().out)
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    of_token = 2 * 4 * config["num_hidden_layers"] * config["num_key_value_heads"] * head_dim
    least = 16 * 64 * of_token  # 16 replies are sampled together
    assert told["rollouts"]["replies"] == 2 * 3 * 8 and least <= told["rollouts"]["cache"] <= 1.5 * least
    assert least < told["rollouts"]["total"] < told["limit"] and told["fits"]
    command.main([*base, "--rollouts.cache", "20KiB"])
    assert "rollouts of 48 replies" in (table := capsys.readouterr().out) and "20.00 KiB for keys" in table


def test_it_counts_the_teacher(tmp_path, capsys, compiler):
    config = tiny_config()
    (tmp_path / "config.json").write_text(json.dumps(config))
    base = ["--model", str(tmp_path), "--card", "cpu", "--data.max_length", "64", "--lora.rank", "4"]
    base += ["--model.compute_dtype", "bfloat16", "--distillation.teacher"]
    command.main([*base, "base", "--objective", "distill", "--json"])
    told = json.loads(capsys.readouterr().out)
    in_16_bits = sum(2 * array.size for array in random_weights(config).values())
    assert told["teacher"] == {"nbytes": in_16_bits, "stays": False} and told["fits"]
    sampled = ["--objective", "gkd", "--rollouts.max_completion_length", "16"]
    command.main([*base, "base", *sampled])
    assert f"teacher: {format_bytes(in_16_bits)}, next to the model\n" in capsys.readouterr().out
    command.main([*base, "http://a/v1", "--objective", "distill", "--distillation.teacher_model", "m"])
    assert "teacher: behind an endpoint, takes no memory here\n" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"distillation.teacher: missing"):
        q.make_plan(str(tmp_path), card="cpu", config={"objective": "distill"})
    memory = f"{told['asked']['total'] + in_16_bits // 2}B"
    with pytest.raises(SystemExit):
        command.main([*base, "base", *sampled, "--memory", memory])
    assert "with it the run DOES NOT FIT: choose a smaller teacher" in capsys.readouterr().out
