"""torch.amp.GradScaler: its state after steps whose gradients are finite or not."""

import numpy as np
import torch
from bridge import inputs, save


def run(finite: list[bool], growth_interval: int) -> dict[str, np.ndarray]:
    """`factor`, `finite_steps` and `updates`, the number of updates so far, after each step."""
    scaler = torch.amp.GradScaler("cpu", growth_interval=growth_interval)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    found = []
    for is_finite in finite:
        scaler.scale(parameter.sum()).backward()
        if not is_finite:
            parameter.grad.fill_(float("inf"))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        found.append((scaler.get_scale(), int(scaler._growth_tracker), -parameter.item()))
    return dict(zip(("factor", "finite_steps", "updates"), map(np.array, zip(*found, strict=True)), strict=True))


save(**run(**inputs()))
