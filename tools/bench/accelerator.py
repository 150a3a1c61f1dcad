"""Speed of training on one GPU, against other frameworks, in one short run:

    python tools/bench/accelerator.py --limit 480 --out FOLDER [--cells FOLDER --weights FILE] [--dry-run]

Rows come by priority, each printed as soon as it is measured; when the limit nears, what is left is named and left out.
Each row is a process of its own. `--together` rows are compiled at a time, since that takes most of the time and mostly
the host's; then they are measured one by one, while nothing else uses the card. A row: four batches on the device,
taken in turn; 6 steps of warm-up, 30 timed with one wait at their end. bmjax's own loop on rendered cells comes after
the first two networks' rows; the first row again at the end, for the spread. What fails is a row with its reason.
OUT/rows.jsonl holds every row, OUT/<row>.log what its process said; with `--go-on` a second call measures what the
first had no time for. `--profile NETWORK` writes OUT/<row>.kernels.txt, the kernels of bmjax's step by their time.

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
    "bmjax_taps": "bmjax, all depthwise by shifted sums",
    "bmjax_depthwise": "bmjax, XLA's depthwise",
    "bmjax_dot": "bmjax, 1x1 convolutions as products",
    "bmjax_pool": "bmjax, XLA's pooling",
    "bmjax_dot_remat": "bmjax, products and remat",
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
LONGEST = 210.0
"""Seconds after which a row that is not compiled, or not measured, is ended."""
LEAST = 20.0
"""Seconds that must be left for rows to begin."""
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
    "compiled in, s",
)


def plan(dry: bool) -> list[Job]:
    """All measured rows, by priority."""
    dense, res = ("densenet121", 224, 256), ("resnet50", 224, 256)
    others = (("mobilenet_v2", 224, 256), ("xception", 224, 256), ("efficientnetb5", 224, 128))
    rows: list[tuple[tuple[str, int, int], str, tuple[str, ...]]] = [
        (dense, "bfloat16", MAIN),
        (res, "bfloat16", MAIN),
        # Compiled by torch, a network takes minutes until its first step.
        *((network, "bfloat16", ("timm_compiled",)) for network in (dense, res)),
        (dense, "bfloat16", ("bmjax_remat", "bmjax_dot", "bmjax_dot_remat")),
        (res, "bfloat16", ("bmjax_pool", "bmjax_dot")),
        *((network, "bfloat16", (*MAIN, "bmjax_depthwise", "bmjax_dot")) for network in others),
        *((network, "float32", MAIN) for network in (dense, res)),
        *((network, "bfloat16", ("timm_compiled",)) for network in others),
        (dense, "bfloat16", ("bmjax_in_place", "bmjax_pmap", "keras_jax")),
        (others[2], "bfloat16", ("bmjax_taps",)),
        (others[0], "bfloat16", ("keras_jax",)),
        # At the sizes of timm's public figures; 456 pixels of 128 images would not fit 80 GB.
        (("xception", 299, 256), "bfloat16", ("bmjax", "timm")),
        (("efficientnetb5", 456, 32), "bfloat16", ("bmjax", "timm")),
    ]
    jobs = [Job(who, name, kind, size, batch) for (name, size, batch), kind, all_ in rows for who in all_]
    if not dry:
        return jobs
    return [dataclasses.replace(j, size=48 if j.size == 224 else 64, batch=8, dry=True) for j in jobs]


def measure(stepper: Stepper, job: Job) -> dict[str, Any]:
    """{"images_per_second", "peak_bytes"} of a contender."""
    warm_up, timed = (1, 2) if job.dry else (WARM_UP, TIMED)
    stepper.wait(stepper.step(0))
    last = None
    for k in range(warm_up):
        last = stepper.step(k)
    stepper.wait(last)
    began = time.perf_counter()
    for k in range(timed):
        last = stepper.step(k)
    stepper.wait(last)
    rate = timed * job.batch / (time.perf_counter() - began)
    return {"images_per_second": rate, "peak_bytes": stepper.peak()}


def kernels(folder: str) -> list[tuple[str, int, float]]:
    """(kernel, how often, milliseconds in all) of the device's events in a trace's folder, the longest first."""
    from jax.profiler import ProfileData

    found: dict[str, tuple[int, float]] = {}
    for path in Path(folder).rglob("*.xplane.pb"):
        for plane in ProfileData.from_file(str(path)).planes:
            if not plane.name.startswith("/device:"):
                continue
            for line in plane.lines:
                if not line.name.startswith("Stream"):
                    continue
                for event in line.events:
                    stats = dict(event.stats)
                    name = f"{stats.get('hlo_op', '')} {event.name}"
                    count, total = found.get(name, (0, 0.0))
                    found[name] = (count + 1, total + event.duration_ns / 1e6)
    return sorted(((name, *values) for name, values in found.items()), key=lambda row: -row[2])


def profile(stepper: Stepper, prefix: Path, steps: int = 3) -> None:
    """Writes the kernels of so many steps beside a row's log, and the program they belong to."""
    import gzip
    import tempfile

    import jax

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            last = None
            for k in range(steps):
                last = stepper.step(k)
            stepper.wait(last)
        rows = kernels(folder)
    lines = [f"{total / steps:9.3f} ms {count / steps:7.1f} x  {name}" for name, count, total in rows]
    whole = sum(row[2] for row in rows) / steps
    Path(f"{prefix}.kernels.txt").write_text("\n".join([f"{whole:.3f} ms of kernels a step", *lines, ""]))
    if (program := stepper.program and stepper.program()) is not None:
        Path(f"{prefix}.program.txt.gz").write_bytes(gzip.compress(program.encode()))


