"""Where the time of bmjax's train step, or of its inference, goes on a CPU, by kind of operation.

    python tools/bench/step_profile.py [--backbone resnet50 xception] [--mode train] [--batch 16] [--cpus 1]
    python tools/bench/step_profile.py --heads cbam scse

On one CPU unless told otherwise: operations then follow one another, so their times add up to the step's. Each
operation of XLA's program is counted by what it is: one of bmjax's kernels, a matrix product, a sum, a copy, or what
XLA computes element by element. `--heads` profiles heads on cached feature maps instead, as tools/bench/bench_heads.py
trains them: an epoch in one program, per step. `--longest 12` also prints the operations that take longest. Prints
Markdown tables.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

STEPS = 2
PARTS = {"forward": "forward, ms", "backward": "backward, ms", "rest": "optimizer and rest, ms"}
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

    make = contenders.bmjax_stepper if mode == "train" else contenders.bmjax_predictor
    stepper = make(contenders.Job("bmjax", backbone, dtype="float32", size=size, batch=batch))
    parts = PARTS if mode == "train" else {"rest": "ms"}
    show(stepper, STEPS, 1, f"{backbone}, {mode}, {size}x{size}, float32, batch {batch}", parts, longest)


def profile_head(variant: str, longest: int) -> None:
    """Prints the table of one head, per step."""
    import bench_heads
    import contenders

    setting = argparse.Namespace(variant=variant, images=1955, channels=1664, epochs=1)
    _, prepared = bench_heads.bmjax_setting(setting)
    import jax

    from bmjax.model.parameters import count_parameters

    programs = prepared.programs
    inputs = state, maps, *_ = bench_heads.epoch_inputs(prepared, 0)
    programs.epoch(0)(*inputs)  # here it is decided whether the epoch is one program
    if not programs.scans[0]:
        raise ValueError(f"--heads is {variant!r}, whose steps are programs of their own here; expected one program")
    epoch = jax.jit(programs.epoch(0)).lower(*inputs).compile()
    stepper = contenders.Stepper(lambda k: epoch(*inputs), jax.block_until_ready, lambda: None, epoch.as_text)
    batch = np.asarray(maps[: bench_heads.BATCH])
    copy, seconds = np.empty_like(batch), []
    for _ in range(20):
        began = time.perf_counter()
        np.copyto(copy, batch)
        seconds.append(time.perf_counter() - began)
    shape = "x".join(map(str, batch.shape))
    title = f"{variant}, on {shape} {'pooled ' if programs.pooled else ''}maps (a copy of them: "
    title += f"{1e3 * statistics.median(seconds):.2f} ms), {count_parameters(state.params) / 1e6:.1f} million weights"
    show(stepper, 1, programs.per_epoch, title, PARTS, longest)


def show(stepper: Any, calls: int, per_call: int, title: str, parts: dict[str, str], longest: int) -> None:
    """Prints where the time of `stepper` goes, in ms of a step, of so many calls that hold so many steps each."""
    import jax

    steps = calls * per_call
    for k in range(2):
        stepper.wait(stepper.step(k))
    began = time.perf_counter()
    stepper.wait(stepper.step(0))
    whole = 1e3 * (time.perf_counter() - began) / per_call
    text = (stepper.program and stepper.program()) or ""
    # What only holds others is left out, for those are counted themselves.
    lines = {
        name: line for name, line in OPERATION.findall(text) if not re.search(r" (while|call|conditional)\(", line)
    }
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for k in range(calls):
                stepper.wait(stepper.step(k))
        found = times(folder, set(lines))
    table: dict[str, dict[str, float]] = {}
    for name, taken in found.items():
        row = table.setdefault(kind(lines[name]), dict.fromkeys(PARTS, 0.0))
        row[part(lines[name])] += taken / steps
    total = sum(sum(row.values()) for row in table.values())
    digits = 0 if total > 100 else 2
    print(f"{title}: {whole:.{digits}f} ms, {total:.{digits}f} ms traced\n")
    print(f"| operations | {' | '.join(parts.values())} | share |")
    print("|---" * (len(parts) + 2) + "|")
    for name, row in sorted(table.items(), key=lambda item: -sum(item[1].values())):
        cells = " | ".join(f"{row[key]:.{digits}f}" for key in parts)
        print(f"| {name} | {cells} | {100 * sum(row.values()) / total:.0f} % |")
    print()
    for name, taken in sorted(found.items(), key=lambda item: -item[1])[:longest]:
        print(f"{taken / steps:8.{digits + 1}f} ms  {name} = {lines[name][:400]}")
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", nargs="+", default=["resnet50", "xception"])
    parser.add_argument("--heads", nargs="+", default=[], metavar="VARIANT", help="profile these instead")
    parser.add_argument("--mode", choices=("train", "inference"), default="train")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--cpus", type=int, default=1)
    parser.add_argument("--longest", type=int, default=0, help="also print so many operations, the longest first")
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cpus])
    print(f"{platform.machine()}, {args.cpus} CPUs, Python {platform.python_version()}\n")
    for variant in args.heads:
        profile_head(variant, args.longest)
    for backbone in () if args.heads else args.backbone:
        profile(backbone, args.mode, args.batch, args.size, args.longest)


if __name__ == "__main__":
    main()
