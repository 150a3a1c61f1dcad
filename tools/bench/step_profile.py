"""Where the time of bmjax's train step, or of its inference, goes on a CPU, by kind of operation.

    python tools/bench/step_profile.py [--backbone resnet50 xception] [--mode train] [--batch 16] [--cpus 1]

On one CPU unless told otherwise: operations then follow one another, so their times add up to the step's. Each
operation of XLA's program is counted by what it is: one of bmjax's kernels, a matrix product, a sum, a copy, or what
XLA computes element by element. `--longest 12` also prints the operations that take longest. Prints Markdown tables.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import tempfile
import time
from pathlib import Path

STEPS = 2
# Of a program's text: the name of an operation, and its line.
OPERATION = re.compile(r"^\s*(?:ROOT )?%(\S+) = (.*)$", re.MULTILINE)


def kind(line: str) -> str:
    """What an operation is, by its line of the program's text."""
    if target := re.search(r'custom_call_target="(\w+)"', line):
        return f"kernel `{target[1].removeprefix('bmjax_')}`"
    named = re.search(r'op_name="([^"]*)"', line)
    last = named[1].rsplit("/", 1)[-1] if named else ""
    if " dot(" in line or last == "dot_general":
        return "matrix products"
    if " convolution(" in line or last == "conv_general_dilated":
        return "XLA's convolutions"
    if re.search(r" (copy|transpose)\(", line) or last == "transpose":
        return "copies"
    if " reduce(" in line or last.startswith("reduce"):
        return "sums"
    return "element by element"


def part(line: str) -> str:
    """Of which part of a step an operation is."""
    named = re.search(r'op_name="([^"]*)"', line)
    if named is None or "jvp(" not in named[1]:
        return "rest"
    return "backward" if "transpose(jvp(" in named[1] else "forward"


def times(folder: str, names: set[str]) -> dict[str, float]:
    """Milliseconds of each of the operations in a trace's folder."""
    from jax.profiler import ProfileData

    found: dict[str, float] = {}
    for path in Path(folder).rglob("*.xplane.pb"):
        for plane in ProfileData.from_file(str(path)).planes:
            for line in plane.lines:
                for event in line.events:
                    if event.name in names:
                        found[event.name] = found.get(event.name, 0) + event.duration_ns / 1e6
    return found


def profile(backbone: str, mode: str, batch: int, size: int, longest: int) -> None:
    """Prints the table of one network."""
    import contenders
    import jax

    make = contenders.bmjax_stepper if mode == "train" else contenders.bmjax_predictor
    stepper = make(contenders.Job("bmjax", backbone, dtype="float32", size=size, batch=batch))
    for k in range(2):
        stepper.wait(stepper.step(k))
    began = time.perf_counter()
    stepper.wait(stepper.step(0))
    whole = 1e3 * (time.perf_counter() - began)
    text = (stepper.program and stepper.program()) or ""
    # What only holds others is left out, for those are counted themselves.
    lines = {
        name: line for name, line in OPERATION.findall(text) if not re.search(r" (while|call|conditional)\(", line)
    }
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for k in range(STEPS):
                stepper.wait(stepper.step(k))
        found = times(folder, set(lines))
    table: dict[str, dict[str, float]] = {}
    for name, taken in found.items():
        row = table.setdefault(kind(lines[name]), dict.fromkeys(("forward", "backward", "rest"), 0.0))
        row[part(lines[name])] += taken / STEPS
    total = sum(sum(row.values()) for row in table.values())
    print(f"{backbone}, {mode}, {size}x{size}, float32, batch {batch}: {whole:.0f} ms, {total:.0f} ms traced\n")
    parts = {"forward": "forward, ms", "backward": "backward, ms", "rest": "optimizer and rest, ms"}
    parts = parts if mode == "train" else {"rest": "ms"}
    print(f"| operations | {' | '.join(parts.values())} | share |")
    print("|---" * (len(parts) + 2) + "|")
    for name, row in sorted(table.items(), key=lambda item: -sum(item[1].values())):
        print(
            f"| {name} | {' | '.join(f'{row[key]:.0f}' for key in parts)} | {100 * sum(row.values()) / total:.0f} % |"
        )
    print()
    for name, taken in sorted(found.items(), key=lambda item: -item[1])[:longest]:
        print(f"{taken / STEPS:8.1f} ms  {name} = {lines[name][:400]}")
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", nargs="+", default=["resnet50", "xception"])
    parser.add_argument("--mode", choices=("train", "inference"), default="train")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--cpus", type=int, default=1)
    parser.add_argument("--longest", type=int, default=0, help="also print so many operations, the longest first")
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cpus])
    print(f"{platform.machine()}, {args.cpus} CPUs, Python {platform.python_version()}\n")
    for backbone in args.backbone:
        profile(backbone, args.mode, args.batch, args.size, args.longest)


if __name__ == "__main__":
    main()
