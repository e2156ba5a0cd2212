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
    "preference": {"prompt": "Q", "chosen": "A", "rejected": "B"},
    "orca-pairs": {"question": "Q", "chosen": "A", "rejected": "B"},
    "hh-rlhf-pairs": {"chosen": "\n\nHuman: Q\n\nAssistant: A", "rejected": "\n\nHuman: Q\n\nAssistant: B"},
    "implicit-prompt": {"chosen": TURNS, "rejected": [*TURNS[:1], {"role": "assistant", "content": "B"}]},
    "unpaired-preference": {"prompt": "Q", "completion": "A", "label": True},
    "messages-label": {"messages": TURNS, "label": 1},
    "question-pair-label": {"question1": "Q", "question2": "R", "label": 1},
    "question-sentence-label": {"question": "Q", "sentence": "R", "label": 1},
    "premise-hypothesis-label": {"premise": "Q", "hypothesis": "R", "label": 1},
    "sentence-pair-label": {"sentence1": "Q", "sentence2": "R", "label": 1},
    "sentence-label": {"sentence": "Q", "label": 1},
    "text-label": {"text": "T", "label": 1},
    "text-label-columns": {"text": "T", "0": 0, "1": 1},
    "triplet": {"anchor": "Q", "positive": "A", "negative": "B"},
    "anchor-positive": {"anchor": "Q", "positive": "A"},
    "prompt": {"prompt": "Q"},
    "prompt-messages": {"messages": TURNS[:1]},
}
