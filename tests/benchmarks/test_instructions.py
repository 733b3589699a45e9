"""The instruction counter: small listings, kernels with known counts, and the launches of the recipe."""

import json
from collections import OrderedDict

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.inductor import uses
from benchmarks.instructions import (
    CLASSES,
    Card,
    Counted,
    classify,
    comparison,
    issued,
    recipe_launches,
    record,
    reuse,
    table,
)
from cifar_fast import Recipe
from tests.helpers import cells, compiler

# A trip of the loop loads and stores 16 bytes. The slow path of the division calls a subroutine.
LISTING = """
kernel:
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   MOV R2, RZ ;
.L_x_0:
        /*0020*/              @!P0 LDG.E.64 R4, desc[UR6][R2.64] ;
        /*0030*/                   FFMA R6, R4, R5.reuse, R6 ;
        /*0040*/                   LDG.E.U16 R8, desc[UR6][R2.64+0x10] ;
        /*0050*/                   ISETP.NE.AND P1, PT, R2, 0x100, PT ;
        /*0060*/                   STG.E desc[UR6][R2.64], R6 ;
        /*0070*/                   STG.E.U16 desc[UR6][R2.64], R6 ;
        /*0080*/               @P1 BRA `(.L_x_0) ;
        /*0090*/                   BSSY B0, `(.L_x_2) ;
        /*00a0*/               @P2 BRA P3, `(.L_x_1) ;
        /*00b0*/                   MOV R7, 0xd0 ;
        /*00c0*/                   CALL.REL.NOINC `($__internal_0_$slow) ;
        /*00d0*/                   BRA `(.L_x_2) ;
.L_x_1:
        /*00e0*/                   MUFU.RCP R7, R6 ;
        /*00f0*/                   BSYNC B0 ;
.L_x_2:
        /*0100*/               @P0 EXIT ;
        /*0110*/                   STG.E desc[UR6][R2.64], R7 ;
        /*0120*/                   EXIT ;
        .weak           $__internal_0_$slow
$__internal_0_$slow:
        /*0130*/                   DFMA R2, R2, R2, R2 ;
        /*0140*/                   RET.REL.NODEC R2 `(kernel) ;
.L_x_3:
        /*0150*/                   BRA `(.L_x_3);
        /*0160*/                   NOP;
.L_x_4:
"""
KERNELS = """
import triton, triton.language as tl
@triton.jit
def multiplies(x, y, N: tl.constexpr, K: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    value = tl.load(x + at)
    for _ in tl.static_range(K):
        value = tl.fma(value, 1.5, value)
    tl.store(y + at, value)
@triton.jit
def sums(x, y, N: tl.constexpr, K: tl.constexpr):
    total = tl.zeros([N], tl.float32)
    for k in range(K):
        total += tl.load(x + (tl.program_id(0) * K + k) * N + tl.arange(0, N))
    tl.store(y + tl.program_id(0) * N + tl.arange(0, N), total)
@triton.jit
def exponentials(x, y, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(y + at, tl.exp2(tl.load(x + at)))
@triton.jit
def roots(x, y, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(y + at, tl.sqrt_rn(tl.load(x + at)))
@triton.jit
def halves(x, y, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(y + at, (tl.load(x + at).to(tl.float32) * 1.1).to(tl.float16))
"""
COUNTING = """
import dataclasses, json, sys, torch
from benchmarks.instructions import count_launch
from cifar_fast.kernels.launch import Launch
sys.path.insert(0, sys.argv[1])
import known
def count(name, kernel, elements, dtype=torch.float32, programs=4, N=1024, **constants):
    x, y = (torch.empty(n, device="meta", dtype=dtype) for n in (elements, programs * N))
    launch = Launch(kernel, (programs,), {"x": x}, {"y": y}, {}, {"N": N} | constants)
    return name, dataclasses.asdict(count_launch("step", name, 1, launch, arch="sm_90"))
print(json.dumps(dict([
    count("7 FFMA", known.multiplies, 4096, K=7),
    *(count(f"sum of {k}", known.sums, 4096 * k, K=k) for k in (6, 100)),
    count("exponential", known.exponentials, 4096),
    count("root", known.roots, 4096),
    count("float16", known.halves, 4096, torch.float16),
])))
"""


