"""Greedy replies of SmolLM2 equal transformers', in f32."""

from pathlib import Path

import numpy as np
import pytest

from qlora_jax.config import ModelArgs
from qlora_jax.inference.decode import generate
from qlora_jax.inference.sampling_params import Sampling
from qlora_jax.io.pretrained import load_base, open_pretrained
from qlora_jax.models.partition import partition

ORACLE = Path(__file__).parent.parent / "oracle/generate_greedy.py"
QUESTIONS = {
    "paris": "What is the capital of France?",
    "sea": "Write one sentence about the sea.",
    "colours": "Name three colours, and say where one sees them.",
}
TIE = 1e-3  # a lead below this is rounding


@pytest.mark.slow
def test_smollm2(oracle, smollm2_gguf):
    opened = open_pretrained(model=str(smollm2_gguf))
    held = ModelArgs(path=str(smollm2_gguf), quant_type="none", compute_dtype="float32")
    parts, tokenizer = partition(load_base(opened, held)), opened.tokenizer
    turns = {name: [{"role": "user", "content": question}] for name, question in QUESTIONS.items()}
    prompts = {name: tokenizer.encode(tokenizer.render(turn, True)) for name, turn in turns.items()}
    eos = tokenizer.eos_id
    expected = oracle(ORACLE, path=str(smollm2_gguf), prompts=prompts, max_new_tokens=32, eos_id=eos)
    replies = generate(parts, list(prompts.values()), sampling=Sampling(), max_new_tokens=32, stop_ids=[eos])
    for name, reply in zip(prompts, replies, strict=True):
        ids, ties = expected[f"{name}_ids"], np.flatnonzero(expected[f"{name}_lead"] < TIE)
        sure = ties[0] if len(ties) else len(ids)
        assert [*reply.ids, *[eos] * (reply.end == "stop")][:sure] == ids[:sure].tolist(), name
        assert sure >= 8, f"{name}: too few tokens to compare"
    assert replies[0].ids == [504, 3575, 282, 4649, 314, 7042, 30] and replies[0].end == "stop"
    assert replies[1].ids[:8] == [504, 3426, 314, 253, 4749, 284, 11965, 7815]
