"""Speed of training on one GPU, against other frameworks, in one short run:

    python tools/bench/accelerator.py --limit 480 --out FOLDER [--cells FOLDER --weights FILE] [--dry-run]

Rows come by priority, each printed as soon as it is measured; when the limit nears, what is left is named and left out.
Each row is a process of its own, since a JAX process takes most of a card's memory. A row: four batches on the device,
taken in turn; the first step (compiling), 5 steps of warm-up, 30 timed with one wait at their end. bmjax's own loop on
rendered cells comes after the first two networks' rows; the first row again at the end, for the spread. What fails is a
row with its reason. OUT/rows.jsonl holds every row, OUT/<row>.log what its process said; with `--go-on` a second call
measures what the first had no time for.

`--dry-run` is the same plan with tiny networks and batches on whatever is there: it shows that every row runs, and its
figures mean nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import contenders
from contenders import FORMS, MAKERS, Job, Stepper, Unavailable

ROOT = Path(__file__).resolve().parents[2]
LABELS = {
    "bmjax": "bmjax, jit",
    "bmjax_pmap": "bmjax, pmap",
    "bmjax_in_place": "bmjax, in-place dense block",
    "bmjax_remat": "bmjax, dense block by remat",
    "bmjax_taps": "bmjax, depthwise by shifted sums",
    "flax": "plain Flax",
    "keras_jax": "Keras on JAX",
    "timm": "timm, channels-last",
    "timm_compiled": "timm, torch.compile",
    "loop": "bmjax's loop",
    "check": "tools/check.py --accelerator",
    "cells": "real cells",
}
MAIN = ("bmjax", "flax", "timm")
WARM_UP, TIMED = 5, 30
LONGEST = 170.0
"""Seconds after which a row's process is ended."""
LEAST = 20.0
"""Seconds that must be left for a row to begin."""
AGAIN = 30.0
"""Seconds kept for the first row's repetition, whose program is compiled by then."""
PARTS = ("rows", "check", "cells")
HEADER = (
    "network",
    "contender",
    "type",
    "batch",
    "images/s",
    "bmjax is faster by",
    "peak GB",
    "first step, s",
    "row, s",
)


def plan(dry: bool) -> list[Job]:
    """All measured rows, by priority."""
    dense, res = ("densenet121", 224, 256), ("resnet50", 224, 256)
    wide, compiled = ("bmjax", "bmjax_taps", "flax", "timm", "timm_compiled"), ("timm_compiled",)
    rows: list[tuple[tuple[str, int, int], str, tuple[str, ...]]] = [
        (dense, "bfloat16", MAIN),
        (res, "bfloat16", MAIN),
        # Compiled by torch, a network takes minutes until its first step.
        (dense, "bfloat16", compiled),
        (res, "bfloat16", compiled),
        (dense, "bfloat16", ("bmjax_in_place", "bmjax_remat")),
        (dense, "float32", MAIN),
        (res, "float32", MAIN),
        (("mobilenet_v2", 224, 256), "bfloat16", wide),
        (("xception", 224, 256), "bfloat16", wide),
        (("efficientnetb5", 224, 128), "bfloat16", wide),
        (dense, "bfloat16", ("bmjax_pmap", "keras_jax")),
        (("mobilenet_v2", 224, 256), "bfloat16", ("keras_jax",)),
        # At the sizes of timm's public figures; 456 pixels of 128 images would not fit 80 GB.
        (("xception", 299, 256), "bfloat16", ("bmjax", "timm")),
        (("efficientnetb5", 456, 32), "bfloat16", ("bmjax", "timm")),
    ]
    jobs = [Job(who, name, kind, size, batch) for (name, size, batch), kind, all_ in rows for who in all_]
    if not dry:
        return jobs
    return [dataclasses.replace(j, size=48 if j.size == 224 else 64, batch=8, dry=True) for j in jobs]


