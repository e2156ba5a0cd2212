"""Reads the GpuExecutableProto that XLA's GPU compiler serialized, and joins its parts.

Schemas: openxla/xla, xla/service/gpu/gpu_executable.proto; xla/util/split_proto (writers of the parts). A split proto
is a Riegeli file: a manifest, then the parts. Each part is either merged into the message or is the value of one field.
The split executable is a field of another split proto, which also has the compile options.
"""

from pallas_kernels.aot import protobuf, riegeli

# SplitProtoManifest.records, and the path to a field in such a record (Record.FieldOverrideRecord).
_PARTS, _OVERRIDE, _PATH, _PATH_NUMBER = 2, 3, 1, 1
_INNER = 1  # ExecutableAndOptionsProto.serialized_executable


def read_executable(serialized: bytes) -> bytes:
    """Returns the GpuExecutableProto in the bytes of `Compiled.runtime_executable().serialize()`.

    Raises:
      ValueError: the form is unknown, because XLA has changed it.
    """
    start = serialized.find(riegeli.SIGNATURE)
    if start < 0:
        raise ValueError("XLA's serialized executable contains no Riegeli file; its form has changed.")
    inner = protobuf.submessage(_join(serialized[start:]), _INNER)
    return _join(inner)


def _join(file: bytes) -> bytes:
    manifest, *parts = riegeli.records(file)
    places = protobuf.submessages(manifest, _PARTS)
    if len(places) != len(parts):
        raise ValueError(f"split proto: its manifest names {len(places)} parts, its file has {len(parts)}.")
    return b"".join(_as_message(place, part) for place, part in zip(places, parts, strict=True))


def _as_message(place: bytes, part: bytes) -> bytes:
    override = protobuf.submessage(place, _OVERRIDE)
    for step in reversed(protobuf.submessages(override, _PATH)):
        part = protobuf.encode_bytes(protobuf.integer(step, _PATH_NUMBER), part)
    return part
