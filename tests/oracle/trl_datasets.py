"""Tokenizes rows with the dataset preparation of TRL's trainers; the rows of a case have the same columns."""

import json
from types import SimpleNamespace

import numpy as np
from bridge import inputs, save
from datasets import Dataset, disable_caching, disable_progress_bars
from transformers import PreTrainedTokenizerFast
from trl.data_utils import maybe_apply_chat_template, maybe_extract_prompt
from trl.experimental.cpo.cpo_trainer import CPOTrainer
from trl.experimental.orpo.orpo_trainer import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.reward_trainer import RewardTrainer

ROW_BY_ROW = {"cpo": CPOTrainer, "orpo": ORPOTrainer}  # SimPO is CPOTrainer with another loss
TRAINERS = {"dpo": DPOTrainer, "kto": KTOTrainer, "reward": RewardTrainer}
disable_progress_bars()
disable_caching()  # else each step hashes the tokenizer
given = inputs()
arguments = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")


def prepared(case: dict) -> list[dict]:
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=case["tokenizer"], **case["special_tokens"])
    tokenizer.chat_template = case["template"]
    if case["trainer"] in ROW_BY_ROW:
        return [row_by_row(ROW_BY_ROW[case["trainer"]], tokenizer, row) for row in case["rows"]]
    trainer = SimpleNamespace(
        _tokenizer=tokenizer, calculate_KL=False, desirable_weight=1.0, undesirable_weight=1.0, loss_type="kto"
    )
    prepare = TRAINERS[case["trainer"]]._prepare_dataset
    rows = prepare(trainer, Dataset.from_list(case["rows"]), tokenizer, arguments, "train")
    return [{name: ids for name, ids in row.items() if name.endswith("_ids")} for row in rows]


def row_by_row(trainer: type, tokenizer: PreTrainedTokenizerFast, row: dict) -> dict:
    self = SimpleNamespace(processing_class=tokenizer, is_encoder_decoder=False, max_length=1 << 30)
    self.build_tokenized_answer = trainer.build_tokenized_answer.__get__(self)
    row = {**row, **maybe_extract_prompt(row)}  # as Dataset.map does
    found = trainer.tokenize_row(self, {**row, **maybe_apply_chat_template(row, tokenizer)})
    names = [f"{answer}_{kind}" for answer in ("chosen", "rejected") for kind in ("input_ids", "labels")]
    return {name: found[name] for name in names}


save(results=np.array(json.dumps([prepared(case) for case in given["cases"]])))