def measure(stepper: Stepper, job: Job) -> dict[str, Any]:
    """{"images_per_second", "first_seconds", "peak_bytes"} of a contender."""
    warm_up, timed = (1, 2) if job.dry else (WARM_UP, TIMED)
    began = time.perf_counter()
    stepper.wait(stepper.step(0))
    first = time.perf_counter() - began
    last = None
    for k in range(warm_up):
        last = stepper.step(k)
    stepper.wait(last)
    began = time.perf_counter()
    for k in range(timed):
        last = stepper.step(k)
    stepper.wait(last)
    rate = timed * job.batch / (time.perf_counter() - began)
    return {"images_per_second": rate, "first_seconds": first, "peak_bytes": stepper.peak()}


def work(job: Job) -> None:
    """What a row's process does; its last line is the row as JSON."""
    try:
        found = contenders.run_loop(job) if job.contender == "loop" else measure(MAKERS[job.contender](job), job)
    except Unavailable as reason:
        found = {"unavailable": str(reason)}
    print("\n" + json.dumps(found), flush=True)


def environment(job: Job, cache: Path) -> dict[str, str]:
    """The process's environment: programs compiled once in this run are kept for the first row's repetition."""
    own = {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", "KERAS_BACKEND": "jax"}
    own |= {"JAX_COMPILATION_CACHE_DIR": str(cache), "WANDB_MODE": "disabled", "TQDM_DISABLE": "1"}
    own |= {"BMJAX_FORMS": FORMS.get(job.contender, ""), "JAX_TRACEBACK_FILTERING": "off"}
    if job.dry:  # compiles quickly, and builds nothing
        own |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "true", "BMJAX_NATIVE": "0"}
    return os.environ | own


def reason_of(text: str, code: int) -> str:
    """Why a process failed, in one line: out of memory, or the last thing it said."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for mark in ("RESOURCE_EXHAUSTED", "OutOfMemoryError", "out of memory"):
        if any(mark in line for line in lines):
            return "out of memory"
    return f"exit {code}: {lines[-1][:160]}" if lines else f"exit {code}, and it said nothing"


def run_process(command: Sequence[str], env: dict[str, str], log: Path, seconds: float) -> tuple[int | None, str]:
    """(exit status, or None where it ran out of time; what it said), which is written to the log too."""
    with log.open("w") as out:
        # In a group of its own: what it starts, as torch.compile does, is ended with it.
        process = subprocess.Popen(
            command, env=env, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | None = process.wait(timeout=max(seconds, 1.0))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = None
    return code, log.read_text(errors="replace")


class Report:
    """The rows so far: printed, kept in rows.jsonl, and what the first of a network's is for the ratios."""

    def __init__(self, folder: Path, limit: float):
        self.folder, self._limit, self._began = folder, limit, time.monotonic()
        self._rates: dict[tuple[str, str, int, int], float] = {}
        self._known: dict[Job, dict[str, Any]] = {}

    def go_on(self) -> None:
        """Takes the measured rows of an earlier run in the same folder as known."""
        path, names = self.folder / "rows.jsonl", {field.name for field in dataclasses.fields(Job)}
        for record in map(json.loads, path.read_text().splitlines() if path.exists() else ()):
            if "images_per_second" in record:
                job = Job(**{name: value for name, value in record.items() if name in names})
                self._known[job] = {name: value for name, value in record.items() if name not in names}

    def known(self, job: Job) -> dict[str, Any] | None:
        """A row that was measured before, printed once more."""
        if (found := self._known.get(job)) is not None:
            self._print(job, found, found["row_seconds"])
        return found

    def left(self) -> float:
        """Seconds until the limit."""
        return self._limit - (time.monotonic() - self._began)

    def say(self, *cells: str) -> None:
        """Prints a line of the table."""
        print(f"| {' | '.join(cells)} |", flush=True)

    def header(self) -> None:
        """Begins the table."""
        self.say(*HEADER)
        self.say(*("---" for _ in HEADER))

    def row(self, job: Job, found: dict[str, Any], took: float) -> None:
        """Prints a row and writes it down; what failed has a reason instead of figures."""
        record = dataclasses.asdict(job) | {"network": job.network, "row_seconds": took} | found
        with (self.folder / "rows.jsonl").open("a") as f:
            f.write(json.dumps(record) + "\n")
        self._print(job, found, took)

    def _print(self, job: Job, found: dict[str, Any], took: float) -> None:
        label = LABELS[job.contender] + (", again" if job.repeat else "")
        kind = "TF32" if job.dtype == "float32" else "bf16"
        head = (f"{job.network} {job.size}", label, kind, str(job.batch))
        if "images_per_second" not in found:
            self.say(*head, next(f"{k}: {v}" for k, v in found.items()), "", "", "", f"{took:.0f}")
            return
        rate = found["images_per_second"]
        what = (job.backbone, job.dtype, job.size, job.batch)
        if job.contender == "bmjax":
            self._rates.setdefault(what, rate)
        ours = self._rates.get(what)
        ratio = "" if ours is None else f"{ours / rate:.2f}x"
        peak = "" if found.get("peak_bytes") is None else f"{found['peak_bytes'] / 1e9:.2f}"
        self.say(*head, f"{rate:,.1f}", ratio, peak, f"{found['first_seconds']:.1f}", f"{took:.0f}")


