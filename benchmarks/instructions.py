"""``python -m benchmarks instructions``: what each kernel issues, counted in its compiled code; no GPU runs.

The launches are those of a training step, and of the norms and CELUs of an evaluation of as many images; they are
compiled as by ``python -m benchmarks compile``, and nvdisasm lists the code. An instruction of the listing is issued
once by each warp of each program, wherever a path from the entry leads to it: both sides of a branch count, predicated
instructions count, the slow paths of a division or a square root, which are those blocks that call a subroutine, do
not. In a loop it is issued once a trip, and the compiler may have unrolled the loop of the source, so that

    trips = bytes that the launch moves per thread / bytes that a thread loads and stores in a trip,

rounded, of global memory; 1 where a loop moves none. Where it stores, those bytes alone count, since values per channel
may be loaded again each trip. Per element of the largest tensor that a kernel reads or writes
(x, or dx, before the pool), then

    thread instructions per element = instructions of a thread * 32 * warps * programs / elements
    issue time = warp instructions / (multiprocessors * 4 a cycle * clock),

a bound from below: a multiprocessor starts four warp instructions a cycle at the most (CUDA C++ Programming Guide,
compute capability 9.0), and fewer of MUFU, conversions and FP64, whose units are narrower than a warp. What it waits
for is not in it. Byte time is the launch's bytes over the bandwidth, from a cold cache. A second pass (apply,
backward_apply) goes over its rows from the last to the first, and a cache of C bytes that keeps what was used last
(least recently used out, whole lines) still has

    min(1, C / D)

of what the pass before it read or wrote too, D being the bytes of all tensors of the two: r rows before the end, both
passes have touched r rows of each since.

Classes: fp32; half (two values an instruction); fp64; conversion (of types; HADD2.F32 is one from half); mufu; memory
(global, shared, constant memory, and shuffles); control (branches, barriers); integer: all else, addresses, moves,
selections and the shifts by which bfloat16 is widened.
"""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import torch
import triton

from benchmarks.compile import compiled_kernel, resources
from benchmarks.rows import markdown, show
from cifar_fast import Recipe
from cifar_fast.backends.fused import PADDED_CHANNELS
from cifar_fast.diagnostics.kernel_cases import DIRECTIONS, Augmentation, Head, norm_cases
from cifar_fast.kernels.launch import Launch

WARP = 32
CLASSES = {  # the first whose pattern the opcode begins with
    "mufu": r"MUFU",
    "conversion": r"F2F|F2I|I2F|F2FP|I2I|FRND|HADD2\.F32",
    "half": r"HADD2|HMUL2|HFMA2(?!\.MMA .*RZ, RZ)|HMNMX2|HSETP2|HSET2|VHMNMX",
    "fp64": r"D(ADD|MUL|FMA|SETP|MNMX)",
    "fp32": r"F(ADD|MUL|FMA|SEL|SETP|SET|MNMX|CHK|SWZADD)",
    "memory": r"U?(LD|ST)|ATOM|RED[G.]|SHFL|CCTL|MEMBAR|ERRBAR|FENCE|UTMA|SYNCS",
    "control": r"U?BRA|BRX|JMP|EXIT|BSSY|BSYNC|BREAK|BMOV|BAR|B2R|CALL|RET|WARPSYNC|YIELD|NANOSLEEP|DEPBAR",
    "integer": r"",
}
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+((?:@!?\w+\s+)?)([A-Z]\w*\S*)\s*(.*?)\s*;", re.ASCII)

ENDS = re.compile(r"BRA|BRX|CALL|EXIT|RET")  # of a block


@dataclass(frozen=True)
class Card:
    """A GPU: clock in Hz, bandwidth in bytes/s, reads and writes both counted, second-level cache in bytes."""

    name: str
    multiprocessors: int
    clock: float
    bandwidth: float
    cache: float

    def __str__(self) -> str:
        clock, bandwidth = f"{self.clock / 1e9:g} GHz", f"{self.bandwidth / 1e12:g} TB/s"
        return f"{self.name}, {self.multiprocessors} multiprocessors, {clock}, {bandwidth}, {self.cache / 1e6:g} MB"

    def issue(self, instructions: float) -> float:
        """Seconds in which so many warp instructions are issued at the least."""
        return instructions / (self.multiprocessors * 4 * self.clock)


