"""The library is built for the instruction sets that XLA may use, so that one switch hides them from both."""

import pytest

from pallas_kernels.native import library

LIMITS = [
    ("", "native"),
    ("--xla_cpu_max_isa=AMX_FP16", "native"),
    ("--xla_dump_to=x --xla_cpu_max_isa=avx2", "x86-64-v3"),
    ("--xla_cpu_max_isa=AVX512 --xla_cpu_max_isa=AVX2", "x86-64-v3"),  # XLA uses the last one, too
    ("--xla_cpu_max_isa=AVX512", "x86-64-v4"),
]


@pytest.mark.parametrize(("flags", "expected"), LIMITS)
def test_instruction_sets_that_xla_does_not_use_are_hidden(monkeypatch, flags, expected):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    path = library.library_path()
    monkeypatch.setenv("XLA_FLAGS", flags)
    assert library.architecture() == expected
    assert (library.library_path() == path) == (expected == "native")
