"""``python -m benchmarks.aot [--json FILE]``: every kernel at every shape of the recipe, compiled for GPUs that are not here.

The launches are those that the operators' planners give, on tensors without memory; each is compiled
for each target. For NVIDIA the assembler's own report gives registers and spills, and the PTX the
width of each tensor's loads and stores: an access's address is traced back to the pointer argument it
came from. For AMD the same is read off the assembly, widths over all tensors together.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.launches import Case, recipe_cases
from cifar_fast import Recipe
from kernels.launch import FP_FUSION, Launch, interpreted

TARGETS = {f"sm_{n}": GPUTarget("cuda", n, 32) for n in (75, 80, 86, 89, 90, 100, 120)}
TARGETS |= {"gfx942": GPUTarget("hip", "gfx942", 64), "gfx1100": GPUTarget("hip", "gfx1100", 32)}
# Most resident warps and bytes of shared memory of a multiprocessor, by NVIDIA's tables; registers are 65,536 on all.
LIMITS = {
    75: (32, 64 << 10),
    80: (64, 164 << 10),
    86: (48, 100 << 10),
    89: (48, 100 << 10),
    90: (64, 228 << 10),
    100: (64, 228 << 10),
    120: (48, 100 << 10),
}
LARGE = 1 << 20  # bytes from which a tensor's accesses count
TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What became of a kernel: ``loads`` and ``stores`` give the widest access of each large tensor in bits."""

    case: str
    kernel: str
    target: str
    registers: int
    spills: int
    shared: int
    occupancy: float | None
    loads: dict[str, int]
    stores: dict[str, int]


