"""What each Mosaic kernel can do, known without importing Mosaic, and up to how many rows it is taken."""

from pallas_kernels.nf4_matmul.dispatch import Abilities

# A weight that is dequantized first is written to memory and read again: 4.5 bytes a weight that a fused kernel saves,
# whatever M; what a fused kernel loses beside cuBLAS grows with M. With 1.34 ps a weight saved on an H100, and a tenth
# lost of the 2 M / (0.75 x 989e12) s that cuBLAS takes, they meet at M = 5000. By reasoning: no card has measured it.
MOST_ROWS = 4096

_EVERY_KERNEL = {
    "layouts": ("split_k",),
    "dtypes": ("bfloat16", "float16"),
    "block_sizes": (64, 128, 256, 512, 1024, 2048, 4096),
    "multiples": (64, 64),
}

HOPPER = Abilities(devices=("sm_90",), rows=(1, MOST_ROWS), **_EVERY_KERNEL)
