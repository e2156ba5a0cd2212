"""Full finetuning: the gradients of every parameter are those of transformers and torch."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.config import LoraArgs, ModelArgs
from qlora_jax.io.loading.loader import load_model
from qlora_jax.io.open_model import open_model
from qlora_jax.io.peft.embeddings import module_name
from qlora_jax.methods.attach import attach_method
from qlora_jax.models.families import model_config
from qlora_jax.models.partition import combine, partition
from qlora_jax.models.precision import weight_format
from qlora_jax.models.tensor_names import layer_name
from qlora_jax.models.trainable_embeddings import add_tables
from tests.io.gguf_families import FAMILIES, random_tensors
from tests.io.tiny_models import random_weights, tiny_config, tokenizer_json, write_folder

SCRIPT = Path(__file__).parent.parent / "oracle/whole_gradients.py"
WHOLE = LoraArgs(method="full")
TINY = {"llama": tiny_config(attention_bias=True, mlp_bias=True)}
OTHERS = ("gptneox", "phi3", "gemma2", "qwen3")  # fused, LayerNorm; fused; tied, offset norms; norms of heads


def _ours(folder: Path, tokens: np.ndarray, cotangent: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(logits, gradients by transformers' names)."""
    source = open_model(str(folder))
    config = model_config(source.config)
    args = ModelArgs(path=str(folder), quant_type="none", compute_dtype="float32")
    model = load_model(source, config, weight_format(args, config)).model
    attach_method(model, WHOLE, jax.random.key(0))
    add_tables(model, (), WHOLE)
    parts = partition(model)

    @jax.jit
    def logits(lora):
        model = combine(parts.with_lora(lora))
        return model.head.logits(model.hidden(jnp.asarray(tokens), remat="names")).reshape(cotangent.shape)

    value, vjp = jax.vjp(logits, parts.lora)
    (grads,) = vjp(jnp.asarray(cotangent))
    return np.asarray(value), dict(_named(grads, config))


def _named(grads, config):
    for name, leaves in grads.items():
        for leaf, values in leaves.items():
            part = leaf.replace("gain", "weight")
            layers = enumerate(np.asarray(values)) if ".layers." in name else [(0, np.asarray(values))]
            yield from ((f"{module_name(layer_name(name, layer), config)}.{part}", value) for layer, value in layers)


@pytest.mark.slow
def test_gradients_of_every_parameter(tmp_path: Path, oracle) -> None:
    configs = TINY | {name: FAMILIES[name][1] for name in OTHERS}
    # Without token 0: transformers gives the embedding of some models' padding no gradient.
    tokens = np.random.default_rng(0).integers(1, 32, (2, 19)).astype(np.int32)
    cotangent = np.random.default_rng(1).standard_normal((2, 19, 32)).astype(np.float32)
    ours, folders = {}, {}
    for name, config in configs.items():
        weights = random_weights(config) if name in TINY else random_tensors(config)
        folder = write_folder(tmp_path / name, config, weights)
        (folder / "tokenizer.json").write_text(tokenizer_json())
        folders[name], ours[name] = str(folder), _ours(folder, tokens, cotangent)
    found = oracle(SCRIPT, cases=folders, tokens=tokens, cotangent=cotangent)
    for name, (logits, grads) in ours.items():
        _close(found[f"{name}/logits"], logits, name)
        prefix = f"{name}/grad/"
        assert {key.removeprefix(prefix) for key in found if key.startswith(prefix)} == grads.keys()
        for key, grad in grads.items():
            _close(found[prefix + key], grad, f"{name} {key}")


def _close(found: np.ndarray, ours: np.ndarray, what: str) -> None:
    scale = np.abs(found).max()
    assert scale > 0, what
    np.testing.assert_allclose(ours / scale, found / scale, atol=2e-5, err_msg=what)
