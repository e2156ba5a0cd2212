"""TRL's generalized Jensen-Shannon divergence of a student from a teacher, and its gradient by hidden states.

`hidden` [M, D] and `table` [V, D] of the student, those of the teacher, `wanted` [M], `betas`, `temperature`.
"""

import torch
from bridge import inputs, save
from trl.experimental.gkd import GKDTrainer

given = inputs()
table, teacher_hidden, teacher_table = (
    torch.tensor(given[name]) for name in ("table", "teacher_hidden", "teacher_table")
)
labels = torch.where(torch.tensor(given["wanted"]), 0, -100)[None]
found = {}
for beta in given["betas"]:
    hidden = torch.tensor(given["hidden"], requires_grad=True)
    logits, teacher_logits = (hidden @ table.T)[None], (teacher_hidden @ teacher_table.T)[None]
    how = {"beta": beta, "temperature": given["temperature"]}
    loss = GKDTrainer.generalized_jsd_loss(logits, teacher_logits, labels=labels, **how)
    loss.backward()
    found |= {f"{beta}/loss": loss.detach().numpy(), f"{beta}/grad": hidden.grad.numpy()}
save(**found)
