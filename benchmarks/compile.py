"""``python -m benchmarks compile``: compile every kernel at every shape of the recipe for GPUs that need not be here.

The launches are those of the operators' planners, on meta tensors. Registers and spills are in the report of the
assembler. The widths of loads and stores are in the PTX: the address of an access is traced back to a pointer argument.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.rows import markdown
from cifar_fast import Recipe
from cifar_fast.diagnostics.kernel_cases import Case, Head, kernel_cases
from cifar_fast.kernels.launch import Launch

TARGETS = tuple(f"sm_{n}" for n in (75, 80, 86, 89, 90, 100, 120))
LARGE = 1 << 20  # bytes of a tensor whose accesses must be wide
TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.uint8: "u8", torch.int64: "i64"}


@dataclass(frozen=True)
class Compiled:
    """A compiled launch. ``widths`` has the widest load and the widest store of each large tensor, in bits."""

    case: str
    kernel: str
    target: str
    registers: int
    spills: int
    shared: int
    read: int
    written: int
    widths: tuple[dict[str, int], dict[str, int]]
    byte_tensors: frozenset[str]

    def problems(self) -> list[str]:
        """Return a line for each spill and each narrow access: below 128 bits, or below 64 for bytes.

        A thread accesses as many one-byte values as two-byte values, so 64 bits are wide enough for the bytes.
        """
        problems = [f"{self.spills} bytes spilled"] if self.spills else []
        for what, widths in zip(("loads", "stores"), self.widths):
            narrow = {name: bits for name, bits in widths.items() if bits < (64 if name in self.byte_tensors else 128)}
            problems += [f"{what} of {name} are {bits} bits wide" for name, bits in narrow.items()]
        return [f"{self.case}, {self.kernel}, {self.target}: {problem}" for problem in problems]


def compiled_kernel(launch: Launch, target: str) -> Any:
    """Compile ``launch`` for ``target``, such as "sm_90", with the specializations that Triton's own launcher makes."""
    arguments, constants = launch.arguments, dict(launch.constants)
    signature: dict[str, str] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for i, name in enumerate(launch.kernel.arg_names):
        value = arguments.get(name)
        aligned: Any = False
        if name in launch.constants:
            signature[name] = "constexpr"
        elif value is None or (isinstance(value, int) and value == 1):
            signature[name] = "constexpr"
            constants[name] = value
        elif isinstance(value, torch.Tensor):
            signature[name] = f"*{TYPES[value.dtype]}"
            aligned = value.storage_offset() * value.element_size() % 16 == 0
        else:
            signature[name] = "i32" if isinstance(value, int) else "fp32"
            aligned = isinstance(value, int) and value % 16 == 0
        if aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", int(target.removeprefix("sm_")), 32), options=launch.options)


def compile_launch(case: str, launch: Launch, target: str) -> Compiled:
    """Compile ``launch`` for ``target`` and read the result."""
    made = compiled_kernel(launch, target)
    pointers = [name for name in launch.kernel.arg_names if made.src.signature[name] != "constexpr"]
    tensors = {name: value for name, value in launch.arguments.items() if isinstance(value, torch.Tensor)}
    # A kernel that gathers can only access single elements.
    large = {name for name, value in tensors.items() if value.nbytes >= LARGE and name not in launch.accessed}
    registers, spills = resources(made.asm["cubin"])
    return Compiled(
        case=case,
        kernel=launch.kernel.__name__,
        target=target,
        registers=registers,
        spills=spills,
        shared=made.metadata.shared,
        read=launch.bytes_read,
        written=launch.bytes_written,
        widths=access_widths(made.asm["ptx"], pointers, large),
        byte_tensors=frozenset(name for name in large if tensors[name].element_size() == 1),
    )


def resources(cubin: bytes) -> tuple[int, int]:
    """Return registers per thread, and bytes of stack and local memory for spills and for arrays."""
    text = inspect_code(triton.knobs.nvidia.cuobjdump, "--dump-resource-usage", cubin)
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return numbers["REG"], numbers["STACK"] + numbers["LOCAL"]


def inspect_code(tool: Any, flag: str, cubin: bytes) -> str:
    """Return what one of NVIDIA's tools prints about the code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool.path, flag, file.name], capture_output=True, text=True, check=True).stdout


def access_widths(ptx: str, arguments: list[str], large: set[str]) -> tuple[dict[str, int], dict[str, int]]:
    """Return the widest load and the widest store of each of the ``large`` arguments, in bits."""
    lines = [re.sub(r"^@!?%p\d+\s+", "", line.strip().rstrip(";")) for line in ptx.splitlines()]
    origins: dict[str, set[int]] = defaultdict(set)
    instructions = []
    for line in lines:
        if found := re.match(r"ld\.param\.\w+\s+(%\w+), \[\w+_param_(\d+)\]", line):
            origins[found[1]].add(int(found[2]))
        elif found := re.match(r"(mov|add|sub|mad|shl|cvta|selp|or|and)\S*\s+(%rd\d+), (.*)", line):
            instructions.append((found[2], re.findall(r"%rd\d+", found[3])))
    changed = True
    while changed:  # addresses pass through loops, so repeat until nothing is new
        changed = False
        for result, operands in instructions:
            before = len(origins[result])
            origins[result] |= set().union(*(origins[operand] for operand in operands))
            changed |= len(origins[result]) > before
    widths: dict[str, dict[str, int]] = {"ld": {}, "st": {}}
    for line in lines:
        if found := re.search(r"\b(ld|st)\.global(?:\.[\w:]+)*?(?:\.v(\d))?\.[busf](\d+)\s+.*?\[\s*(%rd\d+)", line):
            kind, bits = found[1], int(found[2] or 1) * int(found[3])
            for name in (arguments[index] for index in origins[found[4]] if index < len(arguments)):
                if name in large:
                    widths[kind][name] = max(widths[kind].get(name, 0), bits)
    return widths["ld"], widths["st"]


def compile_case(case: Case, target: str) -> list[Compiled]:
    """Compile every launch of ``case``."""
    return [compile_launch(case.name, launch, target) for launch in case.launches()]


def compile_all(recipe: Recipe, dtype: torch.dtype, targets: Sequence[str]) -> list[Compiled]:
    """Compile every distinct launch of ``recipe`` for every target, with all cores."""
    work = itertools.product([*kernel_cases(recipe, dtype), Head(recipe, dtype)], targets)
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        return list(itertools.chain(*pool.map(compile_case, *zip(*work))))


def table(rows: list[Compiled]) -> str:
    """Format a line per launch and target. MB are 10^6 bytes, widths are in bits."""
    header = ("case", "kernel", "target", "registers", "spills", "shared", "MB read", "MB written", "loads; stores")
    lines = []
    for row in rows:
        widths = "; ".join(", ".join(f"{name} {bits}" for name, bits in side.items()) for side in row.widths)
        counts = map(str, (row.registers, row.spills, row.shared))
        lines.append(
            (row.case, row.kernel, row.target, *counts, f"{row.read / 1e6:.3f}", f"{row.written / 1e6:.3f}", widths)
        )
    return markdown(header, lines)
