"""An adapter that began with a part of the weights, told as a change of the model as it was.

Dimension key: L layers, K in, R rank, N out.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from qlora_jax.config import LoraArgs
from qlora_jax.io.adapter_init import InitialAdapter
from qlora_jax.io.checkpoint import Run
from qlora_jax.models.add_adapters import Factors

NOTE = (
    "lora.init={}: this is a LoRA of twice the rank over the model as it was, in 16 bits. What quantization took from "
    "the weights in training is not in it, so logits differ from the run's by that; --with_base writes the base that "
    "was trained on, over which the adapter of its own rank computes what the run did"
)


class Exported(NamedTuple):
    """What leaves, and what is told of it.

    Fields:
      args: with which PEFT, and `add_lora`, give adapters of these shapes the scalings of training.
    """

    lora: Factors
    args: LoraArgs
    notes: list[str]


def as_exported(run: Run, with_base: bool) -> Exported:
    """A run's adapter for the base that it leaves with: that of training, or the model as it was."""
    if run.initial is None or with_base:
        return Exported(run.lora, run.lora_args, [])
    return Exported(*over_original(run.lora, run.lora_args, run.initial), [NOTE.format(run.lora_args.init)])


def over_original(lora: Factors, args: LoraArgs, initial: InitialAdapter) -> tuple[Factors, LoraArgs]:
    """The adapter over the model as it was: A and B beside the initial A and minus the initial B, of twice the rank.

    W + s (A B - A0 B0), where training had Q(W - taken) + s A B: so it differs by what quantization took from the rest
    (PiSSA), or what it took that A0 and B0 did not make up for (LoftQ). PEFT's subtract_mutated_init.
    """
    doubled = {
        name: {
            **leaves,
            "lora_a": np.concatenate([leaves["lora_a"], initial.factors[name]["lora_a"]], axis=2),
            "lora_b": np.concatenate([leaves["lora_b"], -initial.factors[name]["lora_b"]], axis=1),
        }
        if name in initial.factors
        else leaves  # rows of new tokens
        for name, leaves in lora.items()
    }
    larger = 2**0.5 if args.use_rslora else 2  # of alpha, so that scalings stay
    plain = LoraArgs()
    changed = dataclasses.replace(
        args,
        init="default",
        svd_niter=plain.svd_niter,
        loftq_iterations=plain.loftq_iterations,
        rank=2 * args.rank,
        alpha=larger * args.alpha,
        rank_pattern={name: 2 * rank for name, rank in args.rank_pattern.items()},
        alpha_pattern={name: larger * alpha for name, alpha in args.alpha_pattern.items()},
    )
    return doubled, changed
