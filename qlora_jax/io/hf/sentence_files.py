"""Writes the files with which sentence-transformers computes an embedding run's embeddings from its merged model.

The modules are transformers' body, the pooling of the run's head, and the division by the length.
"""

import json
from pathlib import Path

from qlora_jax.atomic_files import write_text
from qlora_jax.nn.sequence_head import Pooling

POOLING, NORMALIZE = "1_Pooling", "2_Normalize"
# Names of versions before 6, which later ones read too.
TYPES = {"": "Transformer", POOLING: "Pooling", NORMALIZE: "Normalize"}
MODES = {"last": "pooling_mode_lasttoken", "mean": "pooling_mode_mean_tokens"}
OTHER_MODES = ("pooling_mode_cls_token", "pooling_mode_max_tokens", "pooling_mode_mean_sqrt_len_tokens")


def write_sentence_files(folder: Path, pooling: Pooling, width: int, max_positions: int) -> None:
    """Writes modules.json and the settings of each module into the folder of a merged model.

    Args:
      width: of an embedding.
      max_positions: tokens to which longer texts are cut.
    """
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (path, kind) in enumerate(TYPES.items())
    ]
    modes = {**dict.fromkeys((*MODES.values(), *OTHER_MODES), False), MODES[pooling]: True}
    files = {
        "modules.json": modules,
        "sentence_bert_config.json": {"max_seq_length": max_positions, "do_lower_case": False},
        "config_sentence_transformers.json": {"prompts": {}, "similarity_fn_name": "cosine"},
        f"{POOLING}/config.json": {"word_embedding_dimension": width, **modes, "include_prompt": True},
        f"{NORMALIZE}/config.json": {},
    }
    for name, values in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_text(folder / name, json.dumps(values, indent=2) + "\n")