def run_job(job: Job, report: Report, cache: Path, keep: float = 0.0) -> dict[str, Any]:
    """Runs a row in a process of its own and reports it; `keep` seconds are kept for what must come after it."""
    if not job.repeat and (known := report.known(job)) is not None:
        return known
    seconds = min(LONGEST, report.left() - keep)
    if seconds < LEAST:
        found: dict[str, Any] = {"left out": "no time"}
        report.row(job, found, 0.0)
        return found
    began = time.monotonic()
    name = f"{job.contender}-{job.network}-{job.dtype}-{job.size}{'-again' if job.repeat else ''}"
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", json.dumps(dataclasses.asdict(job))]
    code, text = run_process(command, environment(job, cache), report.folder / f"{name}.log", seconds)
    if code is None:
        found = {"failed": f"not done after {seconds:.0f} s"}
    elif code:
        found = {"failed": reason_of(text, code)}
    else:
        answers = [line for line in text.splitlines() if line.startswith("{")]
        found = json.loads(answers[-1]) if answers else {"failed": "it gave no answer"}
    report.row(job, found, time.monotonic() - began)
    return found


def run_command(name: str, command: Sequence[str], report: Report, env: dict[str, str], passes: str) -> None:
    """Runs one of the project's own programs as a last row, and prints its last line or why it failed."""
    seconds = report.left()
    if seconds < LEAST:
        print(f"\n{LABELS[name]}: left out, no time", flush=True)
        return
    began = time.monotonic()
    code, text = run_process(command, env, report.folder / f"{name}.log", seconds)
    lines = [line for line in text.splitlines() if line.strip()]
    said = [line for line in lines if passes in line][-3:] or lines[-1:]
    verdict = {0: "done", None: f"not done after {seconds:.0f} s"}.get(code, f"failed, exit {code}")
    with (report.folder / "rows.jsonl").open("a") as f:
        f.write(json.dumps({"contender": name, "exit": code, "said": said}) + "\n")
    print(f"\n{LABELS[name]}: {verdict} in {time.monotonic() - began:.0f} s", *said, sep="\n  ", flush=True)


def versions() -> str:
    found = []
    for name in ("jax", "flax", "keras", "torch", "timm"):
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"no {name}")
    return f"Python {platform.python_version()}, {', '.join(found)}"


def card() -> str:
    """Name, driver, clock and memory of the first card as nvidia-smi says; else that there is none."""
    if shutil.which("nvidia-smi") is None:
        return f"no NVIDIA card: {platform.machine()}, {os.cpu_count()} CPUs"
    query = [
        "nvidia-smi",
        "--query-gpu=name,driver_version,clocks.sm,clocks.max.sm,memory.total",
        "--format=csv,noheader",
    ]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    return done.stdout.strip() or f"nvidia-smi failed: {done.stderr.strip()[:160]}"


