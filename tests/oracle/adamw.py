"""torch.optim.AdamW with clip_grad_norm_ and transformers' schedules: parameters and learning rates of every step."""

import numpy as np
import torch
import transformers

# transformers calls a constant rate after a warm-up by another name, and ignores the warm-up of plain "constant".
SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


def run(settings: dict, start: dict[str, np.ndarray], gradients: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every leaf as [steps, ...] after each step, and `learning_rate` [steps] as used by each step."""
    parameters = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in start.items()}
    optimizer = torch.optim.AdamW(
        parameters.values(),
        lr=settings["learning_rate"],
        betas=(settings["beta1"], settings["beta2"]),
        eps=settings["eps"],
        weight_decay=settings["weight_decay"],
    )
    steps = settings["total_steps"]
    schedule = transformers.get_scheduler(
        SCHEDULES[settings["schedule"]], optimizer, settings["warmup_steps"], num_training_steps=steps
    )
    trace = {name: [] for name in [*start, "learning_rate"]}
    for step in range(steps):
        for name, parameter in parameters.items():
            parameter.grad = torch.tensor(gradients[name][step])
        torch.nn.utils.clip_grad_norm_(parameters.values(), settings["max_grad_norm"])
        trace["learning_rate"].append(np.float64(schedule.get_last_lr()[0]))
        optimizer.step()
        schedule.step()
        for name, parameter in parameters.items():
            trace[name].append(parameter.detach().numpy().copy())
    return {name: np.stack(values) for name, values in trace.items()}


if __name__ == "__main__":
    from bridge import inputs, save

    given = inputs()
    names = given["names"]
    save(**run(given["settings"], {n: given[n] for n in names}, {n: given[f"{n}_gradients"] for n in names}))
