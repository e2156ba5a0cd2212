"""Exported GGUF files, run by llama.cpp: it computes what our model computes, from the same ids."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax import quantize
from qlora_jax.config import LoraArgs
from qlora_jax.config.exports import EXPORTS
from qlora_jax.config.exports import MIXTURES as MIXED_TYPES
from qlora_jax.data.tokenizer.gguf_tokenizer import tokenizer_from_gguf
from qlora_jax.data.tokenizer.tokenizer import load_tokenizer
from qlora_jax.export import main
from qlora_jax.io.export.gguf_metadata import export_spec
from qlora_jax.io.export.verify import PROMPTS
from qlora_jax.io.gguf.writer import write_gguf
from qlora_jax.io.loading.loader import load_model
from qlora_jax.io.open_model import open_model
from qlora_jax.io.pretrained import apply_adapter, load_base, open_pretrained, weight_settings
from qlora_jax.models.config import WeightFormat
from qlora_jax.models.families import model_config
from qlora_jax.models.families.multimodal import with_text_attributes
from qlora_jax.models.partition import combine
from tests.data.tokenizer.test_gguf_tokenizer import TRICKY, _strings
from tests.io.export.test_gguf_metadata import CONFIGS
from tests.io.gguf_families import FAMILIES, MIXTURES, TEXT_HALVES, random_tensors, with_images
from tests.io.tiny_models import write_folder
from tests.io.tiny_tokenizers import CORPUS, byte_level
from tests.marks import some_in_ci
from tests.parity.test_peft import LORAS, _logits, _write_run
from tests.training.compiled_text import TO_READ

SCRIPT = Path(__file__).parent.parent / "oracle/llama_cpp_models.py"
VOCABULARY, LENGTH = 460, 19
NAMED = json.dumps({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"})
TOKENS = np.random.default_rng(0).integers(3, 370, (2, LENGTH)).astype(np.int32)
# Written from a folder alone: adapters, runs and merging do not depend on the architecture.
WITHOUT_RUN = ("olmo3", "exaone4", "exaone4, windows", "seed_oss", "glm4", "granite", "cohere2", "ministral3")
WITHOUT_RUN += (*MIXTURES, *TEXT_HALVES)
# llama.cpp does not use Phi-3's window, and turns by LongRoPE's factors as we do: one of the two files is enough.
ARCHITECTURES = [name for name in CONFIGS if name not in ("phi3", *WITHOUT_RUN)]
DEEPER = {"smollm3": dict(num_hidden_layers=4), "gemma3": dict(num_hidden_layers=7)}  # where layers differ
OLMO2_NORMS = ["post_attention_layernorm", "post_feedforward_layernorm", "norm", "q_norm", "k_norm"]
METHODS = {  # else LoRA
    "qwen2": LoraArgs(method="dora", rank=4, alpha=8.0),
    "qwen3": LoraArgs(method="ia3"),
    "gemma": LoraArgs(method="ln_tuning"),
    "olmo2": LoraArgs(method="ln_tuning", target_modules=OLMO2_NORMS),
    "gptneox": LoraArgs(method="bitfit"),
}
WITHIN = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 1e-2, "q8_0": 2e-2, "q4_0": 2e-2}
WITHIN |= dict.fromkeys(MIXED_TYPES, 4e-2)
NEW_TOKENS = 40
IN_Q8_0 = ("--with_base", "--base_dtype", "q8_0")
WITH_LORA = {"llama": "patterns", "qwen3": "rslora", "gptneox": "all", "phi2": "all", "phi3, longrope": "all"}
WITH_LORA |= {"gemma2": "rslora", "smollm3": "all", "glm4v": "all"}
# Adapters on experts and routers, of which llama.cpp multiplies those of each token's experts alone.
ON_EXPERTS = {
    "mixtral": LoraArgs(rank=4, alpha=8.0, target_parameters=["gate_up_proj", "down_proj", "gate"]),
    "glm4moe": LoraArgs(rank=4, alpha=8.0, target_parameters=["gate_up_proj", "down_proj"], share_experts=True),
}


def _run(tmp_path: Path, name: str, lora: LoraArgs = LORAS["all"], **changes: Any):
    """(folder of a run on a model in a folder, its model)."""
    return tmp_path / name, _write_run(tmp_path / name, _folder(tmp_path, name, **changes), lora)[0]


def _folder(tmp_path: Path, name: str, **changes: Any) -> Path:
    """A model in a folder."""
    files: dict[str, Any] = {"tokenizer.json": byte_level(), "tokenizer_config.json": NAMED}
    if name in TEXT_HALVES:
        config = with_text_attributes(with_images(name)[0], {"vocab_size": VOCABULARY} | changes)
        return write_folder(tmp_path / f"{name}-model", config, random_tensors(config), **files)
    # llama.cpp's contexts hold 256 tokens at least, and LongRoPE goes by what they hold.
    lengths = {"max_position_embeddings": 512, "original_max_position_embeddings": 256}
    config = CONFIGS[name][1] | {k: v for k, v in lengths.items() if k in CONFIGS[name][1]}
    config |= {"vocab_size": VOCABULARY} | changes
    return write_folder(tmp_path / f"{name}-model", config, random_tensors(config), **files)


def _case(model: Path, lora: Path | None = None, **more: Any) -> dict[str, Any]:
    empty = {"rows": [], "texts": [], "prompts": []}
    return {"model": str(model), "lora": None if lora is None else str(lora), **empty, **more}


def _gguf_of(folder: Path, path: Path) -> Path:
    opened = open_pretrained(model=str(folder))
    spec = export_spec(opened).spec
    write_gguf(path, spec, list(spec.tensors), (opened.source.tensors[name].read() for name in spec.tensors), "float32")
    return path


def _ids(found: dict[str, np.ndarray], name: str) -> dict[str, Any]:
    return json.loads(str(found[f"{name}/ids"]))


def _chosen_by_ours(model: Any, prompts: list[list[int]], replies: list[list[int]], within: float) -> int:
    """Counts reply tokens that are our model's first choice; asserts that the others are near ties."""
    count = 0
    for prompt, reply in zip(prompts, replies, strict=True):
        row = np.array([prompt + reply], np.int32)
        logits = _logits(model, row)[0, len(prompt) - 1 : -1]
        behind = logits.max(-1) - logits[np.arange(len(reply)), reply]
        assert behind.max() <= within * np.abs(logits).max()
        count += int((behind == 0).sum())
    return count


