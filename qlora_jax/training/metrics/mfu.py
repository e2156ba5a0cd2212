"""Model FLOP utilization (MFU): the share of the device's peak FLOP/s that a training step uses.

MFU = C / (seconds x peak), where C is the model's FLOP per step (Chowdhery et al. 2022, PaLM, appendix B). There
C = tokens (6 P + 12 L N H T). Here the frozen base has no weight gradient, so

  C = tokens L (4 P_frozen + 6 P_lora) + 12 N H pairs + targets (4 or 6) D V

Layers before the first adapter have no backward pass: they count tokens 2 P_frozen + 4 N H pairs.

P are the weights of a layer's projections. Recomputation in the backward pass does not count, and neither does padding:
a row of n tokens counts as n tokens, whatever the batch's length. PaLM counts T keys per query; `pairs` counts only the
(query, key) pairs that causality, windows and row ends allow, over all layers. A trunk counts once for all its
branches, and a branch counts the pairs with its trunk. The head counts for supervised targets only, with factor 6 if it
trains fully. New tokens and methods add their products, matrices that stay fixed take no gradient, and full finetuning
counts 6 P_frozen.

Dimension key: L layers, D embed, N q-heads, H head_dim, V vocab.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping

import numpy as np
from jaxtyping import Int64

from pallas_kernels import gpu_specs
from pallas_kernels.devices import Device
from qlora_jax.data.batching.packing import Batch
from qlora_jax.models.config import WeightFormat
from qlora_jax.training.cost.flops import HEAD_FLOPS, LAYER_FLOPS, method_work
from qlora_jax.training.cost.step_shape import StepShape

# Products of the model's layers whose cost is proportional to the tokens.
PER_TOKEN = [name for name in LAYER_FLOPS if not name.startswith("attention")]
ATTENTION_FORWARD, ATTENTION_BACKWARD = 2, 4  # products of a layer: q k^T and p v; dp, dk, dv, dq
NO_WINDOW = 1 << 62


@dataclasses.dataclass(frozen=True, kw_only=True)
class Utilization:
    """Computes a step's model FLOP and its utilization of the devices.

    Attributes:
      token: FLOP per token.
      target: FLOP per supervised target.
      pair: FLOP per (query, key) pair of one of attention's products.
      micro_batch: FLOP per micro-batch, whatever the tokens: work of methods on weights.
      products: the number of attention's products in all layers, per window.
      peak: the peak of all devices together in FLOP/s; None if it is not known.
    """

    token: int
    target: int
    pair: int
    micro_batch: int
    products: Mapping[int, int]
    peak: float | None

    def flops(
        self,
        lengths: Int64[np.ndarray, "A B R"],
        targets: int,
        parts: tuple[Int64[np.ndarray, " P"], Int64[np.ndarray, " P"]] | None = None,
    ) -> int:
        """Returns C of a step with rows of these lengths and this number of supervised targets.

        Args:
          parts: the depth and the length of each trunk and branch; None if each row is one text.
        """
        depths, counts = (np.zeros(1, np.int64), lengths) if parts is None else parts
        pairs = sum(
            products * (causal_pairs(depths + counts, window) - causal_pairs(depths, window))
            for window, products in self.products.items()
        )
        micro_batches = len(lengths) * self.micro_batch
        return int(lengths.sum()) * self.token + targets * self.target + pairs * self.pair + micro_batches

    def metrics(self, batch: Batch, targets: int, seconds: float) -> dict[str, int | float]:
        """Returns the entries of a step's record: `model_flops`, and `mfu` if the peak is known."""
        flops = self.flops(batch.lengths, targets, trunks_and_branches(batch))
        return {"model_flops": flops} | ({} if self.peak is None else {"mfu": flops / (seconds * self.peak)})


def trunks_and_branches(batch: Batch) -> tuple[Int64[np.ndarray, " P"], Int64[np.ndarray, " P"]] | None:
    """Returns the depth and the number of positions of each trunk and branch; None for rows without branches."""
    if batch.segments is None or batch.depths is None:
        return None
    length = batch.segments.shape[2]
    filled = np.arange(length) < batch.filled[..., None]
    rows = np.arange(batch.segments[..., 0].size).reshape(*batch.segments.shape[:2], 1)
    ids = (rows * (length + 1) + batch.segments)[filled]  # a row has at most one segment per position
    _, first, counts = np.unique(ids, return_index=True, return_counts=True)
    return batch.depths[filled][first].astype(np.int64), counts.astype(np.int64)


def causal_pairs(lengths: Int64[np.ndarray, "..."], window: int) -> int:
    """Returns the (query, key) pairs of rows of n tokens: the sum of m (m + 1) / 2 + (n - m) m, m = min(n, window)."""
    seen = np.minimum(lengths, window)
    return int((seen * (seen + 1) // 2 + (lengths - seen) * seen).sum())


def utilization(step: StepShape, peak: float | None, devices: int = 1, *, backward: bool = True) -> Utilization:
    """Returns the utilization of a run's steps; the batch, remat and optimizer of `step` are ignored.

    Args:
      peak: the peak of one device in FLOP/s.
      backward: False for only forward passes, such as that of the reference.
    """
    one = dataclasses.replace(step, batch=(1, 1, 1), supervised=1, tile=1)  # padding of tiles is not counted

    def is_counted(name: str) -> bool:
        return backward or name.endswith(" forward")

    model, head = step.model, {name: part(one) * is_counted(name) for name, part in HEAD_FLOPS.items()}
    layer = sum(LAYER_FLOPS[name](one) * is_counted(name) for name in PER_TOKEN)
    method: Counter[bool] = Counter()  # FLOP of its work, by whether that is the same for any number of tokens
    for work in method_work(one):
        method[work.per_micro_batch] += work.forward + backward * work.backward
    return Utilization(
        token=layer + method[False] + head["new_tokens forward"] + head["new_tokens backward"],
        # Half of what a fully trained head adds to the backward pass is recomputed logits.
        target=head["head forward"] + head["head backward"] + head["whole_head backward"] // 2,
        pair=2 * model.num_heads * model.head_dim,
        micro_batch=method[True],
        products=_attention_products(step, backward=backward),
        peak=None if peak is None else peak * devices,
    )


def _attention_products(step: StepShape, *, backward: bool) -> Counter[int]:
    """Returns the number of attention's products in all layers, per window."""
    products: Counter[int] = Counter()
    for layer, window in enumerate(step.model.windows or (None,) * step.model.num_layers):
        again = ATTENTION_BACKWARD * (backward and layer >= step.first_backward)
        products[NO_WINDOW if window is None else window] += ATTENTION_FORWARD + again
    return products


def peak_flops(device: Device, weights: WeightFormat) -> float | None:
    """Returns the peak FLOP/s of dense 16-bit products; None for CPUs, unknown devices and float32 runs."""
    return gpu_specs.peak_flops(device.kind, weights.dtype)
