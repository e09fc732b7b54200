"""fusedres.compiler.code: straight-line code and loops of assembly."""

import pytest

from fusedres.compiler.code import Shared, read_gcn, read_sass


def sass(*lines):
    """Lines at multiples of 16, as cuobjdump prints them."""
    return "\n".join(f"        /*{16 * i:04x}*/                   {line} ;   /* 0x0 */" for i, line in enumerate(lines))


LOOP = (
    "MOV R1, c[0x0][0x28]",  # 0x00
    "LDGSTS.E.BYPASS.128 [R2], [R4.64]",  # 0x10, of a pipeline that is being filled
    "LDG.E.128 R8, [R4.64]",  # 0x20
    "LDG.E R12, [R4.64]",  # 0x30
    "FADD R13, R8, R12",  # 0x40: one wait for both
    "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, !UPT",  # 0x50: the loop
    "LDGSTS.E.BYPASS.128 [R2], [R4.64]",  # 0x60
    "IADD3 R3, R3, 0x1, RZ",  # 0x70
    "@P0 BRA 0x50",  # 0x80
    "STG.E.64 [R4.64], R10",  # 0x90
    "EXIT",  # 0xa0
    "BRA 0xb0",  # 0xb0: behind the end
)


def test_a_loop_and_what_stands_around_it():
    straight, (loop,) = read_sass(sass(*LOOP), 90)
    assert loop.instructions == 4
    assert loop.multiply_adds == 64 * 128 * 16 // 4
    # Both operands come from shared memory: 64 rows and 128 columns, 16 deep, by four warps; a copy brings 512 bytes.
    assert loop.shared == (64 + 128) * 16 * 2 // 4 + 512
    assert (loop.moved, loop.copied, loop.waits, loop.narrow) == (512, 512, 0, 0)
    assert straight.instructions == 6  # EXIT is no work
    assert straight.waits == 1
    # A pipeline's first copies are the loop's.
    assert straight.moved == 512 + 128 + 256
    assert straight.narrow == 128
    assert straight.multiply_adds == 0


def test_operands_in_registers_come_through_no_shared_memory():
    left = LOOP[5].replace("gdesc[UR8], R24", "R20, gdesc[UR8]")
    (loop,) = read_sass(sass(*LOOP[:5], left, *LOOP[6:]), 90).loops
    assert loop.shared == 128 * 16 * 2 // 4 + 512


def test_mma_sync_is_told_apart_and_tf32_counts_twice():
    lines = ("HMMA.16816.F32.BF16 R4, R8, R12, R4", "HMMA.1688.F32.TF32 R4, R8, R12, R4", "EXIT")
    straight, loops = read_sass(sass(*lines), 80)
    assert straight.multiply_adds == straight.synchronous == 16 * 8 * 16 + 2 * 16 * 8 * 8
    assert loops == ()


def test_loops_within_loops_and_spin_loops():
    lines = (
        "MOV R1, R2",  # 0x00
        "IADD3 R3, R3, 0x1, RZ",  # 0x10: outer
        "FFMA R4, R4, R5, R4",  # 0x20: inner
        "BRA 0x20",  # 0x30
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2",  # 0x40: waits for a barrier
        "BRA 0x40",  # 0x50
        *["FADD R6, R7, R8"] * 8,
        "BRA 0x10",
        "EXIT",
    )
    straight, (outer, inner) = read_sass(sass(*lines), 90)
    assert (straight.instructions, outer.instructions, inner.instructions) == (1, 12, 2)


def test_the_busiest_pipe():
    """Of integers and logic half as many lanes as of fp32 from sm_86 on, as many before."""
    adds = sass(*["FADD R1, R2, R3"] * 10, "EXIT")
    assert read_sass(adds, 90).straight.busiest == 10
    assert read_sass(adds, 80).straight.busiest == 20
    assert read_sass(sass(*["LOP3.LUT R1, R2, R3"] * 10, "EXIT"), 90).straight.busiest == 20
    assert read_sass(sass(*["MUFU.RSQ R1, R2"] * 10, "EXIT"), 90).straight.busiest == 80


def test_what_one_instruction_does_for_a_block_is_shared_by_its_warps():
    together = Shared(warps=4, tile=(128, 64), loaded=16384, stored=4096)
    lines = (
        "UTMALDG.2D [UR8], [UR4]",
        "UTMALDG.2D [UR8], [UR4]",
        "UTMASTG.2D [UR8], [UR4]",
        "UTCHMMA gdesc[UR4]",
        "EXIT",
    )
    straight = read_sass(sass(*lines), 100, together).straight
    assert straight.moved == (16384 + 4096) // 4
    assert straight.copied == 16384 // 4
    assert straight.multiply_adds == 128 * 64 * 16 // 4


GCN = """
kernel:
\ts_load_dwordx4 s[0:3], s[4:5], 0x0
\tglobal_load_dwordx4 v[0:3], v[4:5], off
\ts_waitcnt vmcnt(0)
.LBB0_1:
\tds_read_b128 v[0:3], v8
\tv_mfma_f32_32x32x8_bf16_1k a[0:15], v[0:1], v[2:3], a[0:15]
\tv_add_u32_e32 v1, 1, v1
\ts_cbranch_scc1 .LBB0_1
\tglobal_store_short v[4:5], v1, off
\ts_endpgm
"""


@pytest.mark.parametrize("lanes", [64, 32])
def test_amd(lanes):
    straight, (loop,) = read_gcn(GCN, lanes)
    assert loop.multiply_adds == 32 * 32 * 8
    assert loop.shared == 16 * lanes
    assert loop.instructions == 4
    assert straight.moved == (16 + 2) * lanes
    assert (straight.waits, straight.narrow) == (1, 0)
    assert loop.busiest == 4 * lanes // 64
