"""Attention: causal for training, and over a key-value cache for decoding."""

from pallas_kernels.attention.api import causal_attention as causal_attention
from pallas_kernels.attention.api import paged_attention as paged_attention
from pallas_kernels.attention.api import shared_bounds as shared_bounds
from pallas_kernels.attention.pages import KVPages as KVPages
