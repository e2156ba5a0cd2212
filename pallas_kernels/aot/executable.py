"""What XLA's GPU compiler serialized: one GpuExecutableProto, put together from the files that hold it.

Schemas: openxla/xla, xla/service/gpu/gpu_executable.proto; xla/util/split_proto (writers of the parts). A split proto
is a Riegeli file: first a manifest, then the parts, each of which is either merged into the message or is the value of
one field. The executable lies, so split, in a field of another split proto that also holds the compile options.
"""

from pallas_kernels.aot import protobuf, riegeli

# SplitProtoManifest.records, and the path to a field in such a record (Record.FieldOverrideRecord).
_PARTS, _OVERRIDE, _PATH, _PATH_NUMBER = 2, 3, 1, 1
_INNER = 1  # ExecutableAndOptionsProto.serialized_executable


def read_executable(serialized: bytes) -> bytes:
    """The message GpuExecutableProto out of what `Compiled.runtime_executable().serialize()` returns.

    Raises:
      ValueError: the bytes are in another form, so XLA has changed it.
    """
    start = serialized.find(riegeli.SIGNATURE)
    if start < 0:
        raise ValueError("XLA's serialized executable holds no Riegeli file; its form has changed")
    inner = protobuf.submessage(_join(serialized[start:]), _INNER)
    return _join(inner)


def _join(file: bytes) -> bytes:
    manifest, *parts = riegeli.records(file)
    places = protobuf.submessages(manifest, _PARTS)
    if len(places) != len(parts):
        raise ValueError(f"a split proto's manifest names {len(places)} parts, its file holds {len(parts)}")
    return b"".join(_as_message(place, part) for place, part in zip(places, parts, strict=True))


def _as_message(place: bytes, part: bytes) -> bytes:
    override = protobuf.submessage(place, _OVERRIDE)
    for step in reversed(protobuf.submessages(override, _PATH)):
        part = protobuf.encode_bytes(protobuf.integer(step, _PATH_NUMBER), part)
    return part
