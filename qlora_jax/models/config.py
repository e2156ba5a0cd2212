"""What a decoder is made of, as features; a family file maps a Hugging Face config to them."""

import dataclasses

from pallas_kernels.nf4_matmul.layouts import preferred_layout
from qlora_jax.nn.rope import Rope


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The features of one decoder-only language model. Every feature is honoured by models/decoder.py.

    Attributes:
      vocab_size: V, rows of the embedding.
      embed_dim: D, width of the residual stream.
      num_layers: L.
      num_heads: N, query heads.
      num_kv_heads: K, key and value heads; N % K == 0.
      head_dim: H.
      mlp_dim: F, inner width of the gated MLP.
      norm_eps: added to the mean square in RMSNorm.
      rope: rotary embedding and its scaling.
      tie_embeddings: the head is the embedding itself.
      qkv_bias, o_bias, mlp_bias: which projections add a bias.
      max_positions: longest sequence that the model was made for.
    """

    vocab_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    norm_eps: float
    rope: Rope
    tie_embeddings: bool
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    max_positions: int

    def linear_shapes(self) -> dict[str, tuple[tuple[int, int], bool]]:
        """Name within a layer -> ((N out, K in), has a bias), for each projection."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        d, f = self.embed_dim, self.mlp_dim
        return {
            "self_attn.q_proj": ((q, d), self.qkv_bias),
            "self_attn.k_proj": ((kv, d), self.qkv_bias),
            "self_attn.v_proj": ((kv, d), self.qkv_bias),
            "self_attn.o_proj": ((d, q), self.o_bias),
            "mlp.gate_proj": ((f, d), self.mlp_bias),
            "mlp.up_proj": ((f, d), self.mlp_bias),
            "mlp.down_proj": ((d, f), self.mlp_bias),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightFormat:
    """How the frozen weights are held.

    Attributes:
      quant_type: a key of CODE_TABLES for the linear layers, or None: dense, in `dtype`.
      platform: the device's, as jax names it; chooses the layout of the codes.
      dtype: of embedding, head, norms and biases, and of activations.
    """

    quant_type: str | None = "nf4"
    block_size: int = 64
    double_quant: bool = True
    nested_block_size: int = 256
    platform: str = "cpu"
    dtype: str = "bfloat16"

    def layout_for(self, shape: tuple[int, int]) -> str:
        """The layout that a weight of (N, K) gets."""
        return preferred_layout(self.platform, shape, self.block_size)