def compile_launch(case: str, launch: Launch, target_name: str) -> Compiled:
    """Compile ``launch`` as Triton's own launcher would specialise it, and read what came out."""
    target = TARGETS[target_name]
    signature, constants, attributes, large = {}, dict(launch.constants), {}, {}
    for i, name in enumerate(launch.kernel.arg_names):
        value = launch.arguments.get(name)
        if name in launch.constants:
            signature[name] = "constexpr"
        elif value is None or (isinstance(value, int) and value == 1):
            signature[name] = "constexpr"
            constants[name] = value
        elif isinstance(value, torch.Tensor):
            signature[name] = f"*{TYPES[value.dtype]}"
            if value.storage_offset() * value.element_size() % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
            if value.numel() * value.element_size() >= LARGE:
                large[name] = value
        else:
            signature[name] = "i32" if isinstance(value, int) else "fp32"
            if isinstance(value, int) and value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    options = {"num_warps": launch.num_warps, "enable_fp_fusion": FP_FUSION}
    compiled = triton.compile(source, target=target, options=options)
    shared = compiled.metadata.shared
    pointers = [name for name in launch.kernel.arg_names if signature[name] != "constexpr"]
    occupancy = None
    if target.backend == "cuda":
        registers, spills = _resources(compiled.asm["cubin"])
        loads, stores = _nvidia_widths(compiled.asm["ptx"], pointers, large)
        warps, memory = LIMITS[target.arch]
        by_registers = 65536 // (-(-registers // 8) * 8 * 32 * launch.num_warps)
        by_shared = memory // (shared + 1024) if shared else by_registers
        occupancy = min(warps // launch.num_warps, by_registers, by_shared) * launch.num_warps / warps
    else:
        text = compiled.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])
        spills = sum(int(n) for n in re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", text))
        loads, stores = ({"all": _amd_width(text, kind)} for kind in ("load", "store"))
    return Compiled(case, launch.kernel.__name__, target_name, registers, spills, shared, occupancy, loads, stores)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes of stack and local memory: what is spilled, and arrays that found no registers."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return numbers["REG"], numbers["STACK"] + numbers["LOCAL"]


def _nvidia_widths(ptx: str, arguments: list[str], large: dict[str, Any]) -> tuple[dict[str, int], dict[str, int]]:
    """The widest load and store, in bits, of each of the ``large`` arguments."""
    lines = [line.strip().rstrip(";") for line in ptx.splitlines()]
    origins: dict[str, set[int]] = defaultdict(set)
    instructions = []
    for line in lines:
        line = re.sub(r"^@!?%p\d+\s+", "", line)
        if found := re.match(r"ld\.param\.\w+\s+(%\w+), \[\w+_param_(\d+)\]", line):
            origins[found[1]].add(int(found[2]))
        elif found := re.match(r"(mov|add|sub|mad|shl|cvta|selp|or|and)\S*\s+(%rd\d+), (.*)", line):
            instructions.append((found[2], re.findall(r"%rd\d+", found[3])))
    changed = True
    while changed:  # loops carry addresses round: go on until nothing is new
        changed = False
        for result, operands in instructions:
            before = len(origins[result])
            for operand in operands:
                origins[result] |= origins[operand]
            changed |= len(origins[result]) > before
    widths: dict[str, dict[str, int]] = {"ld": {}, "st": {}}
    for line in lines:
        found = re.search(r"\b(ld|st)\.global(?:\.[\w:]+)*?(?:\.v(\d))?\.[busf](\d+)\s+(.*)", line)
        if not found:
            continue
        kind, lanes, bits, rest = found[1], int(found[2] or 1), int(found[3]), found[4]
        address = re.search(r"\[\s*(%rd\d+)", rest)[1]
        for index in origins[address]:
            name = arguments[index] if index < len(arguments) else None
            if name in large:
                widths[kind][name] = max(widths[kind].get(name, 0), lanes * bits)
    return widths["ld"], widths["st"]


def _amd_width(text: str, kind: str) -> int:
    """The widest global ``kind`` (load or store) in bits."""
    sizes = {"byte": 8, "ubyte": 8, "u8": 8, "b8": 8, "short": 16, "ushort": 16, "b16": 16, "u16": 16, "d16": 16}
    sizes |= {"dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128, "b32": 32, "b64": 64, "b96": 96, "b128": 128}
    found = re.findall(rf"(?:global|buffer|flat)_{kind}_(\w+)", text)
    return max((sizes.get(name.split("_")[0], 0) for name in found), default=0)


def _compile(work: tuple[Case, str]) -> list[Compiled]:
    case, target = work
    return [compile_launch(case.name, launch, target) for launch in case.launches()]


def compile_all(recipe: Recipe, dtype: torch.dtype, targets: list[str], log: Any = None) -> list[Compiled]:
    """Every distinct launch of ``recipe`` on every target, with all cores."""
    work = [(case, target) for target in targets for case in recipe_cases(recipe, dtype)]
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        return [compiled for several in pool.map(_compile, work) for compiled in several]


def problems(compiled: Compiled) -> list[str]:
    """What is not as it must be: a spill; on NVIDIA a large tensor, the uint8 data set excepted, that is not accessed by 128 bits."""
    found = [f"{compiled.spills} bytes spilled"] if compiled.spills else []
    if compiled.target.startswith("sm_"):
        for what, widths in (("loads", compiled.loads), ("stores", compiled.stores)):
            found += [f"{what} of {name} are {bits} bits wide" for name, bits in widths.items() if bits < 128 and name != "images"]
    return [f"{compiled.case}, {compiled.kernel}, {compiled.target}: {problem}" for problem in found]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16", "float32"))
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS), metavar="TARGET", help=", ".join(TARGETS))
    args = parser.parse_args()
    if interpreted():
        print("error: TRITON_INTERPRET=1 is set, under which nothing is compiled; unset it", file=sys.stderr)
        return 2
    rows = compile_all(Recipe(), getattr(torch, args.dtype), args.targets)
    print(f"triton {triton.__version__}, {args.dtype}, batch {Recipe().batch_size}; widths: each large tensor's widest access in bits")
    print(f"{'case':24s} {'kernel':26s} {'target':8s} {'regs':>4s} {'spill':>5s} {'shared':>6s} {'occup.':>6s}  loads; stores")
    for row in rows:
        share = "" if row.occupancy is None else f"{row.occupancy:.0%}"
        widths = "; ".join(", ".join(f"{name} {bits}" for name, bits in side.items()) for side in (row.loads, row.stores))
        print(f"{row.case:24s} {row.kernel:26s} {row.target:8s} {row.registers:4d} {row.spills:5d} {row.shared:6d} {share:>6s}  {widths}")
    wrong = [problem for row in rows for problem in problems(row)]
    print("\n".join(wrong) or "no spills, and 128 bits wherever a large tensor is read or written")
    if args.json:
        args.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
