"""``python -m benchmarks instructions``: count what each kernel issues in its compiled code, without a GPU.

The launches are those of a training step, and the norms of an evaluation batch of the same size. They are compiled as
by ``python -m benchmarks compile``, and nvdisasm lists the code. Each warp of each program issues an instruction once
if a path from the entry leads to it. Both sides of a branch count, and so do predicated instructions. The slow paths of
divisions and square roots, which are the blocks that call a subroutine, do not count. An instruction in a loop is
issued once per trip. The compiler may have unrolled the loop of the source, so the trips come from the traffic:

    trips = bytes that the launch moves per thread / bytes that a thread loads and stores in a trip,

The quotient is rounded and counts global memory only. A loop that moves no bytes counts as one trip. In a loop that
stores, only the stored bytes count, because values per channel may be loaded again in each trip. Then

    thread instructions per element = instructions of a thread * 32 * warps * programs / elements
    issue time = warp instructions / (multiprocessors * 4 a cycle * clock),

for the elements of the largest tensor that a kernel reads or writes (x, or dx, before the pool).

The issue time is a lower bound. A multiprocessor starts at most four warp instructions a cycle (CUDA C++ Programming
Guide, compute capability 9.0), and fewer of MUFU, conversions and FP64, whose units are narrower than a warp. Latencies
come on top. The byte time is the launch's bytes over the bandwidth, with a cold cache. A second pass (apply,
backward_apply) reads its rows from the last to the first. Some of its bytes were also accessed by the first pass. A
cache of C bytes that evicts the least recently used bytes still holds the fraction

    min(1, C / D)

of them. D is the number of bytes of all tensors of both passes. Between the two accesses to a row that is r rows from
the end, the passes access r rows of each tensor.

Classes: fp32; half (two values an instruction); fp64; conversion (of dtypes; HADD2.F32 converts from half); mufu;
memory (global, shared and constant memory, and shuffles); control (branches, barriers); integer (everything else:
addresses, moves, selections, and the shifts that widen bfloat16).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import triton

from benchmarks.compile import compiled_kernel, inspect_code, resources
from benchmarks.rows import markdown, show
from cifar_fast import Recipe
from cifar_fast.backends.fused import PADDED_CHANNELS
from cifar_fast.diagnostics.kernel_cases import DIRECTIONS, Augmentation, Head, norm_cases
from cifar_fast.kernels.launch import Launch

WARP = 32
CLASSES = {  # the first pattern that matches the start of the opcode decides
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
BLOCK_END = re.compile(r"BRA|BRX|CALL|EXIT|RET")


@dataclass(frozen=True)
class Card:
    """A GPU: clock in Hz, bandwidth in bytes/s of reads and writes together, second-level cache in bytes."""

    name: str
    multiprocessors: int
    clock: float
    bandwidth: float
    cache: float

    def __str__(self) -> str:
        clock, bandwidth = f"{self.clock / 1e9:g} GHz", f"{self.bandwidth / 1e12:g} TB/s"
        return f"{self.name}, {self.multiprocessors} multiprocessors, {clock}, {bandwidth}, {self.cache / 1e6:g} MB"

    def issue(self, instructions: float) -> float:
        """Return the minimum seconds to issue so many warp instructions."""
        return instructions / (self.multiprocessors * 4 * self.clock)


# Bandwidths are 0.9 of the data sheets', which a copy reaches on an H200. Clocks are the maximum.
CARDS = {
    "sm_80": Card("A100", multiprocessors=108, clock=1.41e9, bandwidth=1.83e12, cache=40e6),
    "sm_90": Card("H200", multiprocessors=132, clock=1.755e9, bandwidth=4.3e12, cache=50e6),
    "sm_100": Card("B200", multiprocessors=148, clock=1.965e9, bandwidth=7.2e12, cache=126e6),
}
ALU_LATENCY = 4
"""Cycles from an instruction to one that needs its result (Jia et al., Dissecting the Volta Architecture, 2018)."""


@dataclass(frozen=True)
class Counted:
    """Counts for one launch: the instructions of a thread by class, and the bytes.

    A step or an evaluation contains the launch ``count`` times. ``reused_bytes`` were also read or written by the pass
    before it. ``working_set`` has the bytes of both passes.
    """

    section: str
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
    reused_bytes: int = 0
    working_set: int = 0

    def from_memory(self, cache: float) -> float:
        """Return how many bytes the launch accesses in memory if the second-level cache has ``cache`` bytes."""
        return self.bytes - self.reused_bytes * min(1.0, cache / self.working_set) if self.working_set else self.bytes

    @property
    def warp_instructions(self) -> int:
        """Instructions of all warps of all programs."""
        return sum(self.instructions.values()) * self.warps * self.programs

    def per_element(self, instructions: int) -> float:
        """Return the thread instructions per element for so many instructions of a thread."""
        return instructions * WARP * self.warps * self.programs / self.elements

    def times(self, card: Card) -> dict[str, float]:
        """Return the seconds of issue, of all bytes, and of the bytes that the cache does not hold."""
        issue, warm = card.issue(self.warp_instructions), self.from_memory(card.cache)
        return {"issue": issue, "byte": self.bytes / card.bandwidth, "byte_warm": warm / card.bandwidth}

    @property
    def occupancy(self) -> float:
        """Fraction of the 64 warps of a multiprocessor that fit.

        There are 65,536 registers, allocated by 8 per thread, and 163 KiB of shared memory, of which each program takes
        1 KiB more than it asks for (CUDA Programming Guide, compute capability 8.0; 9.0 and 10.0 have more memory).
        """
        by_registers = 4 * (65536 // 4 // (WARP * 8 * -(-self.registers // 8)))
        programs = min(min(64, by_registers) // self.warps, 32, 163 * 1024 // (self.shared + 1024))
        return programs * self.warps / 64

    def seconds(self, card: Card) -> float:
        """Return the minimum time of the launch.

        It is the longer of issue time and byte time. Some multiprocessors have one program more than others. If not all
        programs fit at once, the serial latency of one program is added for the last wave. Otherwise that latency is a
        third lower bound.
        """
        programs = self.programs / card.multiprocessors
        issue = card.issue(self.warp_instructions) * math.ceil(programs) / programs
        busy = max(issue, self.bytes / card.bandwidth)
        latency = sum(self.instructions.values()) * ALU_LATENCY / card.clock
        return max(busy, latency) if programs * self.warps <= 64 * self.occupancy else busy + latency


def classify(instruction: str) -> str:
    """Return the class of an instruction, given its opcode and operands."""
    return next(name for name, pattern in CLASSES.items() if re.match(pattern, instruction))


def issued(listing: str, moved: float, stored: float = 0.0) -> dict[str, int]:
    """Count the instructions of a thread that loads and stores ``moved`` bytes, and stores ``stored`` if known."""
    code, labels = _parse(listing)
    reached = _reached(code, labels)
    times = dict.fromkeys(reached, 1)
    for last in reached:
        first = _target(code[last][1], labels)
        if first is not None and first <= last:
            body = [i for i in reached if first <= i <= last]
            stores = sum(_width(code[i][1]) for i in body if code[i][1].startswith("STG"))
            total, per_trip = moved, sum(_width(code[i][1]) for i in body)
            if stored and stores:
                total, per_trip = stored, stores
            if per_trip:
                times |= {i: max(times[i], round(total / per_trip)) for i in body}
    counts = dict.fromkeys(CLASSES, 0)
    for i, repeats in times.items():
        counts[classify(code[i][1])] += repeats
    return counts


def _parse(listing: str) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """Return pairs of predicate and instruction, and the index of the instruction after each label."""
    code: list[tuple[str, str]] = []
    labels = {}
    for line in listing.splitlines():
        if found := re.match(r"([.$\w]+):$", line):
            labels[found[1]] = len(code)
        elif (found := INSTRUCTION.match(line)) and found[2] != "NOP":
            code.append((found[1].strip(), f"{found[2]} {found[3]}"))
    return code, labels


def _target(instruction: str, labels: dict[str, int]) -> int | None:
    """Return the target of a branch, or of a call of an unnamed label, which is how ptxas leaves a loop."""
    # The threads of a diverged warp take turns at the target of BRA.DIV.
    found = re.match(r"(?:BRA(?!\.DIV)|CALL)\b.*`\((\.L\w+)\)", instruction)
    return labels[found[1]] if found else None


def _reached(code: list[tuple[str, str]], labels: dict[str, int]) -> list[int]:
    """Return the indices of the instructions that are reachable from the first one.

    Blocks that call a subroutine are left out, and so is the code that is reached only through them.
    """
    leaders = {*labels.values(), *(i + 1 for i, (_, one) in enumerate(code) if BLOCK_END.match(one))}
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
        if predicate or re.match(r"BRA\S* !?U?P", last) or not BLOCK_END.match(last):
            waiting.append(block[-1] + 1)
    if not any(code[i][1].startswith("EXIT") for i in reached):
        raise ValueError("every path to the end of the kernel has a call of a subroutine")
    return sorted(reached)


def _width(instruction: str) -> int:
    """Return the bytes of global memory that an instruction loads or stores per thread."""
    if not re.match("LDG|STG", instruction):
        return 0
    found = re.search(r"\.[US]?(8|16|64|128|256)\b", instruction.split()[0])
    return int(found[1]) // 8 if found else 4


def count_compiled(made: Any, written: int = 0, **facts: Any) -> Counted:
    """Count the instructions of the compiled kernel ``made``.

    ``written`` is the number of bytes that its launch stores, or 0 if unknown.
    """
    cubin, warps, shared = made.asm["cubin"], made.metadata.num_warps, made.metadata.shared
    registers, spills = resources(cubin)
    listing = inspect_code(triton.knobs.nvidia.nvdisasm, "--print-code", cubin)
    threads = facts["programs"] * warps * WARP
    counts = issued(listing, facts["bytes"] / threads, written / threads)
    return Counted(**facts, warps=warps, instructions=counts, registers=registers, spills=spills, shared=shared)


def count_launch(
    section: str, case: str, count: int, launch: Launch, before: Launch | None = None, *, arch: str
) -> Counted:
    """Compile ``launch`` for ``arch`` and count. ``before`` is the launch whose tensors a cache may still hold."""
    reused_bytes, working_set = reuse(launch, before) if before else (0, 0)
    tensors = {name: one for name, one in launch.arguments.items() if isinstance(one, torch.Tensor)}
    return count_compiled(
        compiled_kernel(launch, arch),
        launch.bytes_written,
        programs=math.prod(launch.grid),
        section=section,
        case=case,
        kernel=launch.kernel.__name__.removesuffix("_kernel"),
        count=count,
        elements=max(launch.accessed.get(name, one.numel()) for name, one in tensors.items()),
        bytes=launch.bytes_read + launch.bytes_written,
        reused_bytes=reused_bytes,
        working_set=working_set,
    )


def reuse(launch: Launch, before: Launch) -> tuple[int, int]:
    """Return the bytes that ``launch`` reads of tensors of ``before``, and the bytes of all tensors of the two."""

    def sizes(tensors: dict[str, torch.Tensor | None]) -> dict[int, int]:
        return {id(tensor): tensor.nbytes for tensor in tensors.values() if tensor is not None}

    read, earlier = sizes(launch.reads), sizes(before.reads) | sizes(before.writes)
    every = earlier | read | sizes(launch.writes)
    return sum(read[key] for key in read.keys() & earlier.keys()), sum(every.values())


def recipe_launches(
    recipe: Recipe, dtype: torch.dtype, activation: str = "celu"
) -> Iterator[tuple[str, str, int, Launch, Launch | None]]:
    """Yield section, case, count, launch and first pass for each distinct launch, with ``activation`` in the norms.

    The last item is the first pass of the same case if the launch is a second pass, else None.
    """
    for single in (Augmentation(recipe, dtype, PADDED_CHANNELS), Head(recipe, dtype)):
        for launch in single.launches():
            yield "step", single.name, 1, launch, None
    norms = norm_cases(recipe, dtype)
    for case in sorted(norms, key=lambda case: DIRECTIONS.index(case.direction)):
        launches = replace(case, activation=activation).launches()  # in training a pass, a merge and a second pass
        for i, launch in enumerate(launches):
            yield case.section, case.name, norms[case], launch, launches[0] if i == 2 else None


def count_all(recipe: Recipe, dtype: torch.dtype, arch: str, activation: str = "celu") -> list[Counted]:
    """Count every distinct launch of ``recipe`` with ``activation`` in the norms."""
    return [count_launch(*work, arch=arch) for work in recipe_launches(recipe, dtype, activation)]


def record(row: Counted, card: Card) -> dict[str, Any]:
    """Return every figure of a launch. Times are in seconds."""
    return asdict(row) | {"warp_instructions": row.warp_instructions, "occupancy": row.occupancy} | row.times(card)


def table(rows: Sequence[Counted], card: Card) -> str:
    """Format a line per launch with thread instructions per element and microseconds, and the sums of each section."""
    header = ("case", "kernel", "count", *CLASSES, "all", "issue us", "bytes us", "warm", "issue / bytes")
    header += ("registers", "warps", "bytes spilled")
    lines = []
    for row in rows:
        each = [f"{row.per_element(row.instructions[name]):.1f}" for name in CLASSES]
        whole = f"{row.per_element(sum(row.instructions.values())):.1f}"
        times = row.times(card)
        us = [f"{seconds * 1e6:.2f}" for seconds in times.values()]
        facts = show(times["issue"] / times["byte"]), str(row.registers), f"{row.occupancy:.0%}", str(row.spills)
        lines.append((row.case, row.kernel, str(row.count), *each, whole, *us, *facts))
    sums = []
    for section in dict.fromkeys(row.section for row in rows):
        launches = [(row.count, row.times(card)) for row in rows if row.section == section]
        totals = [sum(count * times[name] for count, times in launches) for name in ("issue", "byte", "byte_warm")]
        totals.append(sum(count * max(times["issue"], times["byte"]) for count, times in launches))
        sums.append((section, str(sum(count for count, _ in launches)), *(f"{total * 1e6:.1f}" for total in totals)))
    sections = markdown(("section", "launches", "issue us", "bytes us", "warm", "longer of both, us"), sums)
    return f"{markdown(header, lines)}\n\n{sections}"


def comparison(counts: dict[str, list[Counted]]) -> str:
    """Format thread instructions per element of the norm's kernels for each activation.

    Behind each is its multiple of the first activation's. A range is that of the shapes. The last line is of all
    launches of the norms of a step, per element before the pool.
    """
    lines: dict[str, list[str]] = {}
    first: dict[str, float] = {}
    for rows in counts.values():
        norms = [row for row in rows if "x" in row.case.split(",")[0]]
        groups: dict[str, list[float]] = {}
        for row in norms:
            if not row.kernel.startswith("merge"):
                pool = ", pool" if "pool" in row.case else ""
                key = f"{row.kernel}{pool}{', evaluation' if row.section == 'evaluation' else ''}"
                groups.setdefault(key, []).append(row.per_element(sum(row.instructions.values())))
        step = [row for row in norms if row.section == "step"]
        # Each norm of a step has one first pass, which reads its x.
        elements = sum(row.count * row.elements for row in step if row.kernel == "statistics")
        groups["all of a step"] = [WARP * sum(row.count * row.warp_instructions for row in step) / elements]
        for name, values in groups.items():
            low, high = f"{min(values):.1f}", f"{max(values):.1f}"
            multiple = sum(values) / first.setdefault(name, sum(values))
            lines.setdefault(name, []).append(f"{low if low == high else f'{low} to {high}'} ({multiple:.2f})")
    return markdown(("kernel", *counts), [(name, *cells) for name, cells in lines.items()])