def of(**expected):
    return dict.fromkeys(CLASSES, 0) | expected


def test_loop_counts_by_its_bytes_and_unreachable_code_does_not_count():
    outside = dict(memory=2, integer=1, control=5, mufu=1)  # BSSY, BRA, BSYNC, EXIT twice
    once = outside | dict(memory=6, fp32=1, integer=2, control=6)
    assert issued(LISTING, moved=16) == of(**once)
    assert issued(LISTING, moved=0) == of(**once)
    assert issued(LISTING, moved=65) == of(**outside | dict(memory=2 + 4 * 4, fp32=4, integer=1 + 4, control=5 + 4))


def test_loop_that_stores_counts_by_its_stores():
    expected = dict(mufu=1, memory=2 + 3 * 4, fp32=3, integer=1 + 3, control=5 + 3)
    assert issued(LISTING, moved=1000, stored=18) == of(**expected)


def test_loop_that_moves_nothing_counts_once():
    waits = (
        "k:\n /*0000*/  NOP ;\n.L_x_0:\n /*0010*/  LDS R1, [R2] ;\n /*0020*/ @P0 BRA `(.L_x_0) ;\n /*0030*/  EXIT ;\n"
    )
    assert issued(waits, moved=1e6) == of(memory=1, control=2)


def test_call_of_an_unnamed_label_is_a_jump():
    jumps = """
k:
 /*0000*/  @!P2 CALL.REL.NOINC `(.L_x_1) ;
 /*0010*/  FADD R1, R2, R3 ;
 /*0020*/  CALL.REL.NOINC `(.L_x_1) ;
 /*0030*/  DADD R2, R4, R6 ;
.L_x_1:
 /*0040*/  EXIT ;
"""
    assert issued(jumps, moved=0) == of(fp32=1, control=3)


def test_kernel_that_only_ends_after_a_call_is_refused():
    calls = " /*0000*/  CALL.REL.NOINC `(f) ;\n /*0010*/  EXIT ;\nf:\n /*0020*/  RET.REL.NODEC R2 `(k) ;\n"
    with pytest.raises(ValueError, match="call"):
        issued(calls, moved=0)


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("FSEL R1, R2, R3, P0", "fp32"),
        ("F2FP.BF16.F32.PACK_AB R1, R2, R3", "conversion"),
        ("FFMA.FTZ R1, R2, R3, R4", "fp32"),
        ("HADD2.F32 R1, -RZ, R2.H0_H0", "conversion"),
        ("HADD2 R1, R2, R3", "half"),
        ("HFMA2.MMA R1, R2, R3, R4", "half"),
        ("HFMA2.MMA R1, -RZ, RZ, 1.5, 0", "integer"),  # loads a constant into a register
        ("HSETP2.BF16_V2.GT.AND P0, PT, R1, R2, PT", "half"),
        ("DSETP.MAX.AND P0, P1, R2, R4, PT", "fp64"),
        ("MUFU.RCP64H R1, R2", "mufu"),
        ("IMAD.WIDE R2, R3, 0x2, R4", "integer"),
        ("UIADD3 UR4, UR4, 0x1, URZ", "integer"),
        ("REDUX.SUM UR4, R2", "integer"),
        ("RED.E.ADD.STRONG.GPU desc[UR4][R2.64], R5", "memory"),
        ("LEA.HI.X R1, R2, R3, RZ, 0x1, P0", "integer"),
        ("ULDC.64 UR4, c[0x0][0x210]", "memory"),
        ("LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64]", "memory"),
        ("BAR.SYNC.DEFER_BLOCKING 0x0", "control"),
        ("DEPBAR.LE SB0, 0x1", "control"),
    ],
)
def test_class_of_an_instruction(instruction, expected):
    assert classify(instruction) == expected