def wait_for(gate: Path) -> None:
    """Waits until the parent opens a gate, which is a file; ends this process if the parent is gone."""
    parent = os.getppid()
    while not gate.exists():
        if os.getppid() != parent:
            raise SystemExit("the parent is gone")
        time.sleep(0.02)


def work(job: Job, prefix: Path | None) -> None:
    """What a row's process does; its last line is the row as JSON. With a prefix it makes PREFIX.ready when it is
    compiled, and waits for PREFIX.measure before it is timed."""
    try:
        if job.contender == "loop" or prefix is None:
            found = contenders.run_loop(job)
        else:
            began = time.perf_counter()
            stepper = MAKERS[job.contender](job)
            built = time.perf_counter() - began
            Path(f"{prefix}.ready").touch()
            wait_for(Path(f"{prefix}.measure"))
            found = measure(stepper, job) | {"build_seconds": built}
            print("\n" + json.dumps(found), flush=True)
            if job.contender == "bmjax" and not job.repeat and job.backbone in os.environ.get("ROW_PROFILE", ""):
                try:
                    profile(stepper, prefix)
                except Exception as error:
                    print(f"no profile: {error!r}", flush=True)
    except Unavailable as reason:
        found = {"unavailable": str(reason)}
    print("\n" + json.dumps(found), flush=True)


