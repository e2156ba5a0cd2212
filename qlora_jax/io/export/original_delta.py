"""Converts an adapter that started with a part of the weights to a LoRA over the original model.

Dimension key: L layers, K in, R rank, N out.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from qlora_jax.config import LoraArgs
from qlora_jax.io.initial_file import InitialAdapter
from qlora_jax.io.run_folder.checkpoint import Run
from qlora_jax.methods.method import Factors

NOTE = (
    "lora.init={}: this is a LoRA of twice the rank over the original 16-bit model. It does not contain the "
    "quantization error of training, so logits differ from the run's by that error; --with_base writes the base that "
    "was trained on, over which the adapter with its original rank computes exactly what the run did"
)


class ExportedAdapter(NamedTuple):
    """An adapter to export.

    Attributes:
      lora: LoRA parameters by our names.
      args: settings with which PEFT and `add_lora` give these parameters the scalings of training.
      notes: lines for users of the adapter.
    """

    lora: Factors
    args: LoraArgs
    notes: list[str]


def adapter_for_export(run: Run, with_base: bool) -> ExportedAdapter:
    """The run's adapter for the base that users will have: the one of training, or the original model."""
    if run.initial is None or with_base:
        return ExportedAdapter(run.lora, run.lora_args, [])
    return ExportedAdapter(
        *relative_to_original(run.lora, run.lora_args, run.initial), [NOTE.format(run.lora_args.init)]
    )


def relative_to_original(lora: Factors, args: LoraArgs, initial: InitialAdapter) -> tuple[Factors, LoraArgs]:
    """The adapter over the original model, of twice the rank: A next to the initial A, B next to minus the initial B.

    It computes W + s (A B - A0 B0), where training computed Q(W - subtracted) + s A B. The difference is the
    quantization error of the rest (PiSSA), or the part of it that A0 and B0 did not compensate (LoftQ). The method is
    PEFT's subtract_mutated_init.

    Returns:
      (LoRA parameters, settings).
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
    larger = 2**0.5 if args.use_rslora else 2  # times alpha, so that the scalings stay the same
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
