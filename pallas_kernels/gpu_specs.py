"""NVIDIA GPUs as data: their specifications, and the text from which XLA compiles for an absent one.

Sources: `h100`, `h200`, `b200`, `a100` and `a6000` are XLA's descriptions, shortened (openxla/xla,
xla/backends/gpu/target_config/specs: h100_sxm, h200, b200, a100_sxm_80, a6000). XLA has none for `rtx4090`, `rtx3090`,
`l40s` and `rtx5090`: those rows follow NVIDIA's data sheets and the a6000, and were never compared with a card. Their
`memory_bytes` in particular is an estimate of what such a card reports, less than the nominal 24, 32 and 48 GB.
`bf16_flops` is from memory of data sheets: dense (not sparse) tensor cores, f32 accumulation. It agrees with XLA's
clocks for h100, h200 and b200; the others are unchecked.

XLA's own code compiles for all of them. Compiling a Hopper kernel (wgmma) for `b200` is an error; with jax 0.12.0.1 it
ends the compiler's process.
"""

import dataclasses
import difflib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
    """One GPU model. Sizes are in bytes, rates in units per second.

    Attributes:
      description: the name that the driver reports, which is `device_kind` in JAX.
      compute_capability: (major, minor).
      accelerated: True if code is compiled for this one architecture (sm_90a: TMA, wgmma), not for a family.
      bandwidth: device memory, bytes/s.
      bf16_flops: peak of a dense bf16 product with f32 accumulation, FLOP/s; a fused multiply-add is two FLOP.
      shared_memory_per_block: the opt-in limit of one block.
      source: the origin of the row.
    """

    name: str
    description: str
    compute_capability: tuple[int, int]
    accelerated: bool
    sm_count: int
    fp32_cores_per_sm: int
    threads_per_sm: int
    shared_memory_per_sm: int
    shared_memory_per_block: int
    l2_bytes: int
    memory_bytes: int
    bandwidth: float
    clock_ghz: float
    bf16_flops: float
    source: str

    @property
    def architecture(self) -> str:
        """ptxas's name of the architecture: sm_90a, sm_86."""
        return "sm_{}{}".format(*self.compute_capability) + ("a" if self.accelerated else "")


# Properties that cards of one generation share: shared memory per SM, and the part that one block may use.
AMPERE = {
    "accelerated": False,
    "threads_per_sm": 2048,
    "shared_memory_per_sm": 167936,
    "shared_memory_per_block": 166912,
}
SMALL = {
    "accelerated": False,
    "threads_per_sm": 1536,
    "shared_memory_per_sm": 102400,
    "shared_memory_per_block": 101376,
}
HOPPER = {
    "accelerated": True,
    "threads_per_sm": 2048,
    "shared_memory_per_sm": 233472,
    "shared_memory_per_block": 232448,
}

BLACKWELL_RTX = SMALL | {"accelerated": True}  # TMA; without wgmma and tcgen05

_ROWS = [
    Card(
        name="h100",
        description="NVIDIA H100 80GB HBM3",
        compute_capability=(9, 0),
        sm_count=132,
        fp32_cores_per_sm=128,
        l2_bytes=52428800,
        memory_bytes=84942979072,
        bandwidth=3352320000000,
        clock_ghz=1.98,
        bf16_flops=989.4e12,
        source="XLA h100_sxm; peak: NVIDIA H100 data sheet (SXM)",
        **HOPPER,
    ),
    Card(
        name="h200",
        description="NVIDIA H200 141GB HBM3e",
        compute_capability=(9, 0),
        sm_count=132,
        fp32_cores_per_sm=128,
        l2_bytes=52428800,
        memory_bytes=151397597184,
        bandwidth=4800000000000,
        clock_ghz=1.98,
        bf16_flops=989.4e12,
        source="XLA h200; peak: NVIDIA H200 data sheet (SXM)",
        **HOPPER,
    ),
    Card(
        name="b200",
        description="NVIDIA B200",
        compute_capability=(10, 0),
        sm_count=148,
        fp32_cores_per_sm=128,
        l2_bytes=132644864,
        memory_bytes=191514411008,
        bandwidth=7672320000000,
        clock_ghz=1.965,
        bf16_flops=2.25e15,
        source="XLA b200; peak: NVIDIA Blackwell data sheet (HGX B200)",
        **HOPPER,
    ),
    Card(
        name="a100",
        description="NVIDIA A100-SXM4-80GB",
        compute_capability=(8, 0),
        sm_count=108,
        fp32_cores_per_sm=64,
        l2_bytes=41943040,
        memory_bytes=85100068864,
        bandwidth=2039040000000,
        clock_ghz=1.41,
        bf16_flops=312e12,
        source="XLA a100_sxm_80; peak: NVIDIA A100 data sheet",
        **AMPERE,
    ),
    Card(
        name="a6000",
        description="NVIDIA RTX A6000",
        compute_capability=(8, 6),
        sm_count=84,
        fp32_cores_per_sm=128,
        l2_bytes=6291456,
        memory_bytes=51041271808,
        bandwidth=768096000000,
        clock_ghz=1.8,
        bf16_flops=154.8e12,
        source="XLA a6000; peak: NVIDIA RTX A6000 data sheet (309.7 with sparsity)",
        **SMALL,
    ),
    Card(
        name="rtx4090",
        description="NVIDIA GeForce RTX 4090",
        compute_capability=(8, 9),
        sm_count=128,
        fp32_cores_per_sm=128,
        l2_bytes=75497472,
        memory_bytes=25281560576,
        bandwidth=1008000000000,
        clock_ghz=2.52,
        bf16_flops=165.2e12,
        source="by hand; peak: NVIDIA Ada white paper (f32 accumulation)",
        **SMALL,
    ),
    Card(
        name="rtx3090",
        description="NVIDIA GeForce RTX 3090",
        compute_capability=(8, 6),
        sm_count=82,
        fp32_cores_per_sm=128,
        l2_bytes=6291456,
        memory_bytes=25281560576,
        bandwidth=936096000000,
        clock_ghz=1.695,
        bf16_flops=71e12,
        source="by hand; peak: NVIDIA GA102 white paper (142 with sparsity)",
        **SMALL,
    ),
    Card(
        name="l40s",
        description="NVIDIA L40S",
        compute_capability=(8, 9),
        sm_count=142,
        fp32_cores_per_sm=128,
        l2_bytes=100663296,
        memory_bytes=47697362944,
        bandwidth=864000000000,
        clock_ghz=2.52,
        bf16_flops=362e12,
        source="by hand; peak: NVIDIA L40S data sheet (733 with sparsity)",
        **SMALL,
    ),
    Card(
        name="rtx5090",
        description="NVIDIA GeForce RTX 5090",
        compute_capability=(12, 0),
        sm_count=170,
        fp32_cores_per_sm=128,
        l2_bytes=100663296,
        memory_bytes=33668988928,
        bandwidth=1792000000000,
        clock_ghz=2.407,
        bf16_flops=209.5e12,
        source="by hand; peak: NVIDIA RTX Blackwell white paper (f32 accumulation)",
        **BLACKWELL_RTX,
    ),
]

