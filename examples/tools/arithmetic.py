"""A task with a tool: multiply two numbers with a calculator, and say the result.

    python examples/tools/arithmetic.py prompts.jsonl
    qlora-jax train --objective grpo --tool examples/tools/arithmetic.py:multiply \
      --reward examples/tools/arithmetic.py:right --reward examples/tools/arithmetic.py:asked \
      --data.train prompts.jsonl --data.chat_template examples/tools/tools.jinja ...

Writes 400 prompts, each with its answer and an example of a call. `tools.jinja` is for models whose own chat template
has no tools.
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


def conversation(a: int, b: int) -> list[dict[str, object]]:
    """Returns a prompt of messages: an example with a call, and the question."""
    call = {"type": "function", "function": {"name": "multiply", "arguments": {"a": 12, "b": 34}}}
    return [
        {"role": "user", "content": "What is 12 times 34?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "multiply", "content": "408"},
        {"role": "assistant", "content": "12 times 34 is 408."},
        {"role": "user", "content": f"What is {a} times {b}?"},
    ]


if __name__ == "__main__":
    generator = random.Random(0)
    numbers = [(generator.randint(11, 99), generator.randint(11, 99)) for _ in range(400)]
    rows = [{"prompt": conversation(a, b), "answer": str(a * b)} for a, b in numbers]
    Path(sys.argv[1]).write_text("".join(json.dumps(row) + "\n" for row in rows))
