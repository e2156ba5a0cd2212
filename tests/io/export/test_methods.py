"""Methods that an export format cannot hold are refused with a reason and a way out."""

import pytest

from qlora_jax.io.export.methods import check_method, refusal


@pytest.mark.parametrize(
    ("method", "form", "message"),
    [
        ("bitfit", "peft", "neither peft nor llama.cpp has .* biases. Export one model instead: --format hf or gguf"),
        ("full", "gguf-lora", "all of the model was trained"),
        ("houlsby", "hf", "cannot be merged .* Use the run itself: qlora-jax generate --run"),
        ("pfeiffer", "peft", "has bottleneck adapters"),
    ],
)
def test_refused(method, form, message):
    with pytest.raises(ValueError, match=f"--format {form}: it cannot hold lora.method={method}, because .*{message}"):
        check_method(method, form)


@pytest.mark.parametrize(("method", "form"), [("bitfit", "hf"), ("ln_tuning", "peft"), ("lora", "gguf-lora")])
def test_held(method, form):
    assert refusal(method, form) is None
    check_method(method, form)
