"""Model FLOP utilization: which share of its device's peak a training step makes use of.

MFU = C / (seconds x peak), C being the operations that the model wants of a step: Chowdhery et al. 2022 (PaLM),
appendix B, where C = tokens (6 P + 12 L N H T). Here, where a frozen base has no gradient of its own,

  C = tokens L (4 P_frozen + 6 P_lora) + 12 N H pairs + targets (4 or 6) D V

P being weights of a layer's projections. What is computed again in the backward pass counts for nothing, and so does
what padding takes: a row of n tokens is n tokens, however long its batch is. PaLM counts T keys for each query; `pairs`
are those (query, key) that causality, windows and the ends of rows leave, over all layers. The head counts where it is
computed: for targets that the loss sees; 6 where it trains whole. DoRA and new tokens add their own products, and with
full finetuning 6 P_frozen are counted.

Dimension key: L layers, D embed, N q-heads, H head_dim, V vocab.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int64

from pallas_kernels.devices import Device
from pallas_kernels.gpu_specs import BF16_PEAKS
from qlora_jax.data.batching.batches import Batch
from qlora_jax.models.config import WeightFormat
from qlora_jax.training.cost.flops import HEAD_FLOPS, LAYER_FLOPS, StepShape

# Products of a layer that are as many as there are tokens.
EACH_TOKEN = [name for name in LAYER_FLOPS if not name.startswith(("attention", "dora"))]
PRODUCTS_OF_ATTENTION = 6  # q k^T and p v; dp, dk, dv, dq
NO_WINDOW = 1 << 62


@dataclasses.dataclass(frozen=True, kw_only=True)
class Utilization:
    """A step's useful operations, and the share of the peak that they are.

    Attributes:
      token, target, pair, micro_batch: FLOP of each token, target that is learned, pair (query, key) of a layer, and
        micro-batch (DoRA's norms).
      windows: how many layers have each window.
      peak: FLOP/s of the device; None where it is not known.
    """

    token: int
    target: int
    pair: int
    micro_batch: int
    windows: Mapping[int, int]
    peak: float | None

    def flops(self, lengths: Int64[np.ndarray, "A B R"], targets: int) -> int:
        """C of a step with rows of these lengths, of whose tokens the loss sees `targets`."""
        pairs = sum(layers * causal_pairs(lengths, window) for window, layers in self.windows.items())
        micro_batches = len(lengths) * self.micro_batch
        return int(lengths.sum()) * self.token + targets * self.target + pairs * self.pair + micro_batches

    def metrics(self, batch: Batch, targets: int, seconds: float) -> dict[str, Any]:
        """What a step's record says of it: `model_flops`, and `mfu` where the peak is known."""
        flops = self.flops(batch.lengths, targets)
        return {"model_flops": flops} | ({} if self.peak is None else {"mfu": flops / (seconds * self.peak)})


def causal_pairs(lengths: Int64[np.ndarray, "..."], window: int) -> int:
    """Pairs (query, key) of rows of n tokens: with m = min(n, window), the sum of m (m + 1) / 2 + (n - m) m."""
    seen = np.minimum(lengths, window)
    return int((seen * (seen + 1) // 2 + (lengths - seen) * seen).sum())


def utilization(step: StepShape, peak: float | None) -> Utilization:
    """Of a run's steps; of `step` the batch, remat and the optimizer do not matter."""
    one = dataclasses.replace(step, batch=(1, 1, 1), supervised=1)
    model, head = step.model, {name: part(one) for name, part in HEAD_FLOPS.items()}
    windows = model.windows or (None,) * model.num_layers
    return Utilization(
        token=model.num_layers * sum(LAYER_FLOPS[name](one) for name in EACH_TOKEN)
        + head["new_tokens forward"]
        + head["new_tokens backward"],
        # Half of what a whole head's backward pass adds is logits made again.
        target=head["head forward"] + head["head backward"] + head["whole_head backward"] // 2,
        pair=PRODUCTS_OF_ATTENTION * 2 * model.num_heads * model.head_dim,
        micro_batch=model.num_layers * LAYER_FLOPS["dora forward"](one),
        windows=Counter(NO_WINDOW if window is None else window for window in windows),
        peak=peak,
    )


def peak_flops(device: Device, weights: WeightFormat) -> float | None:
    """FLOP/s of dense products in 16 bit; None for devices that no table has (CPUs all), and for runs in float32."""
    return BF16_PEAKS.get(device.kind) if weights.dtype in ("bfloat16", "float16") else None
