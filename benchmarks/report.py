"""``python -m benchmarks.report [--check]``: tables of what was measured, and the README's performance section made of them.

:func:`write_report` turns a folder's ``results.json`` into ``results.md`` and pictures. The command puts the tables of
every folder in ``benchmarks/results/`` that has a ``results.json`` between the README's two markers, newest first; with
``--check`` it changes nothing and exits with 1 where the README says otherwise.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.predict import markdown
from cifar_fast.files import replacing

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- measured: made by python -m benchmarks.report -->", "<!-- end of what was measured -->"
Results = dict[str, Any]


def ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.3f}" if seconds < 0.1 else f"{1e3 * seconds:,.0f}"


def spread(row: Results, show: Callable[[float], str]) -> str:
    """Median, and the least to the most."""
    return f"{show(row['median'])} ({show(row['min'])} to {show(row['max'])})"


def ratio(values: list[float], others: list[float]) -> str:
    """Turn by turn: median, and the least to the most."""
    ratios = sorted(a / b for a, b in zip(values, others))
    middle = len(ratios) // 2
    median = ratios[middle] if len(ratios) % 2 else (ratios[middle - 1] + ratios[middle]) / 2
    return f"{median:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


def ceilings(part: Results, results: Results) -> str:
    rates = "; ".join(
        f"{name} {part[key] / 1e9:,.0f} {unit}" + (" ({:,.0f} to {:,.0f})".format(*(x / 1e9 for x in part[f"{key}_range"])))
        for name, key, unit in (("copy", "bandwidth", "GB/s"), ("matrix product", "flops", "GFLOP/s"))
    )
    return (
        f"Ceilings of this machine, {results['settings']['dtype']}: {rates}. A step is {part['step_flop'] / 1e12:.2f} TFLOP and at least "
        f"{part['step_bytes'] / 1e9:.2f} GB: {ms(part['step_floor'])} ms of arithmetic, {ms(part['step_floor_no_overlap'])} ms if nothing "
        f"overlaps; {part['run_floor']:,.1f} and {part['run_floor_no_overlap']:,.1f} s for {part['steps']:,} steps. "
        "Floors are computed, not timed."
    )


def parity(part: Results, results: Results) -> str:
    verdict = "within" if part["within"] else "PAST"
    return (
        f"Parity: `cifar_fast.compare {part['flags']}`, fused against eager: {verdict} the tolerance of {part['tolerance']:g} times "
        f"eager's own difference; the median of {part['n']} ratios is {part['median_ratio']:.2f}."
    )


def cpu(part: Results, results: Results) -> str:
    sides, batch = part["seconds"], part["batch_size"]
    rows = []
    for what, title in (("step", "a step"), ("augment", "an epoch's augmentation")):
        ours = [turn[what] for turn in sides["ours"]]
        for name, turns in sides.items():
            seconds = sorted(turn[what] for turn in turns)
            row = dict(median=seconds[len(seconds) // 2] if len(seconds) % 2 else sum(seconds[len(seconds) // 2 - 1 :][:2]) / 2)
            row |= dict(min=seconds[0], max=seconds[-1])
            rows.append((f"{title}, {name}", spread(row, lambda x: f"{x:#.3g}"), ratio([turn[what] for turn in turns], ours)))
    step = sorted(turn["step"] for turn in sides["ours"])[len(sides["ours"]) // 2]
    flop = results["parts"].get("ceilings", {}).get("result", {}).get("step_flop", 1.1633e12)
    table = markdown((f"batch {batch}", "seconds", "times ours, turn by turn"), rows, 1)
    return (
        f"{table}\n\nOurs includes its augmentation in the step. In the same run a 4096 x 4096 x 4096 bfloat16 product "
        f"reached {part['matrix_flops'] / 1e9:,.0f} GFLOP/s; our step reaches {flop / step / 1e9:,.0f}, "
        f"{flop / step / part['matrix_flops']:.0%} of it."
    )


def kernels(part: Results, results: Results) -> str:
    header = ("kernel", "side", "us in a loop", "us cold", "GB/s", "of the copy bandwidth", "launches")
    rows = []
    for row in sorted(part["rows"], key=lambda row: row["case"]):  # a case's implementations together
        cells = f"{row['seconds'] * 1e6:.1f}", f"{row['cold_seconds'] * 1e6:.1f}", f"{row['gbps']:,.0f}", f"{row['percent_of_copy']:.0f} %"
        rows.append((row["case"], row["implementation"], *cells, str(row["launches"] if row["launches"] is not None else "-")))
    lost = ["Not given, for its result was wrong: {case}, {implementation} ({why}).".format(**row) for row in part["wrong"]] + [
        "Cut short."
    ] * part["cut_short"]
    return "\n\n".join([markdown(header, rows, 2), *lost])


def steps(part: Results, results: Results) -> str:
    header = ("backend", "ms a step", "times the last", "TFLOP/s", "floor / step", "no-overlap floor / step", "launches", "gaps ms")
    names, rows = list(part), []
    reference = part[[name for name in names if not name.endswith("again")][-1]]["values"]
    for name, row in part.items():
        lines = row.get("profile", [])
        launches = f"{sum(line['launches'] for line in lines):.0f}" if lines else "-"
        gaps = next((f"{line['milliseconds']:.3f}" for line in lines if line["line"] == "gaps"), "-")
        shares = f"{row['share_of_floor']:.0%}", f"{row['share_of_floor_no_overlap']:.0%}"
        rows.append((name, spread(row, ms), ratio(row["values"], reference), f"{row['flops'] / 1e12:,.2f}", *shares, launches, gaps))
    texts = [markdown(header, rows, 1)]
    profiled = {name: row for name, row in part.items() if "profile" in row}
    kinds = list(dict.fromkeys(line["line"] for row in profiled.values() for line in row["profile"]))
    table = []
    for kind in kinds:
        found = [next((line for line in row["profile"] if line["line"] == kind), None) for row in profiled.values()]
        table.append((kind, *(f"{line['milliseconds']:,.3f}" if line else "-" for line in found)))
    table.append(("the step, profiled", *(f"{row['profiled_step_ms']:,.3f}" for row in profiled.values())))
    texts.append("Where a step's milliseconds go, the profiler's own cost included:")
    texts.append(markdown(("", *profiled), table, 1))
    return "\n\n".join(texts)


def trainings(part: Results, results: Results) -> str:
    rows = []
    for name, row in part.items():
        seconds, accuracy = row["seconds"], row["accuracy"]
        interval = "{:.2f} to {:.2f}".format(*accuracy["ci95"]) if accuracy["ci95"] else "-"
        figures = (f"{seconds[key]:.2f}" if seconds[key] is not None else "-" for key in ("median", "mean", "min", "std"))
        rows.append((name, str(seconds["n"]), *figures, f"{accuracy['mean']:.2f}", interval))
    return markdown(("", "n", "seconds, median", "mean", "least", "deviation", "accuracy %", "95 % interval"), rows, 1)


def convolutions(part: Results, results: Results) -> str:
    header = ("convolution", "pass", "ms", "TFLOP/s")
    rows = [
        (
            "{}: {} to {}, {size} x {size}".format(row["layer"], *row["channels"], **row),
            row["name"],
            spread(row, ms),
            f"{row['flops'] / 1e12:.2f}",
        )
        for row in part["rows"]
    ]
    return markdown(header, rows, 2)


def peers(part: Results, results: Results) -> str:
    rows = [
        (
            name,
            f"{row['own_clock']['median']:.2f}",
            f"{row['our_clock']['median']:.2f}",
            f"{row['accuracy']['mean']:.2f}",
            str(row["accuracy"]["n"]),
        )
        for name, row in part.items()
    ]
    return markdown(("another network and recipe", "its clock s", "our clock s", "accuracy %", "n"), rows, 1)


def memory(part: Results, results: Results) -> str:
    rows = [(name, f"{row['allocated'] / 1e9:.2f}", f"{row['reserved'] / 1e9:.2f}") for name, row in part.items()]
    return markdown(("backend", "allocated GB at the peak", "reserved GB"), rows, 1)


def _sweep(what: str) -> Callable[[Results, Results], str]:
    def table(part: Results, results: Results) -> str:
        rows = [
            (name, spread(row, ms), f"{row['pictures_a_second']:,.0f}", f"{row['flops'] / 1e12:.2f}") for name, row in part["rows"].items()
        ]
        return markdown((f"{what}, {part['backend']}", "ms a step", "pictures a second", "TFLOP/s"), rows, 1)

    return table


def epochs(part: Results, results: Results) -> str:
    rows = [
        (name, f"{row['seconds']['median']:.2f}", f"{row['accuracy']['mean']:.2f}", str(row["accuracy"]["n"])) for name, row in part.items()
    ]
    return markdown(("epochs", "seconds", "accuracy %", "n"), rows, 1)


TABLES: dict[str, tuple[str, Callable[[Results, Results], str]]] = {
    "ceilings": ("Ceilings and floors", ceilings),
    "parity": ("Parity", parity),
    "cpu": ("Beside the reference on this CPU, in turn", cpu),
    "steps": ("A training step", steps),
    "trainings": ("Whole trainings, in turn", trainings),
    "kernels": ("Kernels", kernels),
    "convolutions": ("Each convolution alone", convolutions),
    "peers": ("Peers", peers),
    "memory": ("Memory", memory),
    "batch_sizes": ("Batch size", _sweep("batch size")),
    "widths": ("Width", _sweep("widths")),
    "epochs": ("Epochs", epochs),
}


def report(results: Results, level: int = 2) -> str:
    """Every table of ``results`` in Markdown, under headings from ``level`` on; what was not measured is named with its reason."""
    facts, parts = results["environment"], results["parts"]
    versions = ", ".join(f"{name} {facts[name]}" for name in ("torch", "triton", "cuda", "cudnn", "python") if facts.get(name))
    settings = results["settings"]
    title = f"{'#' * level} {facts['device_name']}, {facts['threads']} threads"
    about = f"{versions}; {settings['dtype']}; pictures: {settings['dataset']['name']}. Medians, in brackets the least to the most."
    blocks = [title, about]
    for name, (heading, table) in TABLES.items():
        if "result" in parts.get(name, {}):
            blocks += [f"{'#' * (level + 1)} {heading}", table(parts[name]["result"], results)]
    missing = [f"{name} ({part.get('skipped') or part['failed']})" for name, part in parts.items() if "result" not in part]
    missing += [f"{name} (not run)" for name in TABLES if name not in parts]
    if missing:
        blocks.append(f"Not measured here: {'; '.join(missing)}.")
    return "\n\n".join(blocks)


def write_report(folder: Path) -> None:
    """``results.md`` and the pictures, from the ``results.json`` of ``folder``."""
    results = json.loads((folder / "results.json").read_text())
    with replacing(folder / "results.md") as draft:
        draft.write_text(report(results) + "\n")
    parts = {name: part["result"] for name, part in results["parts"].items() if "result" in part}
    if "steps" in parts:
        with replacing(folder / "steps.png") as draft:
            draw_steps(parts["steps"], draft)
    if "ceilings" in parts and "convolutions" in parts:
        with replacing(folder / "roofline.png") as draft:
            draw_roofline(parts, results, draft)


def draw_steps(part: Results, path: Path) -> None:
    """A bar a backend: where a step's time goes."""
    from matplotlib.figure import Figure

    bars = {name: row["profile"] for name, row in part.items() if "profile" in row}
    figure = Figure(figsize=(9, 2.5 + 0.7 * len(bars)), layout="constrained")
    axes = figure.subplots()
    kinds = list(dict.fromkeys(line["line"] for lines in bars.values() for line in lines))
    left = dict.fromkeys(bars, 0.0)
    for i, kind in enumerate(kinds):
        widths = [next((line["milliseconds"] for line in lines if line["line"] == kind), 0.0) for lines in bars.values()]
        axes.barh(list(bars), widths, left=list(left.values()), label=kind, color="0.85" if kind == "gaps" else f"C{i}")
        left = {name: start + width for (name, start), width in zip(left.items(), widths)}
    axes.set_xlabel("milliseconds a step, profiled")
    axes.invert_yaxis()
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    figure.savefig(path, format="png", dpi=120)


