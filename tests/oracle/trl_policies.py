"""Losses, LoRA gradients, advantages and metrics of TRL's GRPO and RLOO trainers on given replies and rewards.

RLOO gets replies that the policy itself has drawn, and rewards of 0 in place of nan.

`cases`: {name: [trainer, settings, replies weighed by the sampler's probabilities]}. The model in `base` has drawn the
replies with the adapter in `old`, trains that in `policy`, and has the reference in `start`.
`prompts`: lists of ids; `replies`: of each prompt; `sampler`: log p of each reply's tokens; `rewards` [replies, F].
"""

import dataclasses
import json
import tempfile

import torch
from bridge import inputs, save
from datasets import Dataset
from peft import PeftModel
from peft.utils import load_peft_weights, set_peft_model_state_dict
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

TRAINERS = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}
PER_REPLY = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages", "old_per_token_logps")
PER_REPLY += ("ref_per_token_logps", "importance_sampling_ratio", "old_logps")

given = inputs()
groups, generations = len(given["prompts"]), len(given["replies"][0])
replies = [reply for group in given["replies"] for reply in group]
prompts = [prompt for prompt in given["prompts"] for _ in range(generations)]


def first(completions, **_):
    return [0.0] * len(completions)


def second(completions, **_):
    return [0.0] * len(completions)


def set_adapter(trainer, folder: str) -> None:
    weights = load_peft_weights(folder, device="cpu")
    set_peft_model_state_dict(trainer.model, weights, adapter_name="default")


def made(trainer: str, settings: dict, corrected: bool):
    """Makes a trainer that gets the given replies and rewards in place of those that it draws."""
    kind, config = TRAINERS[trainer]
    model = AutoModelForCausalLM.from_pretrained(given["base"], attn_implementation="eager", dtype=torch.float32)
    model = PeftModel.from_pretrained(model, given["start"], is_trainable=True)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_file(given["tokenizer"]), eos_token="</s>")
    tokenizer.pad_token = "</s>"
    quiet = {"output_dir": tempfile.mkdtemp(), "report_to": "none", "use_cpu": True, "bf16": False}
    quiet |= {"gradient_checkpointing": False, "num_generations": generations}
    batches = settings.pop("gradient_accumulation_steps")
    sizes = {"per_device_train_batch_size": len(replies) // batches, "gradient_accumulation_steps": batches}
    rows = Dataset.from_dict({"prompt": ["t1 t2"] * groups})
    args = config(**quiet, **sizes, **settings)
    functions = {"model": model, "reward_funcs": [first, second], "processing_class": tokenizer}
    found = kind(args=args, train_dataset=rows, **functions)
    found._generate = lambda _: drawn(trainer)
    rewards = torch.tensor(given["rewards"], dtype=torch.float32)
    found._calculate_rewards = lambda *_: rewards.nan_to_num(0.0) if trainer == "rloo" else rewards
    found.use_vllm = corrected
    return found


def drawn(trainer: str) -> tuple:
    """The result of the trainer's own `_generate`."""
    texts = [""] * len(replies)
    if trainer == "rloo":
        return prompts, replies, texts
    return prompts, replies, None, texts, given["sampler"], {}, None, None


def scored(trainer, drawn_by: str) -> dict:
    """The trainer's batch of all replies, drawn by an adapter."""
    set_adapter(trainer, given[drawn_by])
    trainer.model.train()
    with torch.no_grad():
        batch = trainer._generate_and_score_completions([{"prompt": "t1 t2"}] * len(replies))
    set_adapter(trainer, given["policy"])
    return batch


def micro_batches(batch: dict, count: int) -> list[dict]:
    """Splits the batch as the trainer does, without shuffling."""
    parts = {name: value.chunk(count) for name, value in batch.items() if name in PER_REPLY}
    whole = {name: value for name, value in batch.items() if name not in PER_REPLY}
    return [{name: part[index] for name, part in parts.items()} | whole for index in range(count)]


found = {}
for name, (trainer, settings, corrected) in given["cases"].items():
    count = settings["gradient_accumulation_steps"]
    each = made(trainer, settings, corrected)
    each.current_gradient_accumulation_steps = count
    batch = scored(each, "policy" if trainer == "rloo" else "old")
    each._metrics["train"].clear()
    loss = 0.0
    for micro in micro_batches(batch, count):
        part = each._compute_loss(each.model, micro)
        part.backward()
        loss += float(part)
    found[f"{name}/loss"], found[f"{name}/advantages"] = loss, batch["advantages"].numpy()
    found[f"{name}/metrics"] = json.dumps({key: values[0] for key, values in each._metrics["train"].items()})
    for key, parameter in each.model.named_parameters():
        if parameter.grad is not None:
            found[f"{name}/grad/{key.replace('.default', '')}"] = parameter.grad.numpy().copy()
defaults = {field.name: field.default for field in dataclasses.fields(GRPOConfig)}
save(**found, defaults=json.dumps({name: defaults[name] for name in given["names"]}))
