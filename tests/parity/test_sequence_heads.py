"""Objectives of sequence heads against transformers, TRL and torch, over the exported adapters."""

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qlora_jax as q
from qlora_jax.config import Config, DataArgs, LoraArgs, ModelArgs, write_config
from qlora_jax.io.export.merged import export_merged
from qlora_jax.io.export.peft import export_peft
from qlora_jax.io.head_file import write_head
from qlora_jax.io.loading.loader import Loaded, load_model
from qlora_jax.io.open_model import open_model
from qlora_jax.io.peft.head_adapters import split_head, with_head
from qlora_jax.io.peft.start_adapter import read_start_adapter
from qlora_jax.io.peft.writer import in_peft_format
from qlora_jax.io.pretrained import OpenedModel, open_finetuned
from qlora_jax.io.run_folder.checkpoint import CONFIG_FILE, Checkpoints
from qlora_jax.methods.attach import attach_method
from qlora_jax.models.config import WeightFormat
from qlora_jax.models.families import model_config
from qlora_jax.models.partition import ModelParts, combine, partition
from qlora_jax.nn.sequence_head import HeadSpec
from qlora_jax.objectives.classification import Classification, MultiLabel, Regression
from qlora_jax.objectives.embedding import Embedding
from qlora_jax.objectives.head_objective import TrainedHead
from qlora_jax.objectives.reward import Reward
from tests.io.tiny_models import random_weights, tiny_config, tokenizer_json, write_folder
from tests.marks import EXHAUSTIVE, SLOW

SCRIPT = Path(__file__).parent.parent / "oracle/sequence_losses.py"
LORA = LoraArgs(rank=4, alpha=8.0)
ROWS, EOS = 5, 2  # the base pads with EOS, as many do
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
RNG = np.random.default_rng(3)


@dataclasses.dataclass(frozen=True)
class Case:
    """An objective with its data: `texts[k][row]` are the ids of the k-th text of a data row."""

    objective: Classification | MultiLabel | Regression | Reward | Embedding
    head: TrainedHead
    values: dict[str, np.ndarray]  # [rows, texts, ...]

    @property
    def texts(self) -> list[list[list[int]]]:
        rng = np.random.default_rng(5)
        count = self.objective.sequences_per_row
        texts = [[rng.integers(3, 32, rng.integers(2, 9)).tolist() for _ in range(ROWS)] for _ in range(count)]
        return [[[*ids, EOS] if row % 2 else ids for row, ids in enumerate(each)] for each in texts]


def names_of(count: int) -> tuple[str, ...]:
    return tuple(f"label {index}" for index in range(count))


