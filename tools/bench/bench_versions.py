"""One train step under several installations, step by step in turn: is the speed that of the other Python and jaxlib?

    python tools/bench/bench_versions.py PYTHON [PYTHON ...] [--backbone densenet121] [--batch 16] [--rounds 12]

PYTHON is the interpreter of an environment that has bmjax. Each serves bmjax's step of tools/bench/bench.py, in a
process that lives as long as the others'; with `+flags` behind it, with the CPU's flags of bmjax/environment.py,
whether or not they are set for its jaxlib. Prints Markdown: medians, and the median of the ratios to the first within a
round, for the machine's speed drifts.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
from pathlib import Path
from typing import Any

OURS = os.environ.copy()  # before bmjax is imported, which adds to XLA_FLAGS

from bench import ask  # noqa: E402

from bmjax.environment import CPU_FLAGS  # noqa: E402

BENCH = Path(__file__).with_name("bench.py")
VERSIONS = (
    "import jaxlib, platform; from bmjax import environment as e; print(f'Python {platform.python_version()}, "
    "jaxlib {jaxlib.__version__}, flags ' + ('set' if e.CPU_FLAGS[0] in __import__('os').environ.get('XLA_FLAGS', '') "
    "else 'not set'))"
)


def serve(name: str, args: argparse.Namespace) -> tuple[str, subprocess.Popen[str], dict[str, Any]]:
    """What it is, its process, and what its first step took."""
    python, flags, _ = name.partition("+flags")
    env = OURS | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    if flags:
        env["XLA_FLAGS"] = " ".join((OURS.get("XLA_FLAGS", ""), *CPU_FLAGS)).strip()
    label = subprocess.run([python, "-c", VERSIONS], env=env, check=True, capture_output=True, text=True).stdout.strip()
    words = [python, str(BENCH), "--worker", "bmjax", "--mode", "train", "--backbone", args.backbone]
    words += ["--batch", str(args.batch), "--size", str(args.size)]
    process = subprocess.Popen(words, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return label, process, ask(process, "")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("python", nargs="+", help="an interpreter, or interpreter+flags")
    parser.add_argument("--backbone", default="densenet121")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=12)
    args = parser.parse_args()
    served = [serve(name, args) for name in args.python]
    rounds = [[ask(process, "step")["seconds"] for _, process, _ in served] for _ in range(args.rounds)]
    print(f"{args.backbone}, train, batch {args.batch}, {args.size}x{args.size}, {args.rounds} interleaved rounds\n")
    print("| | images/s | of the first's speed | peak memory, GB | first step done, s |\n|---|---|---|---|---|")
    for i, (label, process, first) in enumerate(served):
        seconds = [one[i] for one in rounds]
        share = statistics.median(one[0] / one[i] for one in rounds)
        memory = ask(process, "memory")["memory"] / 1e9
        speed = args.batch / statistics.median(seconds)
        print(f"| {label} | {speed:.2f} | {100 * share:.1f} % | {memory:.2f} | {first['first']:.0f} |", flush=True)
    for _, process, _ in served:
        process.communicate()


if __name__ == "__main__":
    main()
