"""The small models of the study of formats: their tokenizer, weights and texts."""

import json

import numpy as np
import tokenizers

from scripts.study_formats import pretraining


def test_passages_are_either_learned_or_held_out(tmp_path):
    train, heldout = pretraining.write_texts(tmp_path)
    learned = [json.loads(line)["text"] for line in train.read_text(encoding="utf-8").splitlines()]
    held_out = heldout.read_text(encoding="utf-8").split("\n\n")
    assert len(learned) > 4000 and len(held_out) >= 400
    assert all(pretraining.QUESTION.strip() not in passage for passage in learned)


def test_a_random_model_differs_by_seed_and_its_tokenizer_gives_texts_back(tmp_path):
    train = tmp_path / "train.jsonl"
    train.write_text("".join(json.dumps({"text": f"The sea, the ship and {word}."}) + "\n" for word in "abcdefgh"))
    for seed in (0, 1):
        pretraining.write_random_model(tmp_path / str(seed), train, seed)
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "0/tokenizer.json"))
    assert backend.decode(backend.encode("Ein Schiff, 船.").ids) == "Ein Schiff, 船."
    assert backend.get_vocab_size() <= pretraining.VOCABULARY and backend.token_to_id(pretraining.END) == 0
    first, second = (pretraining.random_weights(np.random.default_rng(seed)) for seed in (0, 1))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not np.array_equal(first[name], second[name]) and abs(first[name].std() - 0.02) < 0.001
    assert all(weight.shape[-1] % 64 == 0 for weight in first.values())
