"""The rows of bench/train.py, and the operations of a training step in each."""

import dataclasses
from collections.abc import Iterable

from pallas_kernels.native.library import fast_bfloat16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a decoder-only model with grouped-query attention, a gated MLP and a head."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int

    def linears(self) -> tuple[tuple[int, int], ...]:
        """Returns (out, in) of each projection of a layer: q, k, v, o, gate, up, down."""
        q, kv, d, f = self.heads * self.head_dim, self.kv_heads * self.head_dim, self.width, self.mlp
        return ((q, d), (kv, d), (kv, d), (d, q), (f, d), (f, d), (d, f))


SHAPES = {
    "smollm2": Shape(layers=30, width=576, heads=9, kv_heads=3, head_dim=64, mlp=1536, vocab=49152),
    "random-15m": Shape(layers=6, width=320, heads=5, kv_heads=5, head_dim=64, mlp=896, vocab=24576),
    "qwen2-0.5b": Shape(layers=24, width=896, heads=14, kv_heads=2, head_dim=64, mlp=4864, vocab=151936),
}


def training_flops(shape: Shape, batch: int, seq: int, rank: int) -> float:
    """Returns the FLOP of one step: 2 per multiply-add of the necessary matrix products.

    With M = batch * seq tokens, each layer has:
      4 M out in for each frozen projection: forward, and the gradient of its input (the weight has no gradient);
      6 M rank (out + in) for its adapter: forward, input, parameters;
      6 batch heads head_dim seq^2 for attention: q k^T, weights v, four products backward, each over the causal half.
    The head has 4 M vocab width. Recomputation (checkpointing, scores in attention's backward pass) and element-wise
    operations are not counted.
    """
    m = batch * seq
    frozen = sum(4 * m * out * into for out, into in shape.linears())
    adapters = sum(6 * m * rank * (out + into) for out, into in shape.linears())
    attention = 6 * batch * shape.heads * shape.head_dim * seq**2
    return float(shape.layers * (frozen + adapters + attention) + 4 * m * shape.vocab * shape.width)


# Arguments of opponents/torch_qlora_cpu.py. With checkpointing, compiling the whole model takes more than three
# minutes; compiling each layer works, and is faster than eager.
MODEL = ("--compile", "model")
LAYERS = ("--compile", "layers")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the table.

    Attributes:
      model: a key of SHAPES.
      checkpointing: the opponent's gradient checkpointing, and `train.remat: full` for ours. Otherwise each side's
        default; ours is `names`, which saves the results of products and recomputes norms and activations.
      f32: compute in float32; otherwise in bfloat16 with float32 adapters, where the processor multiplies it. Where it
        is emulated, both sides are faster in float32, and every row is in float32.
      opponents: configurations of the opponent; the fastest counts.
      steps: counted steps per block.
    """

    model: str = "smollm2"
    batch: int = 1
    seq: int = 512
    rank: int = 16
    checkpointing: bool = False
    f32: bool = False
    opponents: tuple[tuple[str, ...], ...] = (MODEL,)
    steps: int = 4

    def describe(self) -> str:
        """Returns one line that describes the row."""
        dtype, opponents = self.dtype(), " | ".join(map(" ".join, self.opponents))
        sizes = f"batch {self.batch}, {self.seq} tokens, rank {self.rank}"
        return f"{self.model}, {sizes}, {dtype}, remat {self.remat()}; against {opponents}"

    def flops(self) -> float:
        """Returns the FLOP of one step."""
        return training_flops(SHAPES[self.model], self.batch, self.seq, self.rank)

    def dtype(self) -> str:
        """Returns the dtype of the products."""
        return "float32" if self.f32 or not fast_bfloat16() else "bfloat16"

    def remat(self) -> str:
        """Returns our setting `train.remat`."""
        return "full" if self.checkpointing else "names"

    def our_arguments(self, model_path: str) -> list[str]:
        """Returns arguments of workers/train_step.py."""
        return [*self._shared(model_path), "--remat", self.remat(), "--compute_dtype", self.dtype()]

    def their_arguments(self, model_path: str, configuration: Iterable[str]) -> list[str]:
        """Returns arguments of opponents/torch_qlora_cpu.py."""
        dtype = ["--dtype", {"float32": "fp32", "bfloat16": "mixed"}[self.dtype()]]
        checkpointing = ["--checkpointing"] if self.checkpointing else []
        return [*self._shared(model_path), *dtype, *configuration, *checkpointing, "--in_turns"]

    def _shared(self, model_path: str) -> list[str]:
        sizes = {"--batch": self.batch, "--seq": self.seq, "--rank": self.rank}
        return ["--model", model_path, *(str(part) for size in sizes.items() for part in size)]


def _smollm2_rows() -> dict[str, Row]:
    """Returns all combinations of batch, checkpointing and rank."""
    rows = {}
    for batch, steps in ((1, 4), (4, 2)):
        for suffix, checkpointing, opponents in (("", False, (MODEL,)), ("-ckpt", True, (LAYERS,))):
            for rank in (16, 64):
                row = Row(batch=batch, rank=rank, checkpointing=checkpointing, opponents=opponents, steps=steps)
                rows[f"b{batch}-r{rank}{suffix}"] = row
    return rows


ROWS = {
    **_smollm2_rows(),
    "f32": Row(f32=True),
    "qwen2-0.5b": Row(model="qwen2-0.5b", steps=2),
    "seq2048": Row(seq=2048, opponents=(MODEL, LAYERS), steps=2),
    "seq4096": Row(seq=4096, opponents=(MODEL, LAYERS), steps=1),
}
