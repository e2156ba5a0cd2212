"""A teacher that runs on the devices of the run.

Dimension key: B rows, T positions, M = B T, D embed, K tokens, L = K + 1.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import xxhash
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from qlora_jax.config import ModelArgs
from qlora_jax.inference.mesh_inference import run_on_mesh
from qlora_jax.inference.result_cache import code_digest, digest
from qlora_jax.io.digests import json_digest, tree_digests
from qlora_jax.io.pretrained import OpenedModel, apply_adapter, load_base
from qlora_jax.models.config import WeightFormat
from qlora_jax.models.decoder import bytes_of
from qlora_jax.models.partition import ModelFunction, ModelParts, combine, partition, place_parts
from qlora_jax.models.precision import weight_format
from qlora_jax.nn.lm_head.chosen_tokens import likeliest_tokens
from qlora_jax.nn.lm_head.sharded_vocabulary import at_temperature
from qlora_jax.sharding import AnyMesh, gather_rows
from qlora_jax.training.device_mesh import place_batch
from qlora_jax.training.step import text_separation
from qlora_jax.training.teacher.logprob_cache import Arrays, Predictions, check_are_known

FORM = 1  # raised by a change after which stored predictions no longer hold
BLOCK = 16 * 2**20  # bytes of a file that are hashed at once


@functools.partial(ModelFunction, static_argnames=("count", "temperature", "mesh"))
def predict_likeliest(
    parts: ModelParts, batch: dict[str, jax.Array], *, count: int, temperature: float, mesh: AnyMesh | None = None
) -> tuple[Int[Array, "B T K"], Float[Array, "B T L"]]:
    """Returns the likeliest tokens of supervised positions, and log p of each and of all others; 0 elsewhere.

    Args:
      batch: `inputs`, `weights`, and what separates rows and branches, [B, T].
    """

    def program(parts: ModelParts, batch: dict[str, jax.Array]):
        model, shape = combine(parts), batch["inputs"].shape
        hidden_MD = model.hidden(batch["inputs"], remat="none", keys_B=None, **text_separation(batch))
        head = at_temperature(model.head, temperature)
        found = likeliest_tokens(hidden_MD, head, batch["weights"].reshape(-1) > 0, count)
        logps_ML = jnp.concatenate([found.logps_MK, found.rest_M[:, None]], axis=1)
        return tuple(gather_rows(each.reshape(*shape, -1), mesh, axis=0) for each in (found.ids_MK, logps_ML))

    return run_on_mesh(program, parts, (batch,), mesh, P())


READ = ("inputs", "weights", "segments", "parents", "depths")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalTeacher:
    """A model on the devices.

    Attributes:
      count: K.
      tokens: number of ids that the student knows.
    """

    parts: ModelParts
    count: int
    temperature: float
    tokens: int
    mesh: Mesh | None = None

    def predict(self, arrays: Arrays) -> Predictions:
        """Returns its predictions for a micro-batch.

        Raises:
          ValueError: it predicts a token that the student does not have.
        """
        read = place_batch({name: arrays[name] for name in READ if name in arrays}, self.mesh)
        how = {"count": self.count, "temperature": self.temperature, "mesh": self.mesh}
        ids, logps = map(np.asarray, predict_likeliest(self.parts, read, **how))
        check_are_known(ids, self.tokens)
        return Predictions(ids, logps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalSource:
    """A teacher's files; no weight has been read yet.

    Attributes:
      args: its weight format.
    """

    opened: OpenedModel
    args: ModelArgs
    count: int
    temperature: float
    tokens: int
    rows = None

    @property
    def weights(self) -> WeightFormat:
        """The format of its weights in memory."""
        return weight_format(self.args, self.opened.features)

    @property
    def nbytes(self) -> int:
        """Bytes of its weights in memory, without an adapter."""
        return bytes_of(self.opened.features, self.weights)

    @property
    def key(self) -> str:
        """A hash of all that its predictions depend on, besides the rows: reads the files."""
        run, source = self.opened.run, self.opened.source
        ranges = {each for entry in source.tensors.values() for each in entry.ranges_of(0, entry.rows)}
        adapter = [] if run is None else [run.lora_args, json_digest(tree_digests(run.lora))]
        computed_by = [FORM, code_digest(), jax.__version__, jax.devices()[0].device_kind]
        files = _digest_of_files(sorted({each.path for each in ranges}))
        model = [files, json_digest(source.config), self.weights, *adapter]
        return digest([*computed_by, *model, self.count, self.temperature])

    def load(self, mesh: Mesh | None, progress: Callable[..., None]) -> LocalTeacher:
        """Loads the weights."""
        opened = self.opened
        model = load_base(opened, self.args, progress)
        parts = partition(model) if opened.run is None else apply_adapter(model, opened.run)
        return LocalTeacher(
            parts=parts if mesh is None else place_parts(parts, mesh),
            count=self.count,
            temperature=self.temperature,
            tokens=self.tokens,
            mesh=mesh,
        )


def _digest_of_files(paths: Iterable[Path]) -> str:
    found = xxhash.xxh3_128()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                found.update(block)
    return found.hexdigest()
