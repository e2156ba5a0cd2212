"""The identity of a model's files."""

import os

from qlora_jax.studies.local_model import files_digest

SIZE = 16 << 20


def test_one_byte_anywhere_in_a_file_makes_another_model(tmp_path):
    digests = set()
    for number, place in enumerate([None, 0, SIZE // 4, SIZE // 2, SIZE - 1]):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        with (folder / "model.safetensors").open("wb") as file:
            file.truncate(SIZE)
            if place is not None:
                file.seek(place)
                file.write(b"x")
        digests.add(files_digest(folder))
    assert len(digests) == 5


def test_names_count_and_times_do_not(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"weights")
    before = files_digest(file)
    os.utime(file, (1, 1))
    assert files_digest(file) == before
    assert files_digest(file.rename(tmp_path / "other.gguf")) != before
