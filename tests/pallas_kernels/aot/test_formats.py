"""The readers of Riegeli files, protobuf's wire format and XLA's executables, on handmade files."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels.aot import cubins, executable, protobuf, riegeli
from tests.pallas_kernels.aot.handmade import chunk, elf, integer_field, riegeli_file, simple_chunk, split_proto


def test_records_come_back_in_order_across_chunks_and_blocks():
    wanted = [b"a", b"", bytes(range(256)) * 600, b"last"]  # the third is longer than two blocks
    file = riegeli_file(simple_chunk(wanted[:2]), chunk("m", b"whatever", 0), simple_chunk(wanted[2:]))
    assert list(riegeli.records(file)) == wanted


@given(st.lists(st.binary(max_size=300), max_size=8))
def test_any_records_come_back(wanted):
    assert list(riegeli.records(riegeli_file(simple_chunk(wanted)))) == wanted


@pytest.mark.parametrize(
    ("file", "told"),
    [
        (b"\x7fELF and more", "starts with 7f454c4620616e64"),
        (riegeli_file(simple_chunk([b"a long record"]))[:-4], "ends inside a chunk"),
        (riegeli_file(simple_chunk([b"a"])) + b"\0" * 7, "ends inside a chunk header"),
        (riegeli_file(chunk("t", b"transposed", 1)), "kind 't' is not supported"),
        (riegeli_file(chunk("r", b"x" + b"\x01\x00\x00", 1)), "compression 'x' is not supported"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(file, told):
    with pytest.raises(ValueError, match=told):
        list(riegeli.records(file))


@given(st.integers(0, 2**64 - 1))
def test_varints_come_back(value):
    encoded = protobuf.encode_varint(value)
    assert protobuf.varint(encoded + b"\xff", 0) == (value, len(encoded))


def test_fields_of_every_wire_type():
    message = integer_field(1, 300) + protobuf.encode_bytes(2, b"abc") + b"\x19" + b"8" * 8 + b"\x25" + b"4" * 4
    assert list(protobuf.fields(message)) == [(1, 300), (2, b"abc"), (3, b"8" * 8), (4, b"4" * 4)]
    assert protobuf.integer(message, 1) == 300
    assert protobuf.integer(message, 9) == 0
    assert protobuf.submessages(message + message, 2) == [b"abc", b"abc"]
    assert protobuf.submessage(message + message, 2) == b"abcabc"


@pytest.mark.parametrize("data", [b"\x80", b"\x0a\x05abc", b"\x0b\x00", b"\x00\x00"])
def test_what_is_no_message_is_refused(data):
    with pytest.raises(ValueError, match=r"not a protobuf message|inside a varint"):
        list(protobuf.fields(data))


def test_an_executable_is_put_together_from_its_parts():
    inner = split_proto((3, b"text"), (0, integer_field(8, 5)), (4, b"binary"))
    outer = split_proto((1, inner), (0, protobuf.encode_bytes(2, b"options")))
    whole = executable.read_executable(b"a header" + outer)
    assert list(protobuf.fields(whole)) == [(3, b"text"), (8, 5), (4, b"binary")]


def test_an_executable_in_another_form_is_refused():
    with pytest.raises(ValueError, match="form has changed"):
        executable.read_executable(b"nothing of the kind")
    manifest_of_two = protobuf.encode_bytes(2, b"") * 2
    with pytest.raises(ValueError, match="names 2 parts, its file has 1"):
        executable.read_executable(riegeli_file(simple_chunk([manifest_of_two, b""])))


def xla_thunk(image: bytes, shared: int) -> bytes:
    kernel = protobuf.encode_bytes(2, protobuf.encode_bytes(2, protobuf.encode_bytes(1, image)))
    kernel = protobuf.encode_bytes(1, b"name") + kernel + integer_field(6, shared)
    return protobuf.encode_bytes(13, protobuf.encode_bytes(36, protobuf.encode_bytes(3, kernel)))


def mosaic_thunk(image: bytes, host_code: bytes, shared: int) -> bytes:
    resources = protobuf.encode_bytes(2, host_code) + protobuf.encode_bytes(8, image) + integer_field(10, shared)
    call = protobuf.encode_bytes(8, protobuf.encode_bytes(2, resources))
    return protobuf.encode_bytes(13, protobuf.encode_bytes(30, call))


def test_cubins_are_found_once_each_with_their_shared_memory():
    one, two, module = (elf(190, body) for body in (b"one", b"two", b"module"))
    message = xla_thunk(one, 768) * 2 + mosaic_thunk(two, elf(62), 200768) + protobuf.encode_bytes(4, module)
    found = cubins.find_cubins(message)
    assert [(cubin.image, cubin.dynamic_shared_bytes) for cubin in found] == [(one, 768), (two, 200768), (module, 0)]


def test_a_cubin_in_an_unknown_place_is_an_error():
    with pytest.raises(ValueError, match=r"at the fields \(13, 99\).*form has changed"):
        cubins.find_cubins(protobuf.encode_bytes(13, protobuf.encode_bytes(99, elf(190))))
