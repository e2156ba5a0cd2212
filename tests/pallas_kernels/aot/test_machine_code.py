"""The reader of SASS listings, on a short listing."""

from collections import Counter

from pallas_kernels.aot.machine_code import Kernel, read_listing, split_listing

# A loop over tiles with an inner loop, a slow path after the code that branches back into it, and a second function.
LISTING = """
	.target	sm_90a

//--------------------- .text.product --------------------------
	.section	.text.product,"ax",@progbits
	.align	128
        .global         product
product:
.text.product:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_9:
        /*0010*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR8], R2 ;
        /*0020*/              @!P1 BRA `(.L_x_1) ;
.L_x_2:
        /*0030*/                   LDSM.16.M88.4 R4, [R2] ;
.L_x_3:
        /*0040*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0050*/               @P0 BRA `(.L_x_3) ;
        /*0060*/             @!UP0 UIADD3 UR4, UR4, 0x1, URZ ;
        /*0070*/               @P2 BRA `(.L_x_9) ;
.L_x_5:
        /*0080*/                   IADD3 R3, R3, -0x1, RZ ;
        /*0090*/               @P3 BRA `(.L_x_5) ;
        /*00a0*/                   EXIT ;
.L_x_1:
        /*00b0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR8], R2 ;
        /*00c0*/              @!P1 BRA `(.L_x_1) ;
        /*00d0*/                   BRA `(.L_x_2) ;
.L_x_7:
        /*00e0*/                   BRA `(.L_x_7);

//--------------------- .text.copy --------------------------
	.section	.text.copy,"ax",@progbits
copy:
.text.copy:
        /*0000*/                   LDG.E R2, desc[UR4][R2.64] ;
        /*0010*/                   EXIT ;
"""


def test_functions_are_told_apart():
    functions = split_listing(LISTING)
    assert list(functions) == ["product", "copy"]
    assert read_listing(functions["copy"]) == (Counter(LDG=1, EXIT=1), ())


def test_opcodes_are_counted_without_predicates_and_suffixes():
    opcodes, _ = read_listing(split_listing(LISTING)["product"])
    assert opcodes == Counter(BRA=7, SYNCS=2, LDC=1, LDSM=1, HMMA=1, UIADD3=1, IADD3=1, EXIT=1)


def test_loops_are_those_with_tensor_core_instructions_inner_first():
    _, loops = read_listing(split_listing(LISTING)["product"])
    # Neither the loop without HMMA, nor the slow path's branch back (from 00d0 over HMMA to 0030).
    assert [loop.instructions for loop in loops] == [2, 7]
    assert loops[0].opcodes == Counter(HMMA=1, BRA=1)
    assert loops[1].opcodes["LDSM"] == 1


def test_tensor_core_instructions_of_every_generation_count():
    opcodes = Counter(HMMA=2, HGMMA=3, UTCHMMA=4, FFMA=100, IMAD=7)
    assert Kernel("k", "sm_80", 32, 0, 0, opcodes, ()).tensor_core_instructions == 9
