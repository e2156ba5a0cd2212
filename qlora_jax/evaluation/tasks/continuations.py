"""Encodes the possible replies to a prompt as rows in which only the reply is scored."""

from collections.abc import Sequence

import numpy as np

from qlora_jax.data.formats.row_format import Segment
from qlora_jax.data.loss_mask.by_offsets import encode_segments
from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.evaluation.loglikelihood import ScoredIds


def encode_continuations(
    question: str, plain_prompt: str, options: Sequence[str], tokenizer: Tokenizer
) -> list[ScoredIds]:
    """Encodes each option as the reply to `question`; without a chat template, after `plain_prompt` and a space."""
    if tokenizer.chat_template is None:
        prompt, replies = plain_prompt, [f" {option}" for option in options]
    else:
        messages = [{"role": "user", "content": question}]
        prompt, replies = tokenizer.render(messages, add_generation_prompt=True), options
    # A chat template writes bos itself.
    bos = [tokenizer.bos_id] if tokenizer.add_bos_token and tokenizer.chat_template is None else []
    encodings = tokenizer.encode_spans([prompt + reply for reply in replies])
    encoded = [
        encode_segments(tokenizer, [Segment(prompt, False), Segment(reply, True)], encoding)
        for reply, encoding in zip(replies, encodings, strict=True)
    ]
    return [
        (np.array([*bos, *row.ids], np.int32), np.concatenate([np.zeros(len(bos), bool), row.supervised]))
        for row in encoded
    ]
