"""Reads rows as training of a sequence head reads them, and computes the head's outputs for their texts.

Outputs are logits, numbers, rewards, or pooled hidden states. Many texts are packed into rows of one length, in which
each sees only itself: few positions are padding, and one program computes them all. If rotations depend on the row's
length, each text has its own row.

Dimension key: R rows or texts, K texts of a row, C outputs of the head, B rows of a batch, T positions, S slots for the
texts of a row.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Float64, Int, Int32

from qlora_jax.config import QuestionArgs
from qlora_jax.data.branch_tree import whole_texts
from qlora_jax.data.branches.encoder import make_branch_encoder
from qlora_jax.data.encoder import check_rows
from qlora_jax.data.formats.detect import detect_format
from qlora_jax.data.formats.registry import OPTIONAL_COLUMNS
from qlora_jax.data.formats.unlabelled import check_text_count
from qlora_jax.data.loss_mask.reference import EncodedRow, SequenceValues
from qlora_jax.data.readers.files import Place, Problem, Row, raise_problems
from qlora_jax.data.row_kinds import row_use
from qlora_jax.evaluation.batches import PackedBatch, packed_batches
from qlora_jax.evaluation.task import ProgressCallback, TaskContext
from qlora_jax.evaluation.task_file import read_task_rows
from qlora_jax.inference.lowering import LoweredProgram, config_of, lower_program
from qlora_jax.inference.mesh_inference import row_shards, run_on_mesh
from qlora_jax.inference.result_cache import NO_CACHE, ResultCache
from qlora_jax.models.partition import ModelFunction, ModelParts, combine
from qlora_jax.objectives.head_objective import TrainedHead
from qlora_jax.sharding import AnyMesh, gather_rows, mesh_of

TextIds = Int32[np.ndarray, " _"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadRows:
    """The rows of a task's file.

    Attributes:
      path, places: the file, and each row's place in it.
      texts: the ids of the texts of all rows in order, equally many of each row.
      values: the labels and other numbers of each row, by name.
    """

    path: str
    places: Sequence[Place]
    texts: Sequence[TextIds]
    values: Sequence[Mapping[str, SequenceValues]]

    def outputs(
        self, parts: ModelParts, progress: ProgressCallback, cache: ResultCache
    ) -> Float64[np.ndarray, "R K C"]:
        """Returns the head's outputs for each text of each row.

        Raises:
          ValueError: outputs are not finite; the message lists the rows.
        """
        outputs = sequence_outputs(parts, self.texts, progress, cache)
        rows_RKC = outputs.reshape(len(self.places), -1, outputs.shape[1])
        check_are_finite(self.path, self.places, rows_RKC)
        return rows_RKC


def check_are_finite(path: str, places: Sequence[Place], outputs_RKC: Float64[np.ndarray, "R *_"]) -> None:
    """Raises one ValueError that lists every row with an output that is infinite or not a number."""
    problem = "an output of the sequence head is not finite, so it has no score. Check the model's weights"
    wrong_R = ~np.isfinite(outputs_RKC).reshape(len(places), -1).all(axis=1)
    raise_problems(path, [(places[row], problem) for row in np.flatnonzero(wrong_R).tolist()], len(places))


def read_head_rows(path: str, settings: QuestionArgs, context: TaskContext) -> HeadRows:
    """Returns the encoded rows of a task's file.

    Raises:
      ValueError: rows that do not fit the head's objective, have unknown labels or are too long; the message lists
        them.
    """
    rows = read_task_rows(path, "rows", settings.file_columns, settings.max_rows, OPTIONAL_COLUMNS)
    return encode_head_rows(path, rows, settings.file_columns, context)


def encode_head_rows(path: str, rows: Sequence[Row], names: Mapping[str, str] | None, context: TaskContext) -> HeadRows:
    """Returns the ids and the labels of rows.

    Args:
      names: our column names -> their names in the file, for messages.
    """
    head = context.head
    assert head is not None
    row_format = detect_format(path, rows, names=names, setting="file_columns", objective=head.objective)
    check_text_count(path, row_format, head.text_columns)
    check_rows(path, rows, row_format)
    encoder = make_branch_encoder(row_format, context.tokenizer, row_use(head.objective), head.labels)
    problems: list[Problem] = []
    places, encoded = encoder.begin(rows, problems)()(problems)
    problems += too_long(places, encoded, context.max_positions)
    raise_problems(path, problems, len(rows))
    texts = [*itertools.chain.from_iterable(map(texts_of, encoded))]
    return HeadRows(path=path, places=places, texts=texts, values=[row.values for row in encoded])


def too_long(places: Sequence[Place], rows: Sequence[EncodedRow], max_positions: int) -> list[Problem]:
    """Returns the rows that have a text with more tokens than the model has positions."""
    return [
        (place, f"too long (found {longest} tokens; the model has {max_positions} positions). Shorten it")
        for place, row in zip(places, rows, strict=True)
        if (longest := max(map(len, texts_of(row)))) > max_positions
    ]


def texts_of(row: EncodedRow) -> list[TextIds]:
    """Returns the ids of each text of a row, without the filler at its end."""
    return [ids[:-1] for ids, _ in whole_texts(row.ids, row.supervised, row.branches)]


def head_of_task(context: TaskContext, task: str, objectives: Sequence[str]) -> TrainedHead:
    """Returns the head of the model to score.

    Raises:
      ValueError: the model has no head of these objectives.
    """
    head = context.head
    if head is None or head.objective not in objectives:
        found = "a model without a sequence head" if head is None else f"a head of objective={head.objective}"
        raise ValueError(
            f"{task}: cannot score the model (found {found}, expected {' or '.join(objectives)}). Remove it"
        )
    return head


@functools.partial(ModelFunction, static_argnames=("slots", "mesh"))
def outputs_of_batch(
    parts: ModelParts,
    tokens_BT: Int[Array, "B T"],
    slots_BT: Int[Array, "B T"],
    *,
    slots: int,
    mesh: AnyMesh | None = None,
) -> Float[Array, "B S C"]:
    """Returns the head's outputs for the texts of each row, in f32; those of empty slots are undefined.

    Args:
      slots_BT: the slot of the text that each position belongs to, ascending; S for padding.
      slots: S.
    """

    def program(parts: ModelParts, tokens_BT: jax.Array, slots_BT: jax.Array) -> jax.Array:
        model = combine(parts)
        assert model.score is not None
        # One text per row needs no mask: no token sees the padding on its right.
        hidden_MD = model.hidden(tokens_BT, segments_BT=slots_BT if slots > 1 else None)
        return gather_rows(model.score(hidden_MD, slots_BT, slots), mesh, axis=0)

    return run_on_mesh(program, parts, (tokens_BT, slots_BT), mesh, P())


def sequence_outputs(
    parts: ModelParts,
    texts: Sequence[TextIds],
    progress: Callable[[int], None] = lambda texts_done: None,
    cache: ResultCache = NO_CACHE,
) -> Float64[np.ndarray, "R C"]:
    """Returns the head's outputs for each text, in order.

    Args:
      progress: called with the number of texts done so far.
      cache: outputs of this model.
    """
    found: dict[int, np.ndarray] = {}
    mesh = mesh_of(parts)
    for batch in _batches(parts, texts):
        arrays = batch.arrays(texts)
        compute = functools.partial(outputs_of_batch, parts, *arrays, slots=batch.slots, mesh=mesh)
        (outputs_BSC,) = cache.get_or_compute((*arrays, batch.slots), lambda compute=compute: (compute(),))
        for members, outputs_SC in zip(batch.packs, outputs_BSC, strict=False):
            found |= dict(zip(members, outputs_SC, strict=False))
        progress(len(found))
    return np.stack([found[index] for index in range(len(texts))]).astype(np.float64)


def lower_outputs(parts: ModelParts, texts: Sequence[TextIds]) -> Iterator[LoweredProgram]:
    """Lowers the program of the largest batch; `parts` may be ShapeDtypeStructs."""
    batch = max(_batches(parts, texts), key=lambda batch: batch.positions)
    yield lower_program(batch.shape, outputs_of_batch, parts, batch.arrays(texts), slots=batch.slots)


def _batches(parts: ModelParts, texts: Sequence[TextIds]) -> list[PackedBatch]:
    share = not config_of(parts).rotations_depend_on_length
    return packed_batches([len(ids) for ids in texts], row_shards(mesh_of(parts)), share=share)
