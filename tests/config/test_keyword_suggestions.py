"""Unknown arguments of Python functions are errors that name the argument which was probably meant."""

import copy
import dataclasses
import pickle

import pytest

import qlora_jax as q


@pytest.mark.parametrize(
    ("call", "arguments", "end"),
    [
        (q.LoRA, {"r": 8}, "'r'; did you mean rank?"),
        (q.LoRA, {"lora_dropout": 0.1}, "'lora_dropout'; did you mean dropout?"),
        (q.LoRA, {"rank": 8, "bias": "none"}, "'bias'"),
        (q.finetune, {"lr": 1e-4}, "'lr'; did you mean learning_rate?"),
        (
            q.finetune,
            {"per_device_train_batch_size": 1},
            "'per_device_train_batch_size'; did you mean micro_batch_size?",
        ),
        (q.finetune, {"warmup_ratio": 0.1}, "'warmup_ratio'; config={...} takes the settings that are not arguments"),
        (q.load, {"load_in_4bit": True}, "for 4 bits, none for 16 bits; 8 bits are not supported)?"),
        (q.generate_text, {"max_tokens": 8}, "'max_tokens'; did you mean max_new_tokens?"),
        (q.prepare_data, {"max_seq_length": 8}, "'max_seq_length'; did you mean max_length?"),
    ],
)
def test_the_error_names_what_was_probably_meant(call, arguments, end):
    with pytest.raises(TypeError, match="got an unexpected keyword argument") as error:
        call(**arguments)
    assert str(error.value).endswith(end)


def test_settings_stay_a_dataclass():
    lora = q.LoRA(rank=4)
    assert dataclasses.replace(lora, alpha=3.0) == q.LoRA(rank=4, alpha=3.0)
    assert pickle.loads(pickle.dumps(lora)) == copy.deepcopy(lora) == lora
