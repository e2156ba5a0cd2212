"""A task with a tool: multiply two numbers with a calculator, and say the result.

    python examples/tools/arithmetic.py prompts.jsonl demonstrations.jsonl
    qlora-jax train --data.train demonstrations.jsonl --data.chat_template examples/tools/tools.jinja ...
    qlora-jax export --run runs/sft --format peft
    qlora-jax train --objective grpo --lora.start runs/sft/peft --data.train prompts.jsonl \
      --data.chat_template examples/tools/tools.jinja --tool examples/tools/arithmetic.py:multiply \
      --reward examples/tools/arithmetic.py:right --reward examples/tools/arithmetic.py:asked ...

Writes 400 prompts with their answers, and 300 conversations from which a small model learns to call the tool at all.
`tools.jinja` is for models whose own chat template has no tools.
"""

import json
import random
import re
import sys
from pathlib import Path


def multiply(a: int, b: int) -> int:
    """Multiplies two numbers.

    Args:
        a: the first number
        b: the second number

    Returns:
        the product
    """
    return a * b


def right(completions, answer, **columns):
    """Returns 1 for a reply whose last message has the answer, otherwise 0."""
    last = [completion[-1]["content"] for completion in completions]
    return [float(right in re.findall(r"\d+", text)) for text, right in zip(last, answer, strict=True)]


def asked(completions, answer, **columns):
    """Returns 1 for a reply whose tool gave the answer, and 0.2 for one that called the tool with other numbers."""
    results = [[each["content"] for each in completion if each["role"] == "tool"] for completion in completions]
    return [1.0 if right in found else 0.2 * bool(found) for found, right in zip(results, answer, strict=True)]


_NUMBERS = {"a": "the first number", "b": "the second number"}
_PARAMETERS = {name: {"type": "integer", "description": text} for name, text in _NUMBERS.items()}
SCHEMA = {
    "name": "multiply",
    "description": "Multiplies two numbers.",
    "parameters": {"type": "object", "properties": _PARAMETERS, "required": ["a", "b"]},
    "return": {"type": "integer", "description": "the product"},
}


def demonstration(a: int, b: int) -> dict[str, object]:
    """Returns a conversation that calls the tool, as a row for supervised training."""
    call = {"type": "function", "function": {"name": "multiply", "arguments": {"a": a, "b": b}}}
    messages = [
        {"role": "user", "content": f"What is {a} times {b}?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "multiply", "content": str(a * b)},
        {"role": "assistant", "content": f"{a} times {b} is {a * b}."},
    ]
    return {"messages": messages, "tools": [{"type": "function", "function": SCHEMA}]}


if __name__ == "__main__":
    generator = random.Random(0)
    numbers = [(generator.randint(11, 99), generator.randint(11, 99)) for _ in range(700)]
    prompts = [{"prompt": f"What is {a} times {b}?", "answer": str(a * b)} for a, b in numbers[:400]]
    for path, rows in zip(sys.argv[1:], (prompts, [demonstration(a, b) for a, b in numbers[400:]]), strict=True):
        Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