def row(**changes):
    given = dict(section="step", case="c", kernel="k", count=2, elements=4096, bytes=8192, programs=4, warps=4)
    given |= dict(instructions=of(fp32=80, memory=20), registers=40, spills=0, shared=0)
    return Counted(**given | changes)


def test_bad_flags_are_refused(capsys):
    assert main(["instructions", "--arch", "sm_1"]) == 2
    assert "invalid choice: 'sm_1' (choose from 'sm_75'" in capsys.readouterr().err
    assert main(["instructions", "--activation", "celu", "tanh"]) == 2
    assert "invalid choice: 'tanh' (choose from 'none', 'celu'" in capsys.readouterr().err
    assert main(["instructions", "--clock", "0"]) == 2
    assert "must be a number above 0, not 0" in capsys.readouterr().err


def test_times_and_sums_of_a_section():
    card = Card("a card", multiprocessors=2, clock=1e9, bandwidth=1e9, cache=1e6)
    figures = record(row(), card)
    assert figures["warp_instructions"] == 100 * 4 * 4
    assert figures["issue"] == pytest.approx(1600 / (2 * 4 * 1e9)) and figures["byte"] == pytest.approx(8192e-9)
    assert row().per_element(100) == 100 * 32 * 4 * 4 / 4096
    sections = table([row(), row(case="d", count=1, bytes=4), row(section="evaluation")], card).splitlines()[-2:]
    assert cells(sections)[0] == ["step", "3", "0.6", "16.4", "16.4", "16.6"]


@pytest.mark.parametrize(
    ("changes", "nanoseconds"),
    [
        (dict(bytes=8192), 8192),  # bytes take longest
        (dict(bytes=0), 400),  # serial latency of a program, four cycles per instruction
        (dict(bytes=0, programs=24), 1200),  # issue takes longest
        (dict(bytes=0, programs=25), 1300 + 400),  # one program more than fits, on one of two multiprocessors
        (dict(bytes=8192, programs=25), 8192 + 400),
    ],
)
def test_minimum_time_of_a_launch(changes, nanoseconds):
    card = Card("a card", multiprocessors=2, clock=1e9, bandwidth=1e9, cache=1e6)
    assert row(**changes).seconds(card) == pytest.approx(nanoseconds * 1e-9)


def test_comparison_of_activations():
    def rows(work):
        norm = dict(kernel="apply", instructions=of(fp32=work))
        statistics = dict(kernel="statistics", instructions=of(fp32=20))
        shapes = [row(case="4x8x8, forward", **norm), row(case="4x4x4, forward", **norm | dict(elements=2048))]
        other = [row(case="loss and record"), row(case="4x8x8, inference", section="evaluation", **norm)]
        return [*shapes, row(case="4x8x8, forward", **statistics), *other]

    expected = [
        ["apply", "10.0 to 20.0 (1.00)", "5.0 to 10.0 (0.50)"],
        ["statistics", "2.5 (1.00)", "2.5 (1.00)"],
        ["apply, evaluation", "10.0 (1.00)", "5.0 (0.50)"],
        ["all of a step", "22.5 (1.00)", "12.5 (0.56)"],
    ]
    assert cells(comparison({"celu": rows(80), "relu": rows(40)}).splitlines()[2:]) == expected


def test_launches_have_the_given_activation():
    launches = [launch for _, case, _, launch, _ in recipe_launches(Recipe(), torch.float16, "silu") if "x" in case]
    assert {launch.constants.get("ACTIVATION", "silu") for launch in launches} == {"silu"}


def least_recently_used(size, rows, first, second):
    """Return the fraction of the lines read by the second of two passes that a cache of ``size`` lines holds.

    Each tensor has a line per row. A pass is its tensors, whether it runs from the last row to the first, and the
    tensors that count.
    """
    kept, found, read = OrderedDict(), 0, 0
    for number, (tensors, backwards, shared) in enumerate((first, second)):
        for row in reversed(range(rows)) if backwards else range(rows):
            for tensor in tensors:
                line = tensor, row
                if number and tensor in shared:
                    read, found = read + 1, found + (line in kept)
                kept[line] = None
                kept.move_to_end(line)
                if len(kept) > size:
                    kept.popitem(last=False)
    return found / read