@pytest.mark.parametrize("names", some_in_ci([([*ARCHITECTURES][::4],), ([*ARCHITECTURES],)], lambda i: i == 0))
def test_every_architecture(names: list[str], tmp_path: Path, llama_cpp) -> None:
    """In f32; where llama.cpp's activation is a table in f16 (all that have a GELU), within its rounding."""
    ours, cases = {}, {}
    for name in names:
        run, model = _run(tmp_path, name, METHODS.get(name, LORAS["all"]), **DEEPER.get(name, {}))
        main(["--run", str(run), "--format", "gguf", "--dtype", "float32"])
        ours[name] = _logits(model, TOKENS)
        cases[name] = _case(run / "gguf/model-float32.gguf", rows=TOKENS.tolist(), texts=CORPUS)
    found = llama_cpp(SCRIPT, cases=cases, new_tokens=0)
    expected = load_tokenizer({"tokenizer_json": byte_level()}).encode_batch(CORPUS)
    for name, logits in ours.items():
        within = 1e-3 if name.startswith(("gemma", "phi2", "gptneox")) else 1e-5
        off = np.abs(found[f"{name}/logits"] - logits).max() / np.abs(logits).max()
        assert off < within, (name, off)
        assert _ids(found, name)["texts"] == expected, name
        assert found[f"{name}/special"].tolist() == [1, 2]


@pytest.mark.slow
def test_architectures_without_a_run(tmp_path: Path, llama_cpp) -> None:
    """Positions exceed the windows, and the period in which Ministral's queries grow."""
    ours, cases = {}, {}
    logits = jax.jit(lambda model: model.head.logits(model.hidden(jnp.asarray(TOKENS))), compiler_options=TO_READ)
    for name in WITHOUT_RUN:
        folder = _folder(tmp_path, name)
        source = open_model(folder)
        weights = WeightFormat(quant_type=None, dtype="float32")
        ours[name] = logits(load_model(source, model_config(source.config), weights).model)
        cases[name] = _case(_gguf_of(folder, tmp_path / f"{name}.gguf"), rows=TOKENS.tolist())
    found = llama_cpp(SCRIPT, cases=cases, new_tokens=0)
    for name, expected in ours.items():
        off = np.abs(found[f"{name}/logits"].reshape(expected.shape) - expected).max() / np.abs(expected).max()
        assert off < 1e-5, (name, off)