def cells_command(options: argparse.Namespace, folder: Path) -> list[str]:
    """The experiment on real cells, from their folder and the weights' file."""
    best = ROOT / "experiments/bm7_best.py"
    experiment = best if best.exists() else ROOT / "experiments/bm7_densenet.py"
    command = [sys.executable, "-m", "bmjax", "train", str(experiment)]
    command += ["--data.root", str(Path(options.cells).resolve())]
    command += ["--run_dir", str(folder / "cells_run"), "--data.cache_dir", str(folder / "cells_cache")]
    command += ["--train.dtype", "bfloat16", "--train.workers", "8"]
    return [*command, "--model.weights", str(Path(options.weights).resolve())] if options.weights else command


def measured(options: argparse.Namespace, report: Report, cache: Path) -> None:
    """The rows by priority, with bmjax's loop after the first network's and the first row again at the end."""
    jobs = [j for j in plan(options.dry_run) if not options.only or j.backbone in options.only]
    jobs = [j for j in jobs if not options.contenders or j.contender in options.contenders]
    first, early = jobs[0], 2 * len(MAIN)
    report.header()
    base = run_job(first, report, cache)
    for job in jobs[1:early]:
        run_job(job, report, cache, keep=AGAIN)
    loop = run_job(dataclasses.replace(first, contender="loop"), report, cache, keep=AGAIN)
    for job in jobs[early:]:
        run_job(job, report, cache, keep=AGAIN)
    again = run_job(dataclasses.replace(first, repeat=True), report, cache)
    rates = [found["images_per_second"] for found in (base, again) if "images_per_second" in found]
    if len(rates) == 2:
        print(f"\nspread of the first row: {abs(rates[0] - rates[1]) / max(rates):.1%}", flush=True)
    if rates and "images_per_second" in loop:
        bare, whole = sum(rates) / len(rates), loop["images_per_second_whole_epochs"]
        said = f"the loop: {loop['images_per_second'] / bare:.2f} of the bare step within epochs (at least 0.90), "
        print(f"{said}{whole / bare:.2f} with evaluation and checkpoints", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=float, default=480.0, help="seconds after which nothing more is begun")
    parser.add_argument("--out", default="runs/accelerator", help="folder of rows.jsonl and the logs")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to do, in this order")
    parser.add_argument("--only", nargs="+", choices=contenders.TIMM, help="rows of these networks alone")
    parser.add_argument("--contenders", nargs="+", choices=MAKERS, help="these contenders alone")
    parser.add_argument("--cells", help="folder of real cells, one sub-folder a class: trains on them at the end")
    parser.add_argument("--weights", help="file of ImageNet weights for that")
    parser.add_argument("--go-on", action="store_true", help="measure only rows that OUT/rows.jsonl does not have yet")
    parser.add_argument("--dry-run", action="store_true", help="tiny networks and batches: shows that every row runs")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(Job(**json.loads(options.worker)))
        return
    folder = Path(options.out).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    report, cache = Report(folder, options.limit), folder / "compiled"
    if options.go_on:
        report.go_on()
    print(f"{'DRY RUN: tiny networks, the figures mean nothing. ' if options.dry_run else ''}{card()}\n{versions()}\n")
    if "rows" in options.parts:
        measured(options, report, cache)
    env = environment(Job("bmjax", dry=options.dry_run), cache)
    if "check" in options.parts:
        fewer = ["-k", "cbam or pmap"] if options.dry_run else []
        command = [sys.executable, str(ROOT / "tools/check.py"), "--accelerator", *fewer]
        run_command("check", command, report, env, " passed")
    if "cells" in options.parts and options.cells:
        run_command("cells", cells_command(options, folder), report, env, "accuracy")
    print(f"\n{options.limit - report.left():.0f} s in all", flush=True)


if __name__ == "__main__":
    main()
