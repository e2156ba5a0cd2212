"""SentencePiece BPE vocabularies trained on `corpus` as GGUF metadata holds them; ids and texts they give `strings`.

`prefixed` puts a space before a text, as Llama's do; `bare` does not, and has symbols of the user's, as Gemma's.
"""

import io
import json

import numpy as np
import sentencepiece
from bridge import inputs, save

given = inputs()
found = {}
for name, symbols in {"prefixed": [], "bare": ["<table>", "\n\n"]}.items():
    prefix = name == "prefixed"
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(given["corpus"]),
        model_writer=file,
        model_type="bpe",
        vocab_size=700,
        byte_fallback=True,
        add_dummy_prefix=prefix,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=symbols,
        minloglevel=2,
    )
    model = sentencepiece.SentencePieceProcessor(model_proto=file.getvalue())
    ids = range(model.vocab_size())
    kinds = [2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 1 for i in ids]
    kinds = [4 if model.id_to_piece(i) in symbols else kinds[i] for i in ids]
    metadata = {
        "model": "llama",
        "tokens": [model.id_to_piece(i) for i in ids],
        "scores": [model.get_score(i) for i in ids],
        "token_type": kinds,
        "merges": [],
        "add_space_prefix": prefix,
    }
    rows = [model.encode(text) for text in given["strings"]]
    found[f"{name}/metadata"] = np.array(json.dumps(metadata))
    found[f"{name}/ids"] = np.array(json.dumps(rows))
    found[f"{name}/texts"] = np.array(json.dumps([model.decode(row) for row in rows]))
save(**found)