@pytest.mark.slow
def test_every_dtype(tmp_path: Path, quantizer: None, llama_cpp) -> None:
    """The file's model, read here and by llama.cpp, which rounds activations to the type of the matrices.

    The rows are whole blocks of 256, so the mixtures have K types, for which activations are rounded in such blocks.
    """
    run, _ = _run(tmp_path, "llama", hidden_size=256, intermediate_size=512)
    ours, cases = {}, {}
    for dtype in EXPORTS["gguf"].dtypes:
        output = tmp_path / dtype
        main(["--run", str(run), "--format", "gguf", "--dtype", dtype, "--output", str(output)])
        path = output / f"model-{dtype}.gguf"
        opened = open_pretrained(model=str(path))
        ours[dtype] = _logits(load_base(opened, weight_settings(opened, "none", "float32")), TOKENS)
        cases[dtype] = _case(path, rows=TOKENS.tolist())
    opened = open_pretrained(model=str(tmp_path / "iq4_nl/model-iq4_nl.gguf"))
    stored = _logits(load_base(opened, weight_settings(opened, "stored", "float32")), TOKENS)
    assert np.abs(stored - ours["iq4_nl"]).max() < 1e-5 * np.abs(stored).max()
    found = llama_cpp(SCRIPT, cases=cases, new_tokens=0)
    off = {dtype: np.abs(found[f"{dtype}/logits"] - o).max() / np.abs(o).max() for dtype, o in ours.items()}
    assert all(off[dtype] < WITHIN[dtype] for dtype in off), off


@pytest.mark.slow
def test_weights_merged_in_training(tmp_path: Path, llama_cpp) -> None:
    """Logits of `lora.merge_into` are those of llama.cpp on the exported file, but for its rounding of activations."""
    ours, cases = {}, {}
    for kind in ("q4_0", "q8_0"):
        lora = LoraArgs(rank=4, alpha=8.0, merge_into=kind)
        _write_run(run := tmp_path / kind, _folder(tmp_path / f"{kind}-base", "llama", hidden_size=64), lora)
        opened = open_pretrained(run=str(run))
        ours[kind] = _logits(combine(apply_adapter(load_base(opened, opened.args), opened.run)), TOKENS)
        main(["--run", str(run), "--format", "gguf"])
        cases[kind] = _case(run / f"gguf/model-{kind}.gguf", rows=TOKENS.tolist())
    found = llama_cpp(SCRIPT, cases=cases, new_tokens=0)
    off = {kind: np.abs(found[f"{kind}/logits"] - o).max() / np.abs(o).max() for kind, o in ours.items()}
    assert all(off[kind] < WITHIN[kind] for kind in off), off


@pytest.mark.slow
def test_loras(tmp_path: Path, llama_cpp) -> None:
    """Base and LoRA as two files, in f32, and with the base in q8_0."""
    ours, cases = {}, {}
    for name, lora in WITH_LORA.items():
        run, model = _run(tmp_path, name, LORAS[lora])
        main(["--run", str(run), "--format", "gguf-lora", "--with_base"])
        ours[name] = _logits(model, TOKENS)
        files: dict[str, Any] = {"model": run / "gguf-lora/base-float32.gguf", "lora": run / "gguf-lora/adapter.gguf"}
        cases[name] = _case(**files, rows=TOKENS.tolist())
        cases[f"{name}, alone"] = _case(files["model"], rows=TOKENS.tolist())
    rounded = tmp_path / "q8_0"
    main(["--run", str(tmp_path / "llama"), "--format", "gguf-lora", "--output", str(rounded), *IN_Q8_0])
    files: dict[str, Any] = {"model": rounded / "base-q8_0.gguf", "lora": rounded / "adapter.gguf"}
    cases["llama, q8_0"] = _case(**files, rows=TOKENS.tolist())
    cases["llama, q8_0, alone"] = _case(files["model"], rows=TOKENS.tolist())
    found = llama_cpp(SCRIPT, cases=cases, new_tokens=0)
    for name, logits in ours.items():
        off, added = (np.abs(found[f"{name}{end}/logits"] - logits).max() for end in ("", ", alone"))
        assert off < 1e-2 * added, (name, off, added)
    for end in ("", ", alone"):
        exact = found[f"llama{end}/logits"]
        off = np.abs(found[f"llama, q8_0{end}/logits"] - exact).max() / np.abs(exact).max()
        assert 0 < off < WITHIN["q8_0"], (end, off)