CASES = {
    "classification": Case(
        Classification(),
        TrainedHead(objective="classification", labels=names_of(3)),
        {"labels": RNG.integers(0, 3, (ROWS, 1)).astype(np.float32)},
    ),
    "multi_label": Case(
        MultiLabel(head=HeadSpec(outputs=4)),
        TrainedHead(objective="multi_label", labels=names_of(4)),
        {"labels": RNG.integers(0, 2, (ROWS, 1, 4)).astype(np.float32)},
    ),
    "regression": Case(
        Regression(),
        TrainedHead(objective="regression"),
        {"labels": RNG.normal(0, 2, (ROWS, 1)).astype(np.float32)},
    ),
    "reward": Case(
        Reward(center_rewards_coefficient=0.3),
        TrainedHead(objective="reward"),
        {"margins": np.repeat(RNG.uniform(0, 1, (ROWS, 1)), 2, 1).astype(np.float32)},
    ),
    "pairs of texts": Case(Embedding(temperature=0.2), TrainedHead(objective="embedding", pooling="mean"), {}),
    "hard negatives": Case(Embedding(sequences_per_row=3), TrainedHead(objective="embedding"), {}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config(pad_token_id=EOS)
    made = write_folder(tmp_path_factory.mktemp("model"), config, random_weights(config))
    words = json.loads(tokenizer_json()) | {"pre_tokenizer": {"type": "WhitespaceSplit"}}
    (made / "tokenizer.json").write_text(json.dumps(words))
    (made / "tokenizer_config.json").write_text(json.dumps(SPECIAL | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    return made


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Loaded:
    source = open_model(folder)
    return load_model(source, model_config(source.config), WeightFormat(quant_type=None, dtype="float32"))


@pytest.fixture(scope="module")
def body(loaded: Loaded) -> ModelParts:
    """The model without a head, with adapters that are not zero."""
    model = combine(partition(loaded.model))
    attach_method(model, LORA, jax.random.key(0))
    return _random(partition(model))


def _random(parts: ModelParts) -> ModelParts:
    rng = np.random.default_rng(7)
    return parts.with_lora(
        jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.1, leaf.shape), leaf.dtype), parts.lora)
    )


def parts_of(body: ModelParts, head: TrainedHead) -> ModelParts:
    """The model with a head."""
    model = combine(body)
    model.add_sequence_head(head.spec(), jax.random.key(1), 0.1)
    return partition(model)


def write_run(run: Path, folder: Path, fingerprint: str, parts: ModelParts, head: TrainedHead) -> OpenedModel:
    """A run's folder, as training leaves it."""
    args = ModelArgs(path=str(folder), quant_type="none", compute_dtype="float32")
    run.mkdir()
    config = Config(model=args, lora=LORA, data=DataArgs(train="x"), objective=head.objective, output=str(run))
    write_config(config, run / CONFIG_FILE)
    write_head(run, head)
    with Checkpoints(run, keep=1) as checkpoints:
        checkpoints.save(1, parts.lora, {"count": np.zeros(1)}, {"fingerprint": fingerprint})
    return open_finetuned(run)


def micro_batch(case: Case, places: Sequence[Sequence[int]], length: int, slots: int) -> dict[str, jax.Array]:
    """The arrays of a micro-batch whose rows pack the data rows `places[row]`."""
    shape, texts = (len(places), length), case.texts
    inputs, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    sequences, present = np.full(shape, slots, np.int32), np.zeros((len(places), slots), np.float32)
    values = {name: np.zeros((len(places), slots, *each.shape[2:]), np.float32) for name, each in case.values.items()}
    for row, packed in enumerate(places):
        at = slot = 0
        for data_row in packed:
            for k, of_row in enumerate(texts):
                span = slice(at, at + len(of_row[data_row]))
                inputs[row, span], sequences[row, span], present[row, slot] = of_row[data_row], slot, 1
                segments[row, span.stop :] += 1
                for name, each in case.values.items():
                    values[name][row, slot] = each[data_row, k]
                at, slot = span.stop, slot + 1
    arrays = {"inputs": inputs, "segments": segments, "sequences": sequences, "present": present}
    return jax.tree.map(jnp.asarray, arrays | values)


@jax.jit
def hidden_states(body: ModelParts, inputs: jax.Array, segments: jax.Array) -> jax.Array:
    return combine(body).hidden(inputs, segments_BT=segments)


@jax.jit
def backpropagate(body: ModelParts, inputs: jax.Array, segments: jax.Array, d_hidden_MD: jax.Array) -> Any:
    """Gradients by the adapters; one program for all objectives."""
    (grads,) = jax.vjp(lambda lora: hidden_states(body.with_lora(lora), inputs, segments), body.lora)[1](d_hidden_MD)
    return grads


def computed(case: Case, body: ModelParts, micro: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array, Any]:
    """(outputs of present slots, loss, gradients)."""
    parts, texts = parts_of(body, case.head), (micro["inputs"], micro["segments"])
    score = split_head(parts.lora)[1]

    def loss_of(score: Any, hidden_MD: jax.Array) -> tuple[jax.Array, jax.Array]:
        model = combine(parts.with_lora({**parts.lora, **score}))
        outputs = case.objective.outputs(model, hidden_MD, micro)
        losses_B = case.objective.row_losses(outputs, micro, case.objective.totals(micro))
        return jnp.sum(losses_B) / case.objective.count(micro), outputs

    hidden_MD = hidden_states(body, *texts)
    (loss, outputs), (by_score, by_hidden) = jax.jit(jax.value_and_grad(loss_of, (0, 1), has_aux=True))(
        score, hidden_MD
    )
    return outputs[np.asarray(micro["present"]) > 0], loss, backpropagate(body, *texts, by_hidden) | by_score


MERGED = ("classification", "pairs of texts")
LAYOUTS = {
    "one row each": ([[row] for row in range(ROWS)], 24, None),
    "packed": ([[3, 0], [4, 2, 1]], 64, 16),
}


TEXTS = ["t3 t4 t9", "t7", "t1 t2 t3 t4 t5 t6 t20", "t28 t28"]
IN_CI = ("classification", "reward", "pairs of texts")


@pytest.mark.parametrize(
    ("names", "layouts", "merges"),
    [
        pytest.param(IN_CI, ["packed"], MERGED[:1], marks=SLOW, id="some"),
        pytest.param([*CASES], [*LAYOUTS], MERGED, marks=EXHAUSTIVE, id="all"),
    ],
)
def test_losses_outputs_and_gradients_equal_the_oracle(
    names: Sequence[str],
    layouts: Sequence[str],
    merges: Sequence[str],
    folder: Path,
    loaded: Loaded,
    body: ModelParts,
    tmp_path: Path,
    oracle,
) -> None:
    cases = {name: CASES[name] for name in names}
    all_parts = {name: parts_of(body, case.head) for name, case in cases.items()}
    given: dict[str, dict[str, Any]] = {}
    for name, case in cases.items():
        run = write_run(tmp_path / name, folder, loaded.fingerprint, all_parts[name], case.head)
        export_peft(run, tmp_path / name / "peft")
        paths = {
            "folder": str(folder),
            "adapter": str(tmp_path / name / "peft"),
            **padding_of(tmp_path / name / "peft"),
        }
        given[name] = {"objective": case.head.objective, "outputs": case.head.outputs, **paths, **_data(case)}
        if name in merges:
            export_merged(run, tmp_path / name / "hf", "hf", dtype="float32")
            given[name] |= {"merged": str(tmp_path / name / "hf"), "texts": TEXTS}
    expected = oracle(SCRIPT, cases=given)
    assert expected["classification/id2label"].tolist() == list(CASES["classification"].head.labels)
    for name in merges:
        np.testing.assert_allclose(expected[f"{name}/merged"], expected[f"{name}/outputs"], atol=1e-4)
    found = q.classify(*q.load(str(tmp_path / "classification")), TEXTS)
    probabilities = [[*one.probabilities.values()] for one in found]
    np.testing.assert_allclose(probabilities, expected["classification/probabilities"], rtol=1e-4)
    assert [one.label for one in found] == [names_of(3)[index] for index in np.argmax(probabilities, axis=1)]
    for name, case in cases.items():
        for layout in layouts:
            places, length, slots = LAYOUTS[layout]
            micro = micro_batch(case, places, length, slots or case.objective.sequences_per_row)
            outputs, loss, grads = computed(case, body, micro)
            order = [row for packed in places for row in packed]
            wanted = expected[f"{name}/outputs"].reshape(case.objective.sequences_per_row, ROWS, -1)[:, order]
            found = np.asarray(outputs).reshape(ROWS, case.objective.sequences_per_row, -1)
            np.testing.assert_allclose(
                found.transpose(1, 0, 2), wanted, rtol=1e-4, atol=1e-5, err_msg=f"{name} {layout}"
            )
            np.testing.assert_allclose(loss, expected[f"{name}/loss"], rtol=1e-5, err_msg=f"{name} {layout}")
            _compare(grads, expected, name, case.head, combine(all_parts[name]).config)


def padding_of(adapter: Path) -> dict[str, int]:
    """The id of padding that README.md of an adapter sets, if it sets one."""
    found = re.search(r"pad_token_id=(\d+)", (adapter / "README.md").read_text())
    return {} if found is None else {"pad": int(found[1])}


def _data(case: Case) -> dict[str, Any]:
    if case.head.objective == "reward":
        assert isinstance(case.objective, Reward)
        margins = case.values["margins"][:, 0].tolist()
        return {"rows": case.texts, "margins": margins, "center": case.objective.center_rewards_coefficient}
    if isinstance(case.objective, Embedding):
        return {"rows": case.texts, "pooling": case.head.pooling, "temperature": case.objective.temperature}
    labels = case.values["labels"][:, 0]
    return {
        "rows": case.texts[0],
        "labels": (labels.astype(int) if case.head.objective == "classification" else labels).tolist(),
    }


def _compare(grads: Any, expected: dict[str, np.ndarray], name: str, head: TrainedHead, model: Any) -> None:
    """Compares gradients in PEFT's names and orientation, by their largest difference over the largest gradient."""
    bare, score = split_head(grads)
    config, tensors = in_peft_format(bare, LORA, model, "base")
    tensors = with_head(config, tensors, score, head, model)[1]
    theirs = {
        key.removeprefix(f"{name}/grad/"): value for key, value in expected.items() if key.startswith(f"{name}/grad/")
    }
    assert tensors.keys() == theirs.keys()
    for tensor, gradient in tensors.items():
        scale = np.abs(theirs[tensor]).max()
        assert scale > 0, tensor
        np.testing.assert_allclose(gradient / scale, theirs[tensor] / scale, atol=1e-5, err_msg=f"{name}: {tensor}")


@pytest.mark.parametrize("name", ["classification", "hard negatives"])
def test_an_exported_head_is_read_back(
    name: str, folder: Path, loaded: Loaded, body: ModelParts, tmp_path: Path
) -> None:
    case = CASES[name]
    parts = parts_of(body, case.head)
    run = write_run(tmp_path / "run", folder, loaded.fingerprint, parts, case.head)
    export_peft(run, tmp_path / "adapter")
    adapter = open_finetuned(tmp_path / "adapter").run
    assert adapter is not None and adapter.head == case.head
    jax.tree.map(np.testing.assert_array_equal, adapter.lora, jax.tree.map(np.asarray, parts.lora))
    with pytest.raises(ValueError, match=f"objective={case.head.objective}"):
        export_merged(run, tmp_path / "gguf", "gguf", dtype="float16")
    started = read_start_adapter(tmp_path / "adapter", run.features, LORA, (), case.head)
    assert ("score" in started) == (name == "classification")


@pytest.mark.slow
def test_sentence_transformers_computes_our_embeddings(
    folder: Path, loaded: Loaded, body: ModelParts, tmp_path: Path, oracle
) -> None:
    """Both poolings, in padded batches, of a base that pads with the end of a text."""
    names, folders = ["pairs of texts", "hard negatives"], {}
    for name in names:
        run = write_run(tmp_path / name, folder, loaded.fingerprint, parts_of(body, CASES[name].head), CASES[name].head)
        export_merged(run, tmp_path / name / "hf", "hf", dtype="float32")
        folders[name] = str(tmp_path / name / "hf")
    theirs = oracle(SCRIPT.with_name("sentence_embeddings.py"), folders=folders, texts=TEXTS)
    for name in names:
        ours = q.embed(*q.load(str(tmp_path / name), compute_dtype="float32"), TEXTS)
        np.testing.assert_allclose(theirs[name], ours, atol=1e-4, err_msg=name)
        assert np.abs(ours[0] - ours[1]).max() > 1e-2