# The bandwidth is 0.9 of the data sheets', which is what a copy gets on an H200; clocks are the highest.
CARDS = {
    "sm_80": Card("A100", multiprocessors=108, clock=1.41e9, bandwidth=1.83e12, cache=40e6),
    "sm_90": Card("H200", multiprocessors=132, clock=1.755e9, bandwidth=4.3e12, cache=50e6),
    "sm_100": Card("B200", multiprocessors=148, clock=1.965e9, bandwidth=7.2e12, cache=126e6),
}
ALU_LATENCY = 4
"""Cycles from an instruction to one that needs its result (Jia et al., Dissecting the Volta Architecture, 2018)."""


@dataclass(frozen=True)
class Counted:
    """What one launch issues and moves. ``count``: how often it comes; ``instructions``: of a thread, by class."""

    part: str
    case: str
    kernel: str
    count: int
    elements: int
    bytes: int
    programs: int
    warps: int
    instructions: dict[str, int]
    registers: int
    spills: int
    shared: int
    again: int = 0
    around: int = 0

    def from_memory(self, cache: float) -> float:
        """Bytes of the launch that a cache of so many bytes has not kept."""
        return self.bytes - self.again * min(1.0, cache / self.around) if self.around else self.bytes

    @property
    def warp_instructions(self) -> int:
        """Of all warps of all programs."""
        return sum(self.instructions.values()) * self.warps * self.programs

    def per_element(self, instructions: int) -> float:
        """Thread instructions per element, of so many of a thread."""
        return instructions * WARP * self.warps * self.programs / self.elements

    def times(self, card: Card) -> dict[str, float]:
        """Seconds of issue, of the bytes, and of those alone that the cache has not kept."""
        issue, warm = card.issue(self.warp_instructions), self.from_memory(card.cache)
        return {"issue": issue, "byte": self.bytes / card.bandwidth, "byte_warm": warm / card.bandwidth}

    @property
    def resident(self) -> float:
        """Of the 64 warps of a multiprocessor those that fit 65,536 registers, given out by 8 a thread, and 163 KiB of
        shared memory, of which each program takes 1 KiB more (CUDA Programming Guide, compute capability 8.0; 9.0 and
        10.0 have more of it).
        """
        by_registers = 4 * (65536 // 4 // (WARP * 8 * -(-self.registers // 8)))
        programs = min(min(64, by_registers) // self.warps, 32, 163 * 1024 // (self.shared + 1024))
        return programs * self.warps / 64

    def seconds(self, card: Card) -> float:
        """What the launch takes at the least: to issue or to move all of it, whichever is longer, on multiprocessors of
        which some have a program more. Where not all programs fit at once, those that start last end last, and have
        nobody to share with: a program's instructions one by one come on top. Where all do, they are a bound like the
        other two.
        """
        of_each = self.programs / card.multiprocessors
        issue = card.issue(self.warp_instructions) * math.ceil(of_each) / of_each
        busy = max(issue, self.bytes / card.bandwidth)
        chain = sum(self.instructions.values()) * ALU_LATENCY / card.clock
        return max(busy, chain) if of_each * self.warps <= 64 * self.resident else busy + chain


def classify(instruction: str) -> str:
    """The class of an instruction, opcode and operands."""
    return next(name for name, pattern in CLASSES.items() if re.match(pattern, instruction))


def disassemble(cubin: bytes) -> str:
    """nvdisasm's listing of the code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "--print-code", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def issued(listing: str, moved: float, stored: float = 0.0) -> dict[str, int]:
    """Instructions that a thread issues, by class, where it loads and stores ``moved`` bytes of global memory, of which
    it stores ``stored``, if that is known.
    """
    code, labels = _parse(listing)
    reached = _reached(code, labels)
    times = dict.fromkeys(reached, 1)
    for last in reached:
        first = _target(code[last][1], labels)
        if first is not None and first <= last:
            body = [i for i in reached if first <= i <= last]
            stores = sum(_width(code[i][1]) for i in body if code[i][1].startswith("STG"))
            whole, of_a_trip = moved, sum(_width(code[i][1]) for i in body)
            if stored and stores:
                whole, of_a_trip = stored, stores
            if of_a_trip:
                times |= {i: max(times[i], round(whole / of_a_trip)) for i in body}
    found = dict.fromkeys(CLASSES, 0)
    for i, repeats in times.items():
        found[classify(code[i][1])] += repeats
    return found


def _parse(listing: str) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """Instructions with their predicates apart, and the labels by the instruction that follows."""
    code: list[tuple[str, str]] = []
    labels = {}
    for line in listing.splitlines():
        if found := re.match(r"([.$\w]+):$", line):
            labels[found[1]] = len(code)
        elif (found := INSTRUCTION.match(line)) and found[2] != "NOP":
            code.append((found[1].strip(), f"{found[2]} {found[3]}"))
    return code, labels


def _target(instruction: str, labels: dict[str, int]) -> int | None:
    """Where a jump leads: a branch, or a call of a label without a name, by which ptxas leaves a loop. Not that of a
    warp that has diverged, whose threads take turns there.
    """
    found = re.match(r"(?:BRA(?!\.DIV)|CALL)\b.*`\((\.L\w+)\)", instruction)
    return labels[found[1]] if found else None


def _reached(code: list[tuple[str, str]], labels: dict[str, int]) -> list[int]:
    """The instructions to which a path leads from the first, around the blocks that call a subroutine."""
    leaders = {*labels.values(), *(i + 1 for i, (_, one) in enumerate(code) if ENDS.match(one))}
    starts = sorted({0, *(i for i in leaders if i < len(code))})
    ends = dict(zip(starts, [*starts[1:], len(code)]))
    reached: set[int] = set()
    waiting = [0]
    while waiting:
        start = waiting.pop()
        block = range(start, ends.get(start, start))
        predicate, last = code[block[-1]] if block else ("", "")
        target = _target(last, labels)
        if start in reached or not block or (last.startswith("CALL") and target is None and not predicate):
            continue
        reached.update(block)
        if target is not None:
            waiting.append(target)
        if predicate or re.match(r"BRA\S* !?U?P", last) or not ENDS.match(last):
            waiting.append(block[-1] + 1)
    if not any(code[i][1].startswith("EXIT") for i in reached):
        raise ValueError("no path leads to the end of the kernel without a call of a subroutine")
    return sorted(reached)


def _width(instruction: str) -> int:
    """Bytes of global memory that a thread loads or stores by an instruction."""
    if not re.match("LDG|STG", instruction):
        return 0
    found = re.search(r"\.[US]?(8|16|64|128|256)\b", instruction.split()[0])
    return int(found[1]) // 8 if found else 4


def count_compiled(made: Any, programs: int, written: int = 0, **facts: Any) -> Counted:
    """Count what Triton ``made``, launched in ``programs``, of whose bytes ``written`` are stored, if that is known;
    ``facts`` are the first fields of the result.
    """
    cubin, warps = made.asm["cubin"], made.metadata.num_warps
    threads = programs * warps * WARP
    instructions = issued(disassemble(cubin), facts["bytes"] / threads, written / threads)
    registers, spills = resources(cubin)
    code = dict(instructions=instructions, registers=registers, spills=spills, shared=made.metadata.shared)
    return Counted(**facts, programs=programs, warps=warps, **code)


def count_launch(part: str, case: str, count: int, launch: Launch, arch: str, before: Launch | None = None) -> Counted:
    """Compile ``launch`` for ``arch``, and count; it may find in a cache what ``before`` left there."""
    tensors = {name: one for name, one in launch.arguments.items() if isinstance(one, torch.Tensor)}
    return count_compiled(
        compiled_kernel(launch, arch),
        prod(launch.grid),
        launch.bytes_written,
        part=part,
        case=case,
        kernel=launch.kernel.__name__.removesuffix("_kernel"),
        count=count,
        elements=max(launch.accessed.get(name, one.numel()) for name, one in tensors.items()),
        bytes=launch.bytes_read + launch.bytes_written,
        **dict(zip(("again", "around"), met_again(launch, before))) if before else {},
    )


def met_again(launch: Launch, before: Launch) -> tuple[int, int]:
    """Bytes that ``launch`` reads of tensors of ``before``, and of all tensors of the two."""
    tensors = [one for some in (before.reads, before.writes) for one in some.values() if one is not None]
    mine = [one for one in launch.reads.values() if one is not None]
    again = [one for one in mine if any(one is other for other in tensors)]
    both = {id(one): one.nbytes for one in (*tensors, *mine, *launch.writes.values()) if one is not None}
    return sum(one.nbytes for one in again), sum(both.values())


def recipe_launches(recipe: Recipe, dtype: torch.dtype) -> list[tuple[str, str, int, Launch, Launch | None]]:
    """The launches of a step and of an evaluation: part, case, how often, launch, and the pass before a second one;
    those alike once.
    """
    augmentation = Augmentation(recipe, dtype, PADDED_CHANNELS)
    found: list[Any] = [("step", augmentation.name, 1, launch, None) for launch in augmentation.launches()]
    found += [("step", Head.name, 1, launch, None) for launch in Head(recipe, dtype).launches()]
    norms = norm_cases(recipe, dtype)
    for case in sorted(norms, key=lambda case: DIRECTIONS.index(case.direction)):
        launches = case.launches()  # pass, merge, pass; of an evaluation one pass
        for i, launch in enumerate(launches):
            found.append((case.part, case.name, norms[case], launch, launches[0] if i == 2 else None))
    return found


def count_all(recipe: Recipe, dtype: torch.dtype, arch: str) -> list[Counted]:
    """Every distinct launch of ``recipe``."""
    return [count_launch(*work, arch, before) for *work, before in recipe_launches(recipe, dtype)]


def record(row: Counted, card: Card) -> dict[str, Any]:
    """Every figure of a launch; times in s."""
    return asdict(row) | {"warp_instructions": row.warp_instructions, "resident": row.resident} | row.times(card)


def table(rows: Sequence[Counted], card: Card) -> str:
    """A line per launch: thread instructions per element by class, us of one launch; and us of all of a part."""
    header = ("case", "kernel", "count", *CLASSES, "all", "issue us", "bytes us", "warm", "issue / bytes")
    lines = []
    for row in rows:
        each = [f"{row.per_element(row.instructions[name]):.1f}" for name in CLASSES]
        whole = f"{row.per_element(sum(row.instructions.values())):.1f}"
        times = row.times(card)
        us = [f"{seconds * 1e6:.2f}" for seconds in times.values()]
        facts = show(times["issue"] / times["byte"]), str(row.registers), f"{row.resident:.0%}", str(row.spills)
        lines.append((row.case, row.kernel, str(row.count), *each, whole, *us, *facts))
    sums = []
    for part in dict.fromkeys(row.part for row in rows):
        some = [(row.count, row.times(card)) for row in rows if row.part == part]
        totals = [sum(count * times[name] for count, times in some) for name in ("issue", "byte", "byte_warm")]
        totals.append(sum(count * max(times["issue"], times["byte"]) for count, times in some))
        sums.append((part, str(sum(count for count, _ in some)), *(f"{one * 1e6:.1f}" for one in totals)))
    of_parts = markdown(("part", "launches", "issue us", "bytes us", "warm", "the longer of both, us"), sums)
    return f"{markdown((*header, 'registers', 'warps', 'bytes spilled'), lines)}\n\n{of_parts}"
