"""The model of a GPU's pipes, on a few lines of machine code."""

import pytest

from kronmask.kernels.machine import GPUS, PIPES, Work, blocks_per_sm, matrix_loops, other_loops, partitions, work

H100, A100, B200 = GPUS["sm_90"], GPUS["sm_80"], GPUS["sm_100"]


def of(*lines, gpu=H100, warps=4, **more):
    return work(list(lines), gpu, warps, **more)


@pytest.mark.parametrize(
    ("arch", "tflops", "sms", "ghz"),
    [("sm_80", 312, 108, 1.41), ("sm_90", 989.4, 132, 1.83), ("sm_100", 2250, 148, 1.85)],
)
def test_the_flop_of_an_sm_are_those_of_the_data_sheet(arch, tflops, sms, ghz):
    assert GPUS[arch].flop == pytest.approx(tflops * 1000 / (sms * ghz), rel=0.01)


@pytest.mark.parametrize(
    ("columns", "first", "cycles"),
    [
        (64, "gdesc[UR8]", 32),
        (64, "R4", 32),
        (128, "gdesc[UR8]", 64),
        (32, "gdesc[UR8]", 24),
        (32, "R4", 16),
        (16, "gdesc[UR8]", 20),
    ],
)
def test_a_narrow_wgmma_waits_for_its_operands_in_shared_memory(columns, first, cycles):
    found = of(f"HGMMA.64x{columns}x16.F32.BF16 R24, {first}, gdesc[UR10], R24")
    assert found.cycles["tensor"] == cycles
    assert found.ideal == columns / 2
    place = "shared" if first.startswith("gdesc") else "registers"
    assert found.shapes == {f"64x{columns}x16 {place}": 1}


def test_each_group_of_four_warps_issues_a_wgmma_and_each_warp_an_mma():
    assert of("HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR10], R24", warps=8).cycles["tensor"] == 64
    assert of("HMMA.16816.F32.BF16 R8, R4, R2, R8", gpu=A100, warps=8).cycles["tensor"] == 8 * 2 * 16 * 8 * 16 / 2048


@pytest.mark.parametrize(
    ("descriptor", "first", "shape", "cycles"),
    [
        (0x8100490, "gdesc[UR8]", "128x64x16 shared", 48),  # operands in shared memory are 6 KiB
        (0x8200490, "gdesc[UR8]", "128x128x16 shared", 64),
        (0x8110490, "tmem[UR8]", "128x64x16 tensor memory", 32),
        (0x4100490, "tmem[UR8]", "64x64x16 tensor memory", 32),  # as long as 128 rows
    ],
)
def test_the_shape_of_tcgen05_stands_in_its_descriptor(descriptor, first, shape, cycles):
    found = of(
        f"UMOV UR55, {hex(descriptor)}",
        f"UTCHMMA {first}, gdesc[UR18], tmem[UR11], tmem[UR54], idesc[UR55], UPT",
        gpu=B200,
        warps=8,  # one thread issues it, whatever the number of warps
    )
    assert found.shapes == {shape: 1}
    assert found.cycles["tensor"] == cycles


@pytest.mark.parametrize(
    ("line", "pipe", "cycles"),
    [
        ("MUFU.EX2 R1, R2", "exp2", 8),
        ("FFMA R1, R2, R3, R4", "fp32", 1),
        ("FADD2 R2, R4, R6", "fp32", 2),
        ("IMAD.WIDE.U32 R2, R4, R6, R8", "fp32", 2),
        ("@P0 FSEL R1, R2, -INF, P1", "integer", 2),
        ("F2FP.BF16.F32.PACK_AB R1, R2, R3", "integer", 2),
        ("LOP3.LUT R1, R2, R3, RZ, 0xc0, !PT", "integer", 2),
        ("LDS.128 R4, [R2]", "shared", 16),
        ("LDSM.16.M88.4 R4, [R2]", "shared", 16),
        ("LDSM.16.MT88 R4, [R2]", "shared", 4),
        ("LDL.LU.64 R4, [R1+0x8]", "shared", 8),
        ("SHFL.BFLY PT, R1, R2, 0x1, 0x1f", "shuffle", 4),
        ("LDGSTS.E.BYPASS.128 [R1], desc[UR18][R2.64]", "shared", 16),
        ("LDGSTS.E.BYPASS.128 [R1], desc[UR18][R2.64]", "l2", 4 * 32 * 16 / (5120 / 132)),
        ("LDG.E R1, desc[UR18][R2.64]", "l2", 0),  # tables of indices stay in L1
        ("BAR.SYNC.DEFER_BLOCKING 0x0", "issue", 1),
    ],
)
def test_an_instruction_of_four_warps_keeps_its_pipe_busy(line, pipe, cycles):
    found = of(line)
    assert found.cycles[pipe] == pytest.approx(cycles)
    assert found.cycles["issue"] == 1
    others = {"shared", "l2"} if line.startswith("LDGSTS") else {pipe}
    assert not any(found.cycles[other] for other in PIPES if other not in {*others, "issue"})


def test_spilled_registers_are_counted():
    assert of("STL [R1], R2").counts == {"shared": 1, "stack": 1}
    assert "stack" not in of("STS [R1], R2").counts


def test_what_is_predicated_off_is_only_issued():
    found = of("@!PT LDS RZ, [RZ]")
    assert (found.cycles["issue"], found.cycles["shared"]) == (1, 0)


