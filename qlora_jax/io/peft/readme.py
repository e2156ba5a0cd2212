"""The README.md of an exported adapter: how transformers and peft load it."""

from qlora_jax.config.objectives import OBJECTIVES
from qlora_jax.io.head_file import Padding
from qlora_jax.methods.method import form_of
from qlora_jax.objectives.head_objective import TrainedHead
from qlora_jax.untrusted_json import JsonObject

README = """\
---
library_name: peft
tags: [{tag}, qlora]
---

{what} for the base model `{base}`, trained with qlora_jax.

```python
{code}
```
{note}"""

GENERATE = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({loadable})
{resize}model = PeftModel.from_pretrained(base, "path/to/this/folder")"""

CLASSIFY = """\
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({loadable})
{padding}base = AutoModelForSequenceClassification.from_pretrained({loadable}{settings})
{resize}model = PeftModel.from_pretrained(base, "path/to/this/folder")"""

EMBED = """\
import torch
from peft import PeftModel
from transformers import AutoModel

base = AutoModel.from_pretrained({loadable})
{resize}model = PeftModel.from_pretrained(base, "path/to/this/folder")
states = model(**batch).last_hidden_state  # batch: input_ids and attention_mask, padded on the right
mask = batch["attention_mask"]
{pooling}
embeddings = torch.nn.functional.normalize(pooled, dim=1)"""

POOLINGS = {
    "last": "pooled = states[torch.arange(len(states)), mask.sum(1) - 1]  # the last token of each text",
    "mean": "pooled = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)  # the mean over a text",
}
PADDED = """\
transformers scores the last token of a text that is not padding, so no text may end in the padding token.
"""
UNPADDED = """\
Pass one text at a time: transformers scores the last token that is not padding, and the tokenizer has no special token
that never ends a text.
"""


def readme(
    config: JsonObject, loadable: str, rows: int | None, head: TrainedHead | None, padding: Padding | None
) -> str:
    """Returns the README.

    Args:
      config: adapter_config.json.
      loadable: the arguments with which transformers loads the base, as Python's source.
      rows: the length to which the base's embedding must be resized, if any.
      head: the sequence head, if the adapter has one.
      padding: the padding token, if the head has outputs.
    """
    form = form_of(config["peft_type"])
    assert form is not None, "it has written the config"
    names = {
        "loadable": loadable,
        "resize": f"base.resize_token_embeddings({rows})  # for the new tokens\n" if rows else "",
    }
    if head is None:
        code, note = GENERATE.format(**names), ""
    elif head.outputs == 0:
        code, note = EMBED.format(**names, pooling=POOLINGS[head.pooling]), ""
    else:
        assert padding is not None
        settings = "".join(f", {name}={value!r}" for name, value in label_settings(head, padding).items())
        names |= {"settings": settings, "padding": _padding_line(padding)}
        note = f"\n{OBJECTIVES[head.objective].meaning}\n{UNPADDED if padding.id is None else PADDED}"
        code = CLASSIFY.format(**names)
    return README.format(
        tag=config["peft_type"].lower(),
        what=form.describe(config),
        base=config["base_model_name_or_path"],
        code=code,
        note=note,
    )


def _padding_line(padding: Padding) -> str:
    return f"tokenizer.pad_token = {padding.token!r}\n" if padding.token is not None else ""


def label_settings(head: TrainedHead, padding: Padding) -> JsonObject:
    """Returns the settings of a transformers config that describe a head's outputs, and the padding of its texts."""
    settings: JsonObject = {"num_labels": head.outputs, "pad_token_id": padding.id}
    if head.labels:
        settings["id2label"] = dict(enumerate(head.labels))
        settings["label2id"] = {label: index for index, label in enumerate(head.labels)}
    return settings | {"problem_type": OBJECTIVES[head.objective].problem_type}
