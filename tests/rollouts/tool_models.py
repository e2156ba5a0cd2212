"""A model that writes given turns, a tokenizer of bytes with Qwen's tokens, and a file of tools."""

import json
from collections.abc import Sequence
from pathlib import Path

import tokenizers

from qlora_jax.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from qlora_jax.inference.engine.request import Request
from qlora_jax.inference.sampling_params import Sampling
from qlora_jax.rollouts.reply import Reply

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
TOOLS = '''
import random, time
calls = 0

def add(a: int, b: int) -> int:
    """Adds numbers.

    Args:
        a: the first
        b: the second

    Returns:
        the sum
    """
    return a + b

def fails(text: str, times: list[int] = ()):
    """Fails.

    Args:
        text: the text to say
        times: how often
    """
    raise RuntimeError(f"no {text}")

async def later(text: str) -> str:
    """Answers later.

    Args:
        text: the text to say (choices: ["x", "long"])
    """
    return "so long a text that it does not fit " * 8 if text == "long" else text * 3

def hangs() -> str:
    """Takes long."""
    while True:
        time.sleep(0.01)

def eats() -> int:
    """Needs memory."""
    return len(bytearray(1 << 40))

def draws() -> float:
    """Draws a number."""
    return random.random()
'''
TEMPLATE = """{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content or '' }}{% for call in m.tool_calls or [] %}{% if not loop.first %}
{% endif %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def byte_tokenizer_json() -> str:
    """Returns a tokenizer.json with one token per byte, and Qwen's tokens of turns and calls."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens([*SPECIAL])
    backend.add_tokens(["<tool_call>", "</tool_call>", "<think>", "</think>"])
    return backend.to_str()


def byte_tokenizer(template: str | None = TEMPLATE) -> Tokenizer:
    named = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return load_tokenizer({"tokenizer_json": byte_tokenizer_json(), "chat_template": template, **named})


def write_tools(folder: Path) -> str:
    path = folder / "tools.py"
    path.write_text(TOOLS)
    return str(path)


def call(name: str, **arguments: object) -> str:
    """Returns a call as Qwen's models write it."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


class Script:
    """Draws given turns: `turns[n]` are those of the reply whose prompt says `reply n`.

    Attributes:
      requests: those of each draw.
    """

    def __init__(self, tokenizer: Tokenizer, turns: Sequence[Sequence[str]]):
        self._tokenizer, self._turns = tokenizer, [[*own] for own in turns]
        self.requests: list[list[Request]] = []

    def __call__(self, requests: Sequence[Request]) -> list[Reply]:
        self.requests.append([*requests])
        return [self._turn(request) for request in requests]

    def _turn(self, request: Request) -> Reply:
        number = int(self._tokenizer.decode(request.prompt).split("reply ")[1].split("<")[0])
        whole = self._tokenizer.encode(self._turns[number].pop(0))
        ids = whole[: request.max_new_tokens]
        stopped = ids[-1] == self._tokenizer.eos_id
        text = self._tokenizer.decode(ids[:-1] if stopped else ids)
        return Reply(ids, [-1.0] * len(ids), [True] * len(ids), text, "stop" if stopped else "length", [])


def first_requests(prompts: Sequence[Sequence[int]], longest: int) -> list[Request]:
    return [
        Request(prompt=prompt, max_new_tokens=longest, sampling=Sampling(temperature=1.0, seed=number))
        for number, prompt in enumerate(prompts)
    ]