def draw_roofline(parts: Results, results: Results, path: Path) -> None:
    """The two ceilings and every convolution below them; beside them every kernel of ours, which the bandwidth alone bounds."""
    from matplotlib.figure import Figure

    limits = parts["ceilings"]
    element = 4 if results["settings"]["dtype"] == "float32" else 2
    batch = results["settings"]["recipe"]["batch_size"]
    ours = [row for row in parts.get("kernels", {}).get("rows", []) if row["implementation"] == "fused"]
    figure = Figure(figsize=(15 if ours else 8, 5), layout="constrained")
    axes, *others = figure.subplots(1, 1 + bool(ours), squeeze=False)[0]
    ridge = limits["flops"] / limits["bandwidth"]
    span = [0.1, ridge, max(4096, 4 * ridge)]
    axes.loglog(span, [min(x * limits["bandwidth"], limits["flops"]) for x in span], "k-", label="copy bandwidth, matrix rate")
    for name, marker in (("forward", "o"), ("data gradient", "s"), ("weight gradient", "^")):
        rows = [row for row in parts["convolutions"]["rows"] if row["name"] == name]
        moved = [element * (batch * sum(row["channels"]) * row["size"] ** 2 + 9 * row["channels"][0] * row["channels"][1]) for row in rows]
        axes.plot(
            [row["flop"] / count for row, count in zip(rows, moved)], [row["flops"] for row in rows], marker, label=f"convolutions, {name}"
        )
    for bars in others:  # no matrix unit works in these: their ceiling is the copy bandwidth
        bars.barh([row["case"] for row in ours], [row["percent_of_copy"] for row in ours], color="C3")
        bars.axvline(100, color="k")
        bars.set_xlabel("our kernels: per cent of the copy bandwidth")
        bars.tick_params(axis="y", labelsize=6)
    axes.set_xlabel("FLOP a byte")
    axes.set_ylabel("FLOP a second")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, format="png", dpi=120)


def section(folder: Path = RESULTS) -> str:
    """The README's performance section: every machine's tables, the newest folder first."""
    files = sorted(folder.glob("*/results.json"), reverse=True)
    blocks = [f"{report(json.loads(file.read_text()), 3)}\n\nAll figures: `benchmarks/results/{file.parent.name}/`." for file in files]
    return "\n\n".join(blocks)


def with_section(readme: str, text: str) -> str:
    """``readme`` with ``text`` between its markers."""
    before, found, rest = readme.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not (found and ended):
        raise SystemExit(f"error: the README lacks {BEGIN if not found else END}")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 where the README says otherwise")
    args = parser.parse_args(argv)
    readme = ROOT / "README.md"
    before = readme.read_text()
    after = with_section(before, section())
    if args.check:
        print("the README says what was measured" if after == before else "the README is not what benchmarks.report makes of the results")
        return int(after != before)
    for file in RESULTS.glob("*/results.json"):
        write_report(file.parent)
    with replacing(readme) as draft:
        draft.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
