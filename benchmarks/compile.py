"""``python -m benchmarks compile``: every kernel at every shape of the recipe, compiled for GPUs that are not here.

The launches are those of the operators' planners, on tensors without memory. The assembler's own report gives registers
and spills; the PTX the width of each tensor's loads and stores: an access's address is traced back to the pointer
argument it came from.
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
LARGE = 1 << 20  # bytes from which a tensor's accesses count
TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.uint8: "u8", torch.int64: "i64"}


@dataclass(frozen=True)
class Compiled:
    """What became of a launch: ``widths`` gives the widest access of each large tensor in bits, loads then stores;
    ``of_bytes`` names those whose values have one byte.
    """

    case: str
    kernel: str
    target: str
    registers: int
    spills: int
    shared: int
    read: int
    written: int
    widths: tuple[dict[str, int], dict[str, int]]
    of_bytes: frozenset[str]

    def problems(self) -> list[str]:
        """What is not as it must be: a spill; a large tensor that is not accessed by 128 bits. Of bytes 64 are enough:
        they go with values of two, of which a thread then takes as many.
        """
        found = [f"{self.spills} bytes spilled"] if self.spills else []
        for what, widths in zip(("loads", "stores"), self.widths):
            narrow = {name: bits for name, bits in widths.items() if bits < (64 if name in self.of_bytes else 128)}
            found += [f"{what} of {name} are {bits} bits wide" for name, bits in narrow.items()]
        return [f"{self.case}, {self.kernel}, {self.target}: {problem}" for problem in found]


def compiled_kernel(launch: Launch, target: str) -> Any:
    """``launch`` compiled for ``target``, such as "sm_90", as Triton's own launcher would specialize it."""
    signature, constants, attributes = {}, dict(launch.constants), {}
    arguments = launch.arguments
    for i, name in enumerate(launch.kernel.arg_names):
        value = arguments.get(name)
        aligned = False
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
    """What becomes of ``launch`` on ``target``."""
    made = compiled_kernel(launch, target)
    pointers = [name for name in launch.kernel.arg_names if made.src.signature[name] != "constexpr"]
    tensors = {name: value for name, value in launch.arguments.items() if isinstance(value, torch.Tensor)}
    # Of what is gathered from, whole images apart, single elements are all there is to access.
    large = {name for name, value in tensors.items() if value.nbytes >= LARGE and name not in launch.accessed}
    registers, spills = resources(made.asm["cubin"])
    name, shared = launch.kernel.__name__, made.metadata.shared
    widths = access_widths(made.asm["ptx"], pointers, large)
    read, written = launch.bytes_read, launch.bytes_written
    of_bytes = frozenset(name for name in large if tensors[name].element_size() == 1)
    return Compiled(case, name, target, registers, spills, shared, read, written, widths, of_bytes)


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers per thread; bytes of stack and local memory: what is spilled, and arrays that found no registers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return numbers["REG"], numbers["STACK"] + numbers["LOCAL"]


def access_widths(ptx: str, arguments: list[str], large: set[str]) -> tuple[dict[str, int], dict[str, int]]:
    """The widest load and store, in bits, of each of the ``large`` arguments."""
    lines = [re.sub(r"^@!?%p\d+\s+", "", line.strip().rstrip(";")) for line in ptx.splitlines()]
    origins: dict[str, set[int]] = defaultdict(set)
    instructions = []
    for line in lines:
        if found := re.match(r"ld\.param\.\w+\s+(%\w+), \[\w+_param_(\d+)\]", line):
            origins[found[1]].add(int(found[2]))
        elif found := re.match(r"(mov|add|sub|mad|shl|cvta|selp|or|and)\S*\s+(%rd\d+), (.*)", line):
            instructions.append((found[2], re.findall(r"%rd\d+", found[3])))
    changed = True
    while changed:  # loops carry addresses round: go on until nothing is new
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


def compile_case(case: Case | Head, target: str) -> list[Compiled]:
    """Every launch of ``case``."""
    return [compile_launch(case.name, launch, target) for launch in case.launches()]


def compile_all(recipe: Recipe, dtype: torch.dtype, targets: Sequence[str]) -> list[Compiled]:
    """Every distinct launch of ``recipe`` on every target, with all cores."""
    work = itertools.product([*kernel_cases(recipe, dtype), Head(recipe, dtype)], targets)
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        return list(itertools.chain(*pool.map(compile_case, *zip(*work))))


def table(rows: list[Compiled]) -> str:
    """A line per launch and target; MB are 10^6 bytes, widths in bits."""
    header = ("case", "kernel", "target", "registers", "spills", "shared", "MB read", "MB written", "loads; stores")
    lines = []
    for row in rows:
        widths = "; ".join(", ".join(f"{name} {bits}" for name, bits in side.items()) for side in row.widths)
        counts = map(str, (row.registers, row.spills, row.shared))
        lines.append(
            (row.case, row.kernel, row.target, *counts, f"{row.read / 1e6:.3f}", f"{row.written / 1e6:.3f}", widths)
        )
    return markdown(header, lines)
