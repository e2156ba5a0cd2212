"""bitsandbytes on its CPU backend: quantizes and dequantizes groups of equally shaped weights.

In: `settings`, JSON {group: {quant_type, block_size, double_quant, dtype}}, and for each group the weights [T, *shape]
(bfloat16 as uint16). Out, for each group: `{group}.codes` [T, bytes], `.absmax` [T, blocks] or `.absmax_codes`,
`.nested_absmax`, `.nested_offset`, and `.weights` [T, *shape], dequantized, widened to f32.
"""

import bridge
import numpy as np
import torch
from bitsandbytes import functional as bnb

# torch's mean, which double quantization starts with, depends on the number of threads.
torch.set_num_threads(1)


def constants(state: bnb.QuantState) -> dict[str, np.ndarray]:
    if not state.nested:
        return {"absmax": state.absmax.numpy()}
    return {
        "absmax_codes": state.absmax.numpy(),
        "nested_absmax": state.state2.absmax.numpy(),
        "nested_offset": state.offset.numpy(),
    }


def quantized(weight: torch.Tensor, quant_type: str, block_size: int, double_quant: bool) -> dict[str, np.ndarray]:
    codes, state = bnb.quantize_4bit(
        weight, blocksize=block_size, compress_statistics=double_quant, quant_type=quant_type
    )
    weights = bnb.dequantize_4bit(codes, state).float().numpy()
    return {"codes": codes.numpy().reshape(-1), "weights": weights, **constants(state)}


def main() -> None:
    given, results = bridge.inputs(), {}
    for group, settings in given["settings"].items():
        weights = torch.from_numpy(given[group])
        dtype = getattr(torch, settings.pop("dtype"))
        weights = weights.view(dtype) if dtype == torch.bfloat16 else weights.to(dtype)
        each = [quantized(weight, **settings) for weight in weights]
        results |= {f"{group}.{name}": np.stack([result[name] for result in each]) for name in each[0]}
    bridge.save(**results)


if __name__ == "__main__":
    main()