@pytest.mark.parametrize("name", some_in_ci([("mixtral",), ("glm4moe",)], lambda i: i == 0))
def test_loras_on_experts(tmp_path: Path, llama_cpp, name: str) -> None:
    """Base and LoRA as two files, and merged in one, in f32."""
    run, model = _run(tmp_path, name, ON_EXPERTS[name])
    main(["--run", str(run), "--format", "gguf-lora", "--with_base"])
    main(["--run", str(run), "--format", "gguf", "--dtype", "float32"])
    base, expected = run / "gguf-lora/base-float32.gguf", _logits(model, TOKENS)
    cases = {
        "alone": _case(base, rows=TOKENS.tolist()),
        "lora": _case(base, run / "gguf-lora/adapter.gguf", rows=TOKENS.tolist()),
        "merged": _case(run / "gguf/model-float32.gguf", rows=TOKENS.tolist()),
    }
    found = llama_cpp(SCRIPT, cases=cases, new_tokens=0)
    off = {name: np.abs(found[f"{name}/logits"] - expected).max() for name in cases}
    assert off["lora"] < 1e-2 * off["alone"] and off["merged"] < 1e-5 * np.abs(expected).max(), off


@pytest.mark.slow
def test_new_tokens(tmp_path: Path, llama_cpp) -> None:
    """Their rows, of a table that is longer than the vocabulary, and of one that has to become longer; their ids.

    From folders, and from a GGUF file."""
    new, ours, cases = ["<|tool|>", "<|answer|>"], {}, {}
    texts = [f"{new[0]}some text{new[1]}", new[1], *CORPUS]
    for name, size in {"padded": VOCABULARY, "full": tokenizer_size(), "file": tokenizer_size()}.items():
        config = FAMILIES["qwen2"][1] | {"vocab_size": size, "max_position_embeddings": 512}
        files: dict[str, Any] = {"tokenizer.json": byte_level(), "tokenizer_config.json": NAMED}
        folder = write_folder(tmp_path / f"{name}-model", config, random_tensors(config), **files)
        base = _gguf_of(folder, tmp_path / "base.gguf") if name == "file" else folder
        model, _ = _write_run(tmp_path / name, base, LORAS["all"], new=new)
        main(["--run", str(tmp_path / name), "--format", "gguf", "--dtype", "float32"])
        rows = TOKENS % tokenizer_size()
        rows[:, ::5] = tokenizer_size() + 1
        ours[name] = _logits(model, rows)
        cases[name] = _case(tmp_path / name / "gguf/model-float32.gguf", rows=rows.tolist(), texts=texts)
    found = llama_cpp(SCRIPT, cases=cases, new_tokens=0)
    plain = load_tokenizer({"tokenizer_json": byte_level()})
    for name, logits in ours.items():
        assert np.abs(found[f"{name}/logits"] - logits).max() < 1e-5 * np.abs(logits).max(), name
        ids = _ids(found, name)["texts"]
        assert ids[0] == [tokenizer_size(), *plain.encode("some text"), tokenizer_size() + 1]
        assert ids[1:] == [[tokenizer_size() + 1], *plain.encode_batch(CORPUS)]


def tokenizer_size() -> int:
    return load_tokenizer({"tokenizer_json": byte_level()}).vocab_size


