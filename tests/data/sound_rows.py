"""A row of every format of training data, without faults."""

from typing import Any

TURNS = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
SOUND_ROWS: dict[str, dict[str, Any]] = {
    "messages": {"messages": TURNS},
    "sharegpt": {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
    "alpaca": {"instruction": "Q", "input": "", "output": "A"},
    "completion": {"prompt": "Q", "completion": "A"},
    "input-output": {"input": "Q", "output": "A"},
    "unnatural-instructions": {"instances": [{"instruction_with_input": "Q", "output": "A"}]},
    "unnatural-instructions-full": {
        "instances": [{"instruction_with_input": "Q", "output": "A"}],
        "reformulations": [],
    },
    "seed-tasks": {"instruction": "Q", "instances": [{"input": "", "output": "A"}]},
    "flan": {"inputs": "Q", "targets": "A"},
    "hh-rlhf": {"chosen": "\n\nHuman: Q\n\nAssistant: A"},
    "guanaco": {"text": "### Human: Q### Assistant: A"},
    "guanaco-answers": {"text": "### Human: Q### Assistant: A"},
    "chip2": {"text": "<human>: Q\n<bot>: A"},
    "text": {"text": "T"},
}
