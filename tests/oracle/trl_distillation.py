"""Losses and LoRA gradients of TRL's distillation: of the whole vocabulary (GKD), and of the teacher's top k (server).

`cases`: {name: {beta, temperature, top_k, add_tail}}; a top_k of 0 is GKD's loss. The model in `base` with the adapter
in `policy` learns from that in `teacher`. `rows`: ids of each row; `supervised`: 1 for each id that is learned.
"""

from types import SimpleNamespace

import torch
from bridge import inputs, save
from peft import PeftModel
from transformers import AutoModelForCausalLM
from trl.experimental.gkd import GKDTrainer
from trl.experimental.server_distillation.server_distillation_trainer import ServerDistillationTrainer as Server

given = inputs()
how = {"attn_implementation": "eager", "dtype": torch.float32}
student = AutoModelForCausalLM.from_pretrained(given["base"], **how)
student = PeftModel.from_pretrained(student, given["policy"], is_trainable=True)
teacher = AutoModelForCausalLM.from_pretrained(given["teacher"], **how)
longest = max(map(len, given["rows"]))
ids = torch.tensor([row + [0] * (longest - len(row)) for row in given["rows"]])
mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in given["rows"]])
is_learned = torch.tensor([row + [0] * (longest - len(row)) for row in given["supervised"]], dtype=torch.bool)
labels = torch.where(is_learned, ids, -100)[:, 1:]
with torch.no_grad():
    teacher_logits = teacher(input_ids=ids, attention_mask=mask).logits[:, :-1]


def server_loss(student_logits, beta, temperature, top_k, add_tail):
    log_p, log_q = (torch.log_softmax(each / temperature, dim=-1) for each in (student_logits, teacher_logits))
    top = log_q.topk(top_k, dim=-1)
    fake = SimpleNamespace(beta=beta, loss_add_tail=add_tail, _reduce_divergence_loss=Server._reduce_divergence_loss)
    if beta == 0:
        found = {"topk_logprobs": top.values, "topk_token_ids": top.indices}
        return Server._compute_server_forward_kl_loss(fake, found, log_p, labels)
    assert top_k == 1, "TRL has no other loss of a server's tokens"
    first, its_logps = top.indices[..., 0], top.values[..., 0]
    return Server._compute_sparse_top_1_divergence_loss(fake, log_p, first, its_logps, first, its_logps, labels)


found = {}
for name, case in given["cases"].items():
    student.zero_grad(set_to_none=True)
    logits = student(input_ids=ids, attention_mask=mask).logits[:, :-1]
    if case["top_k"]:
        loss = server_loss(logits, **case)
    else:
        how = {"beta": case["beta"], "temperature": case["temperature"]}
        loss = GKDTrainer.generalized_jsd_loss(logits, teacher_logits, labels=labels, **how)
    loss.backward()
    found[f"{name}/loss"] = loss.detach().numpy()
    for key, parameter in student.named_parameters():
        if parameter.grad is not None:
            found[f"{name}/grad/{key.replace('.default', '')}"] = parameter.grad.numpy().copy()
top = torch.log_softmax(teacher_logits, dim=-1).topk(given["top_k"], dim=-1)
save(**found, teacher_ids=top.indices.numpy(), teacher_logps=top.values.numpy())