@pytest.mark.parametrize(("warps", "boxes", "copied"), [(4, 1, 1), (4, 2, 2), (1, 2, 1)])
def test_a_copy_by_descriptor_moves_its_box_and_each_warp_another(warps, boxes, copied):
    found = of("UTMALDG.2D [UR8], [UR4]", gpu=B200, warps=warps, box_bytes=8192, boxes=boxes)
    assert found.cycles["l2"] == copied * 8192 / 64
    assert found.cycles["shared"] == copied * 8192 / 128
    assert found.cycles["issue"] == warps / 4


def test_partitions_are_the_targets_of_the_indirect_branch():
    code = """
    USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0x100
    EXIT
    .L_x_5:
    BRX R2 -0xe950 (*"BRANCH_TARGETS .L_x_121,.L_x_120,.L_x_122"*)
    .L_x_120:
    FADD R1, R2, R3
    .L_x_121:
    FMUL R1, R2, R3
    BRA `(.L_x_5)
    .L_x_122:
    EXIT
    """
    lines = [line.strip() for line in code.strip().splitlines()]
    first, one, two = partitions(lines, 2)
    assert one == [".L_x_121:", "FMUL R1, R2, R3", "BRA `(.L_x_5)"]
    assert two == [".L_x_120:", "FADD R1, R2, R3"]
    assert first == [line for line in lines if line not in (*one, *two)]


def test_the_work_of_partitions_adds_up():
    one, two = of("MUFU.EX2 R1, R2"), of("FFMA R1, R2, R3, R4", warps=1)
    both = one + two
    assert (both.cycles["exp2"], both.cycles["fp32"], both.cycles["issue"]) == (8, 0.25, 1.25)
    assert (both.instructions, both.counts) == (2, {"exp2": 1, "fp32": 1})


@pytest.mark.parametrize(
    ("registers", "warps", "shared_bytes", "tensor_columns", "blocks"),
    [
        (255, 8, 0, 0, 1),
        (255, 4, 0, 0, 2),
        (168, 4, 0, 0, 3),
        (169, 4, 0, 0, 2),  # registers go by eight a thread
        (128, 8, 0, 0, 2),
        (32, 4, 75 * 1024, 0, 3),  # each block takes 1 KiB more
        (32, 4, 76 * 1024, 0, 2),
        (32, 32, 0, 0, 2),
        (32, 4, 0, 256, 2),
    ],
)
def test_registers_shared_memory_threads_and_tensor_memory_bound_the_blocks_of_an_sm(
    registers, warps, shared_bytes, tensor_columns, blocks
):
    assert blocks_per_sm(H100, registers, warps, shared_bytes, tensor_columns) == blocks


def test_the_estimate_lies_between_all_pipes_at_once_and_in_turn():
    cycles = dict.fromkeys(PIPES, 0.0) | {"tensor": 512.0, "exp2": 544.0, "issue": 500.0}
    found = Work(cycles, 512.0, 0, {})
    assert (found.overlapped, found.in_turn) == (544, 512 + 544)
    assert found.estimated(1) == found.in_turn
    assert found.overlapped < found.estimated(3) < found.estimated(2) < found.in_turn
    assert found.estimated(2) == 544 + 512 / 2


def test_shared_memory_bounds_both_but_is_no_turn_of_its_own():
    found = Work(dict.fromkeys(PIPES, 0.0) | {"tensor": 100.0, "shared": 300.0, "issue": 50.0}, 100.0, 0, {})
    assert (found.overlapped, found.in_turn, found.estimated(2)) == (300, 300, 300)


CODE = """
MOV R1, c[0x0][0x28]
LDGSTS.E.BYPASS.128 [R1], desc[UR18][R2.64]
.L_x_1:
FADD R1, R2, R3
.L_x_2:
HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR10], R24
@!P0 BRA `(.L_x_2)
@P1 BRA `(.L_x_1)
.L_x_3:
SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR20], R6
@!P0 BRA `(.L_x_9)
.L_x_4:
HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR10], R24
FMUL R1, R2, R3
@P1 BRA `(.L_x_3)
@P2 EXIT
EXIT
.L_x_9:
SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR20], R6
@!P0 BRA `(.L_x_9)
BRA `(.L_x_4)
""".strip().splitlines()


def test_loops_are_found_innermost_and_in_order():
    first, second = matrix_loops(CODE)
    assert [line.split()[0] for line in first] == [".L_x_2:", "HGMMA.64x64x16.F32.BF16", "@!P0"]
    assert second[-2:] == ["FMUL R1, R2, R3", "@P1 BRA `(.L_x_3)"]


def test_code_in_no_loop_is_counted_without_the_copies_that_a_loop_starts_ahead():
    loops, outside = other_loops(CODE)
    assert loops == []  # a wait of two lines is none
    assert outside[:2] == ["MOV R1, c[0x0][0x28]", ".L_x_1:"]
    assert not any("LDGSTS" in line or "HGMMA" in line for line in outside)


def test_a_loop_without_products_is_told_apart():
    plain = [".L_x_7:", *["FADD R1, R2, R3"] * 40, "@P0 BRA `(.L_x_7)"]
    loops, outside = other_loops([*plain, *CODE])
    assert loops == [plain]
    assert "FADD R1, R2, R3" in outside  # that of the outer loop


def test_turns_that_were_peeled_off_are_taken_away():
    whole, turn = of(*["MUFU.EX2 R1, R2"] * 10), of(*["MUFU.EX2 R1, R2"] * 4)
    assert whole.without(turn, 2).cycles["exp2"] == 2 * 8
    assert whole.without(turn, 3).cycles["exp2"] == 0
