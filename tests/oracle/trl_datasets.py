"""Tokenizes rows with the dataset preparation of TRL's trainers; the rows of a case have the same columns."""

import json
from types import SimpleNamespace

import numpy as np
from bridge import inputs, save
from datasets import Dataset, disable_caching, disable_progress_bars
from transformers import PreTrainedTokenizerFast
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.reward_trainer import RewardTrainer

TRAINERS = {"dpo": DPOTrainer, "kto": KTOTrainer, "reward": RewardTrainer}
disable_progress_bars()
disable_caching()  # else each step hashes the tokenizer
given = inputs()
arguments = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")


def prepared(case: dict) -> list[dict]:
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=case["tokenizer"], **case["special_tokens"])
    tokenizer.chat_template = case["template"]
    trainer = SimpleNamespace(
        _tokenizer=tokenizer, calculate_KL=False, desirable_weight=1.0, undesirable_weight=1.0, loss_type="kto"
    )
    prepare = TRAINERS[case["trainer"]]._prepare_dataset
    rows = prepare(trainer, Dataset.from_list(case["rows"]), tokenizer, arguments, "train")
    return [{name: ids for name, ids in row.items() if name.endswith("_ids")} for row in rows]


save(results=np.array(json.dumps([prepared(case) for case in given["cases"]])))
