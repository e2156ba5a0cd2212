"""bitsandbytes' optimizers on its CPU backend: parameters and states after each step.

In: `settings`, JSON {class, options, rates: one a step}; `names`; of each name the tensor it starts from, and
`{name}.gradients` [steps, *shape]. Out: `{name}` [steps, *shape] after each step, and of the last step `{name}.state1`,
`.state2`, `.absmax1`, `.absmax2` as far as the optimizer has them.
"""

import bitsandbytes as bnb
import numpy as np
import torch

STATES = ("state1", "state2", "absmax1", "absmax2")


def exact_root(x: torch.Tensor) -> torch.Tensor:
    """torch leaves square roots to MKL, which on some CPUs is an ulp off for one value in five; this one is IEEE's."""
    return x.double().pow(0.5).float()


def run(settings: dict, start: dict[str, np.ndarray], gradients: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every tensor [steps, ...] after each step, and the states after the last."""
    torch.Tensor.sqrt = exact_root
    parameters = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in start.items()}
    optimizer = getattr(bnb.optim, settings["class"])(parameters.values(), **settings["options"])
    trace = {name: [] for name in start}
    for step, rate in enumerate(settings["rates"]):
        optimizer.param_groups[0]["lr"] = rate
        for name, parameter in parameters.items():
            parameter.grad = torch.tensor(gradients[name][step])
        optimizer.step()
        for name, parameter in parameters.items():
            trace[name].append(parameter.detach().numpy().copy())
    result = {name: np.stack(values) for name, values in trace.items()}
    for name, parameter in parameters.items():
        held = optimizer.state[parameter]
        result |= {f"{name}.{key}": held[key].numpy() for key in STATES if held.get(key) is not None}
    return result


if __name__ == "__main__":
    from bridge import inputs, save

    given = inputs()
    names = given["names"]
    save(**run(given["settings"], {n: given[n] for n in names}, {n: given[f"{n}.gradients"] for n in names}))
