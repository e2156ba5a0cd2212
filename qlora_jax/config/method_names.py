"""Names the finetuning methods."""

from typing import Literal

MethodName = Literal[
    "lora",
    "lora_fa",
    "dora",
    "ia3",
    "oft",
    "vera",
    "ln_tuning",
    "bitfit",
    "houlsby",
    "pfeiffer",
    "full",
]
