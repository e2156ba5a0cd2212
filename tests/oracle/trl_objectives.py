"""Losses, log-probabilities and LoRA gradients of TRL's trainers on given ids, and divergences by torch.

`cases`: {name: [trainer, settings]}. The reference of DPO and KTO is the adapter in the folder `start`, the policy that
in `policy`, over the model in `base`.
`pairs`: [{"prompt", "chosen", "rejected"}]; `labelled`: [{"prompt", "completion", "KL", "label"}], lists of ids.
"""

import tempfile

import torch
from bridge import inputs, save
from datasets import Dataset
from peft import PeftModel
from peft.utils import load_peft_weights, set_peft_model_state_dict
from tokenizers import Tokenizer
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

TRAINERS = {
    "dpo": (DPOTrainer, DPOConfig),
    "kto": (KTOTrainer, KTOConfig),
    "cpo": (CPOTrainer, CPOConfig),
    "orpo": (ORPOTrainer, ORPOConfig),
}
TEXTS = {"prompt": ["t1 t2", "t3"], "chosen": ["t4", "t5"], "rejected": ["t6", "t7"]}  # only to make a trainer
UNPAIRED = {"prompt": TEXTS["prompt"], "completion": TEXTS["chosen"], "label": [True, False]}

given = inputs()
pairs, labelled = given["pairs"], given["labelled"]


def made(trainer: str, settings: dict):
    """Makes a trainer whose reference is the start adapter, then sets the policy's."""
    kind, config = TRAINERS[trainer]
    model = AutoModelForCausalLM.from_pretrained(given["base"], attn_implementation="eager", dtype=torch.float32)
    model = PeftModel.from_pretrained(model, given["start"], is_trainable=True)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_file(given["tokenizer"]), eos_token="</s>")
    tokenizer.pad_token = "</s>"
    quiet = {"output_dir": tempfile.mkdtemp(), "report_to": "none", "use_cpu": True, "bf16": False}
    args = config(per_device_train_batch_size=2, gradient_checkpointing=False, **quiet, **settings)
    rows = Dataset.from_dict(UNPAIRED if trainer == "kto" else TEXTS)
    found = kind(model=model, args=args, train_dataset=rows, processing_class=tokenizer)
    set_peft_model_state_dict(found.model, load_peft_weights(given["policy"], device="cpu"), adapter_name="default")
    return found


def dpo_batch(trainer, some: list[dict]) -> dict:
    """The batch of DPOTrainer's collator."""
    return trainer.data_collator([{f"{name}_ids": ids for name, ids in pair.items()} for pair in some])


def kto_batch(trainer, some: list[dict]) -> dict:
    """The batch of KTOTrainer's collator."""
    names = {"prompt": "prompt_ids", "completion": "completion_ids", "label": "label"}
    names |= {"KL": "KL_completion_ids"} if trainer.calculate_KL else {}
    return trainer.data_collator([{theirs: row[ours] for ours, theirs in names.items()} for row in some])


def cpo_batch(trainer, some: list[dict]) -> dict:
    """The batch of the collator that CPOTrainer and ORPOTrainer share."""
    rows = []
    for pair in some:
        row = {"prompt_input_ids": pair["prompt"], "prompt_attention_mask": [1] * len(pair["prompt"])}
        for name in ("chosen", "rejected"):
            ids = pair["prompt"] + pair[name]
            row |= {f"{name}_input_ids": ids, f"{name}_attention_mask": [1] * len(ids)}
            row[f"{name}_labels"] = [-100] * len(pair["prompt"]) + pair[name]
        rows.append(row)
    return trainer.data_collator(rows)


def logps_of_pairs(trainer) -> tuple[list, list]:
    """(policy's, reference's) log p of chosen and rejected; a batch of one pair logs just these."""
    policy, reference = [], []
    for pair in pairs:
        batch = dpo_batch(trainer, [pair])
        trainer._compute_loss(trainer.model, batch, False)
        metrics = trainer._metrics["train"]
        policy.append([metrics["logps/chosen"][-1], metrics["logps/rejected"][-1]])
        reference.append([float(logp[0]) for logp in trainer.compute_ref_log_probs(trainer.model, batch)])
    return policy, reference


def logps_of_labelled(trainer) -> tuple[list, list]:
    """(policy's, reference's) log p of each answer and of its prompt with another answer."""
    policy, reference = [], []
    for row in labelled:
        batch = kto_batch(trainer, [row])
        trainer._compute_loss(trainer.model, batch, False)
        own = trainer._metrics["train"]["logps/chosen" if row["label"] else "logps/rejected"][-1]
        policy.append([own, float(trainer._compute_kl_logps(trainer.model, batch)[0])])
        reference.append([float(logp[0]) for logp in trainer.compute_ref_log_probs(trainer.model, batch)])
    return policy, reference


def divergences(answers: tuple[str, str], some: list[dict]) -> list[list[float]]:
    """The sum over each answer's tokens of KL(policy || reference) at the position before."""
    base = AutoModelForCausalLM.from_pretrained(given["base"], attn_implementation="eager", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, given["start"], adapter_name="start")
    model.load_adapter(given["policy"], adapter_name="policy")
    return [[divergence_of(model, row["prompt"], row[answer]) for answer in answers] for row in some]


def divergence_of(model: PeftModel, prompt: list[int], answer: list[int]) -> float:
    logps = {}
    for name in ("policy", "start"):
        model.set_adapter(name)
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        logps[name] = logits.double().log_softmax(-1)
    return float(kl_div(logps["start"], logps["policy"], reduction="sum", log_target=True))


def logps_of_cpo(trainer) -> torch.Tensor:
    """log p of chosen and rejected [pairs, 2]; means per token where the loss reads these."""
    with torch.no_grad():
        return torch.stack(trainer.concatenated_forward(trainer.model, cpo_batch(trainer, pairs))[:2], dim=1)


def loss_of(trainer: str, made_trainer) -> torch.Tensor:
    """The loss of all rows in one batch."""
    if trainer == "dpo":
        return made_trainer._compute_loss(made_trainer.model, dpo_batch(made_trainer, pairs), False)
    if trainer == "kto":
        return made_trainer._compute_loss(made_trainer.model, kto_batch(made_trainer, labelled), False)
    return made_trainer.get_batch_loss_metrics(made_trainer.model, cpo_batch(made_trainer, pairs))[0]


found = {}
for name, (trainer, settings) in given["cases"].items():
    each = made(trainer, settings)
    each.model.train()
    loss = loss_of(trainer, each)
    loss.backward()
    found[f"{name}/loss"] = loss.detach().numpy()
    for key, parameter in each.model.named_parameters():
        if parameter.grad is not None:
            found[f"{name}/grad/{key.replace('.default', '')}"] = parameter.grad.numpy().copy()
    if name in ("dpo", "kto"):
        with torch.no_grad():
            policy, reference = logps_of_pairs(each) if name == "dpo" else logps_of_labelled(each)
            of_rows = (("chosen", "rejected"), pairs) if name == "dpo" else (("completion", "KL"), labelled)
            parts = {"policy": policy, "reference": reference, "divergence": divergences(*of_rows)}
        found |= {f"{name}/{part}": torch.tensor(values).numpy() for part, values in parts.items()}
    if trainer in ("cpo", "orpo"):
        found[f"{name}/logps"] = logps_of_cpo(each).numpy()
save(**found)