@pytest.mark.parametrize("base", some_in_ci([("file",), ("folder",)], lambda i: i == 1))
def test_smollm2(tmp_path: Path, llama_cpp, smollm2_gguf: Path, base: str) -> None:
    """A real model in f16, from its GGUF file and from a Hugging Face folder: ids of all texts, and greedy replies."""
    if base == "folder":
        quantize.main(["--model", str(smollm2_gguf), "--output", str(tmp_path / "folder"), "--quant_type", "none"])
    run, path = tmp_path / "run", tmp_path / "run/gguf/model-float16.gguf"
    model, _ = _write_run(run, smollm2_gguf if base == "file" else tmp_path / "folder", LORAS["all"], scale=0.02)
    main(["--run", str(run), "--format", "gguf", "--dtype", "float16"])
    main(["--run", str(run), "--format", "gguf-lora", "--with_base"])
    source = open_model(path)
    tokenizer = load_tokenizer(source.tokenizer)
    assert source.tokenizer["chat_template"] == open_model(smollm2_gguf).tokenizer["chat_template"]
    texts = [text for text in TRICKY if "\x00" not in text]
    prompts = [tokenizer.encode(text) for text in PROMPTS]
    cases = {
        "run": _case(path, rows=[prompts[0]], texts=texts, prompts=prompts),
        "lora": _case(run / "gguf-lora/base-float32.gguf", run / "gguf-lora/adapter.gguf", prompts=prompts),
    }
    found = llama_cpp(SCRIPT, cases=cases, new_tokens=NEW_TOKENS)
    logits = _logits(model, np.array([prompts[0]], np.int32))
    assert np.abs(found["run/logits"] - logits).max() < 0.01 * np.abs(logits).max()
    ids = _ids(found, "run")
    assert ids["texts"] == tokenizer.encode_batch(texts)
    replies = _ids(found, "lora")["replies"]
    assert _chosen_by_ours(model, prompts, replies, within=1e-4) == NEW_TOKENS * len(prompts)
    assert _chosen_by_ours(model, prompts, ids["replies"], within=0.01) > 0.95 * NEW_TOKENS * len(prompts)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_smollm2_in_a_mixture(tmp_path: Path, quantizer: None, llama_cpp, smollm2_gguf: Path) -> None:
    """40 greedy tokens of each prompt are ours of the same dequantized weights, or near ties.

    llama.cpp rounds activations to 8 bits for its integer products, and our model computes in f32. From a file with
    the dequantized weights in f32, all of llama.cpp's tokens are ours, so that rounding is the only difference.
    """
    run, path = tmp_path / "run", tmp_path / "run/gguf/model-q4_k_m.gguf"
    _write_run(run, smollm2_gguf, LORAS["all"], scale=0.02)
    main(["--run", str(run), "--format", "gguf", "--dtype", "q4_k_m"])
    opened = open_pretrained(model=str(path))
    model = load_base(opened, weight_settings(opened, "none", "float32"))
    prompts = [opened.tokenizer.encode(text) for text in PROMPTS]
    dequantized = _gguf_of(path, tmp_path / "dequantized.gguf")
    cases = {"codes": _case(path, prompts=prompts), "f32": _case(dequantized, prompts=prompts)}
    found = llama_cpp(SCRIPT, cases=cases, new_tokens=40)
    assert _chosen_by_ours(model, prompts, _ids(found, "f32")["replies"], within=1e-4) == 40 * len(prompts)
    same = _chosen_by_ours(model, prompts, _ids(found, "codes")["replies"], within=0.02)
    assert same >= 0.95 * 40 * len(prompts)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), [("prefixed", "llama"), ("bare", "gemma")])
def test_sentencepiece(tmp_path: Path, llama_cpp, oracle, kind: str, name: str) -> None:
    """Vocabularies that SentencePiece made, by way of tokenizer.json: llama.cpp gives SentencePiece's ids."""
    texts = [text for text in TRICKY if "\x00" not in text and "<|" not in text]
    made = oracle(SCRIPT.with_name("sentencepiece_bpe.py"), corpus=_strings(600), strings=texts)
    metadata = json.loads(str(made[f"{kind}/metadata"]))
    config = FAMILIES[name][1] | {"vocab_size": len(metadata["tokens"])}
    files: dict[str, Any] = {
        "tokenizer.json": tokenizer_from_gguf(metadata).to_str(),
        "tokenizer_config.json": '{"bos_token": "<s>"}',
    }
    tensors = random_tensors(config)
    opened = open_pretrained(model=str(write_folder(tmp_path / "model", config, tensors, **files)))
    write_gguf(tmp_path / "model.gguf", export_spec(opened).spec, list(tensors), iter(tensors.values()), "float32")
    found = llama_cpp(SCRIPT, cases={"it": _case(tmp_path / "model.gguf", texts=texts)}, new_tokens=0)
    assert _ids(found, "it")["texts"] == json.loads(str(made[f"{kind}/ids"]))