def environment(job: Job, cache: Path) -> dict[str, str]:
    """The process's environment: programs compiled once in this run are kept for the first row's repetition."""
    own = {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", "KERAS_BACKEND": "jax"}
    own |= {"JAX_COMPILATION_CACHE_DIR": str(cache), "WANDB_MODE": "disabled", "TQDM_DISABLE": "1"}
    own |= {"BMJAX_FORMS": FORMS.get(job.contender, ""), "JAX_TRACEBACK_FILTERING": "off"}
    own |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # several are compiled at a time
    # XLA times its candidates, but does not also fill their buffers and compare what they give.
    own |= {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=1".strip()}
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


class Process:
    """A process whose words go to a log. In a group of its own: what it starts, as torch.compile does, is ended too."""

    def __init__(self, command: Sequence[str], env: dict[str, str], log: Path):
        self.log = log
        with log.open("w") as out:
            self._process = subprocess.Popen(
                command, env=env, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )

    @property
    def runs(self) -> bool:
        """Whether it has not ended yet."""
        return self._process.poll() is None

    def end(self, seconds: float) -> tuple[int | None, str]:
        """(exit status, or None where it had to be ended after so many seconds; what it said)."""
        try:
            code: int | None = self._process.wait(timeout=max(seconds, 1.0))
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            code = None
        return code, self.log.read_text(errors="replace")


class Row(Process):
    """A row's process, which waits when it is compiled."""

    def __init__(self, job: Job, folder: Path, env: dict[str, str]):
        name = f"{job.contender}-{job.network}-{job.dtype}-{job.size}{'-again' if job.repeat else ''}"
        self.job, self._prefix = job, folder / name
        for gate in ("ready", "measure"):
            Path(f"{self._prefix}.{gate}").unlink(missing_ok=True)
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", json.dumps(dataclasses.asdict(job))]
        super().__init__([*command, "--prefix", str(self._prefix)], env, Path(f"{self._prefix}.log"))

    def measure(self) -> None:
        """Lets it go on to what is timed."""
        Path(f"{self._prefix}.measure").touch()

    @property
    def ready(self) -> bool:
        """Whether it is compiled."""
        return Path(f"{self._prefix}.ready").exists()

    def found(self, seconds: float) -> dict[str, Any]:
        """What it measured, or why it did not."""
        code, text = self.end(seconds)
        answers = [line for line in text.splitlines() if line.startswith("{")]
        if answers:
            return json.loads(answers[-1])
        if code is None:
            return {"failed": f"not done after {seconds:.0f} s more"}
        return {"failed": reason_of(text, code) if code else "it gave no answer"}


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
            self._print(job, found)
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

    def row(self, job: Job, found: dict[str, Any]) -> None:
        """Prints a row and writes it down; what failed has a reason instead of figures."""
        record = dataclasses.asdict(job) | {"network": job.network} | found
        with (self.folder / "rows.jsonl").open("a") as f:
            f.write(json.dumps(record) + "\n")
        self._print(job, found)

    def _print(self, job: Job, found: dict[str, Any]) -> None:
        label = LABELS[job.contender] + (", again" if job.repeat else "")
        kind = "TF32" if job.dtype == "float32" else "bf16"
        head = (f"{job.network} {job.size}", label, kind, str(job.batch))
        if "images_per_second" not in found:
            self.say(*head, next(f"{k}: {v}" for k, v in found.items()), "", "", "")
            return
        rate = found["images_per_second"]
        what = (job.backbone, job.dtype, job.size, job.batch)
        if job.contender == "bmjax":
            self._rates.setdefault(what, rate)
        ours = self._rates.get(what)
        ratio = "" if ours is None else f"{ours / rate:.2f}x"
        peak = "" if found.get("peak_bytes") is None else f"{found['peak_bytes'] / 1e9:.2f}"
        built = found.get("build_seconds", found.get("first_seconds"))
        self.say(*head, f"{rate:,.1f}", ratio, peak, f"{built:.1f}")


def run_group(rows: Sequence[Row], report: Report, keep: float) -> list[dict[str, Any]]:
    """Compiles rows together, then measures them one by one; `keep` seconds are kept for what must come after."""
    # Not all of the time that is left, so that there is time to measure.
    until = time.monotonic() + min(LONGEST, report.left() - keep, max(0.65 * report.left(), LEAST))
    while time.monotonic() < until and not all(row.ready or not row.runs for row in rows):
        time.sleep(0.05)
    # All that are not ready end now: while one is measured, none may use the card.
    late = {row for row in rows if row.runs and not row.ready}
    for row in late:
        row.end(0.0)
    results = []
    for row in rows:
        if row.ready:
            row.measure()
        found = {"failed": "not compiled in time"} if row in late else row.found(min(LONGEST, report.left() - keep))
        results.append(found)
        report.row(row.job, found)
    return results


def groups_of(jobs: Sequence[Job], together: int) -> list[list[Job]]:
    """Jobs in their order, so many at a time; bmjax's loop is alone, since it is timed from its beginning."""
    groups: list[list[Job]] = []
    for job in jobs:
        joins = groups and len(groups[-1]) < together and "loop" not in (job.contender, groups[-1][0].contender)
        if joins:
            groups[-1].append(job)
        else:
            groups.append([job])
    return groups


def run_rows(jobs: Sequence[Job], report: Report, cache: Path, together: int, keep: float) -> dict[Job, dict[str, Any]]:
    """Rows in their order; what there is no time for is said."""
    results = {job: known for job in jobs if not job.repeat and (known := report.known(job)) is not None}
    for group in groups_of([job for job in jobs if job not in results], together):
        if report.left() - keep < LEAST:
            for job in group:
                results[job] = {"left out": "no time"}
                report.row(job, results[job])
            continue
        rows = [Row(job, report.folder, environment(job, cache)) for job in group]
        results |= dict(zip(group, run_group(rows, report, keep), strict=True))
    return results


def run_command(name: str, command: Sequence[str], report: Report, env: dict[str, str], passes: str) -> None:
    """Runs one of the project's own programs as a last row, and prints its last line or why it failed."""
    seconds = report.left()
    if seconds < LEAST:
        print(f"\n{LABELS[name]}: left out, no time", flush=True)
        return
    began = time.monotonic()
    code, text = Process(command, env, report.folder / f"{name}.log").end(seconds)
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
    loop, again = dataclasses.replace(first, contender="loop"), dataclasses.replace(first, repeat=True)
    if not options.contenders:
        jobs.insert(early, loop)
    report.header()
    results = run_rows(jobs, report, cache, options.together, AGAIN)
    results |= run_rows([again], report, cache, 1, 0.0)
    rates = [results[job]["images_per_second"] for job in (first, again) if "images_per_second" in results[job]]
    if len(rates) == 2:
        print(f"\nspread of the first row: {abs(rates[0] - rates[1]) / max(rates):.1%}", flush=True)
    if rates and "images_per_second" in (found := results.get(loop, {})):
        bare, whole = sum(rates) / len(rates), found["images_per_second_whole_epochs"]
        said = f"the loop: {found['images_per_second'] / bare:.2f} of the bare step within epochs (at least 0.90), "
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
    parser.add_argument("--together", type=int, default=4, help="rows that are compiled at a time; default 4")
    parser.add_argument(
        "--profile", nargs="+", choices=contenders.TIMM, default=(), help="write these networks' kernels by their time"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--prefix", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(Job(**json.loads(options.worker)), options.prefix)
        return
    folder = Path(options.out).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    report, cache = Report(folder, options.limit), folder / "compiled"
    os.environ["ROW_PROFILE"] = " ".join(options.profile)
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