@pytest.mark.parametrize("size", [10, 100, 150, 400])
@pytest.mark.parametrize(("before", "after", "shared"), [("x", "xy", "x"), ("ab", "abc", "ab"), ("wxpa", "py", "p")])
def test_cache_model_of_a_backwards_pass(size, before, after, shared):
    found = least_recently_used(size, 100, (before, False, ""), (after, True, shared))
    touched = len(set(before + after)) * 100
    one = row(bytes=1000, reused_bytes=400, working_set=touched)
    assert one.from_memory(size) == pytest.approx(1000 - 400 * found, abs=400 * 0.03)
    forwards = least_recently_used(size, 100, (before, False, ""), (after, False, shared))
    assert forwards <= 0.03 or size > touched / 2


def test_second_passes_of_the_recipe_reuse_the_first_ones():
    reused = {
        (case, launch.kernel.__name__): reuse(launch, before)
        for _, case, _, launch, before in recipe_launches(Recipe(), torch.float16)
        if before
    }
    x = 512 * 64 * 32 * 32 * 2
    bytes_, working_set = reused["64x32x32, forward", "apply_kernel"]
    assert bytes_ == x and 2 * x < working_set < 2.01 * x
    bytes_, working_set = reused["128x32x32, pool, forward", "apply_kernel"]
    assert bytes_ == x / 2 and working_set == pytest.approx(2 * x + x / 2 + x / 4 + x / 2, rel=0.01)
    bytes_, working_set = reused["64x32x32, backward", "backward_apply_kernel"]
    assert 2 * x <= bytes_ < 2.01 * x and 3 * x < working_set < 3.01 * x


@pytest.mark.parametrize(
    ("registers", "warps", "shared", "fitting"),
    [
        (32, 4, 0, 64),
        (33, 4, 0, 48),
        (40, 4, 0, 48),
        (64, 8, 0, 32),
        (255, 8, 0, 8),
        (32, 1, 0, 32),
        (32, 4, 40960, 12),
    ],
)
def test_occupancy_equals_nvidias_calculator(registers, warps, shared, fitting):
    assert row(registers=registers, warps=warps, shared=shared).occupancy == fitting / 64


def test_uses_of_a_tensor_in_inductors_source():
    source = "tl.load(in_ptr1 + x0)\ntl.load(in_ptr10 + x0)\ntl.store(in_ptr10 + x0, y)\ntl.atomic_add(out + x0, y)"
    assert [uses(source, name) for name in ("in_ptr1", "in_ptr10", "out", "in_ptr0")] == [
        {"load"},
        {"load", "store"},
        {"atomic_add"},
        set(),
    ]


@pytest.mark.slow  # a compiler
def test_known_counts(tmp_path):
    (tmp_path / "known.py").write_text(KERNELS)
    counts = {
        name: Counted(**facts) for name, facts in json.loads(compiler("-c", COUNTING, str(tmp_path)).stdout).items()
    }
    each = {
        name: {kind: counted.per_element(n) for kind, n in counted.instructions.items()}
        for name, counted in counts.items()
    }
    assert each["7 FFMA"]["fp32"] == 7 and each["7 FFMA"]["half"] == each["7 FFMA"]["mufu"] == 0
    for k in (6, 100):  # unrolled completely and partly
        assert each[f"sum of {k}"]["fp32"] == pytest.approx(1, rel=0.02)
    assert each["exponential"]["mufu"] == 1
    assert each["root"]["mufu"] == 1 and each["root"]["fp32"] < 8
    assert each["float16"]["conversion"] == 1.5 and each["float16"]["fp32"] == 1 and each["float16"]["half"] == 0
    assert all(counted.spills == 0 and 8 <= counted.registers < 64 for counted in counts.values())