CARDS: dict[str, Card] = {card.name: card for card in _ROWS}

# Peaks by the name that the driver reports: those of the cards above, and of others with the same chip (the data sheets
# of A100 and H200 give one peak for all boards). H100 PCIe: its data sheet, and XLA's h100_pcie (114 SMs x 4096 FLOP x
# 1.62 GHz). A slice of a card (MIG) has a different name and no peak here.
BF16_PEAKS: dict[str, float] = {card.description: card.bf16_flops for card in _ROWS} | {
    "NVIDIA H200": CARDS["h200"].bf16_flops,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100-SXM4-40GB": CARDS["a100"].bf16_flops,
    "NVIDIA A100-PCIE-40GB": CARDS["a100"].bf16_flops,
    "NVIDIA A100 80GB PCIe": CARDS["a100"].bf16_flops,
}

# Equal for all of these cards.
_LIMITS = {
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "shared_memory_per_block": 49152,  # the default; Card has the opt-in limit
    "block_dim_limit_x": 2147483647,
    "block_dim_limit_y": 65535,
    "block_dim_limit_z": 65535,
    "registers_per_core_limit": 65536,
    "registers_per_block_limit": 65536,
    "thread_dim_limit_x": 1024,
    "thread_dim_limit_y": 1024,
    "thread_dim_limit_z": 64,
    "dnn_version": '"9.10.0"',
}


def find_card(name: str) -> Card:
    """Returns the card of this name.

    Raises:
      ValueError: the name is unknown; lists the known cards and suggests the nearest.
    """
    if name in CARDS:
        return CARDS[name]
    near = difflib.get_close_matches(name.lower(), CARDS, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"card {name!r} is unknown (known: {', '.join(CARDS)}).{hint}")


def target_config(card: Card) -> str:
    """Returns the text of XLA's stream_executor.GpuTargetConfigProto, for `get_topology_desc(target_config=...)`."""
    major, minor = card.compute_capability
    feature = "ACCELERATED_FEATURES" if card.accelerated else "NONE"
    fields = _LIMITS | {
        "core_count": card.sm_count,
        "fpus_per_core": card.fp32_cores_per_sm,
        "threads_per_core_limit": card.threads_per_sm,
        "shared_memory_per_core": card.shared_memory_per_sm,
        "shared_memory_per_block_optin": card.shared_memory_per_block,
        "l2_cache_size": card.l2_bytes,
        "device_memory_size": card.memory_bytes,
        "memory_bandwidth": int(card.bandwidth),
        "clock_rate_ghz": card.clock_ghz,
    }
    lines = [f"  {name}: {value}" for name, value in fields.items()]
    return "\n".join(
        [
            "gpu_device_info {",
            *lines,
            f"  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {feature} }}",
            "}",
            'platform_name: "CUDA"',
            "dnn_version_info { major: 9 minor: 10 patch: 0 }",
            f'device_description_str: "{card.description}"',
            "",
        ]
    )
