"""Outputs, losses and gradients of sequence heads under peft: transformers' losses, TRL's of rewards, torch's of texts.

`cases`: {name: {objective, folder, adapter, labels, ...}}, with `rows` of ids; of pairs and texts, `rows` of each.
"""

import tempfile

import torch
import torch.nn.functional as F
from bridge import inputs, save
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast, pipeline
from trl import RewardConfig, RewardTrainer

PROBLEMS = {
    "classification": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
}


def padded(rows, pad=0):
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return ids, mask


def load(case):
    if case["objective"] == "embedding":
        base = AutoModel.from_pretrained(case["folder"])
    else:
        settings = {"num_labels": case["outputs"], "problem_type": PROBLEMS.get(case["objective"])}
        base = AutoModelForSequenceClassification.from_pretrained(case["folder"], pad_token_id=case["pad"], **settings)
    assert base.dtype == torch.float32
    return PeftModel.from_pretrained(base, case["adapter"], is_trainable=True)


def labelled(model, case):
    ids, mask = padded(case["rows"], case["pad"])
    found = model(ids, attention_mask=mask, labels=torch.tensor(case["labels"]))
    return found.logits, found.loss


def reward(model, case):
    chosen, rejected = case["rows"]
    columns = {"chosen_ids": chosen, "rejected_ids": rejected, "margin": case["margins"]}
    with tempfile.TemporaryDirectory() as folder:
        args = RewardConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            report_to=[],
            gradient_checkpointing=False,
            center_rewards_coefficient=case["center"],
        )
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=f"{case['folder']}/tokenizer.json", pad_token="<unk>", eos_token="</s>"
        )
        trainer = RewardTrainer(
            model=model, args=args, train_dataset=Dataset.from_dict(columns), processing_class=tokenizer
        )
        batch = trainer.data_collator(
            [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        )
        loss, found = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    return found.logits, loss


def embedding(model, case):
    states = [pooled(model, case["pooling"], rows) for rows in case["rows"]]
    anchors, *others = (F.normalize(each, dim=1) for each in states)
    scores = anchors @ torch.cat(others).T / case["temperature"]
    return torch.cat(states), F.cross_entropy(scores, torch.arange(len(scores)))


def pooled(model, pooling, rows):
    ids, mask = padded(rows)
    states = model(input_ids=ids, attention_mask=mask).last_hidden_state
    if pooling == "last":
        return states[torch.arange(len(rows)), mask.sum(1) - 1]
    return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def merged(case):
    if case["objective"] == "embedding":
        model = AutoModel.from_pretrained(case["merged"])
        return torch.cat([pooled(model, case["pooling"], rows) for rows in case["rows"]]), {}
    model, tokenizer = (
        each.from_pretrained(case["merged"]) for each in (AutoModelForSequenceClassification, AutoTokenizer)
    )
    assert model.config.pad_token_id == tokenizer.pad_token_id == case["pad"]
    ids, mask = padded(case["rows"], case["pad"])
    return model(ids, attention_mask=mask).logits, model.config.id2label


def probabilities(case):
    """Returns the scores of transformers' pipeline for texts, in the order of the labels."""
    classify = pipeline("text-classification", model=case["merged"], top_k=None, batch_size=len(case["texts"]))
    found = [{one["label"]: one["score"] for one in text} for text in classify(case["texts"])]
    return [[text[label] for label in classify.model.config.id2label.values()] for text in found]


LOSSES = {"reward": reward, "embedding": embedding}
found = {}
for name, case in inputs()["cases"].items():
    model = load(case)
    outputs, loss = LOSSES.get(case["objective"], labelled)(model, case)
    loss.backward()
    found[f"{name}/outputs"], found[f"{name}/loss"] = outputs.detach().numpy(), loss.detach().numpy()
    if "merged" in case:
        with torch.no_grad():
            outputs, labels = merged(case)
        found[f"{name}/merged"], found[f"{name}/id2label"] = outputs.numpy(), list(labels.values())
        if case["objective"] == "classification" and "texts" in case:
            found[f"{name}/probabilities"] = probabilities(case)
    for parameter, value in model.named_parameters():
        if value.requires_grad and value.grad is not None:
            found[f"{name}/grad/{parameter.replace('.default', '').replace('.modules_to_save', '')}"] = (
                value.grad.numpy()
            )
save(**found)
