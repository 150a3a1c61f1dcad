"""Measures the formulations of bmjax/cpu/convolution.py on this CPU and writes the table they are chosen by.

    python tools/bench/tune_conv.py [--rounds 9] [--kind grouped] [--write]

Every formulation runs at shapes of the networks here, interleaved; a row holds the least milliseconds. Without
--write it only prints; with --kind it measures that kind of convolution alone and leaves the table's other rows.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from importlib import metadata
from pathlib import Path

# isort: off
import bmjax  # noqa: F401  (sets its flags before jax is imported)
import jax
import numpy as np

# isort: on
from bmjax.cpu import build as native
from bmjax.cpu import convolution, formulations
from bmjax.layers import prepare

TABLE = Path(convolution.__file__).with_name("convolution_table.json")
BATCH = 16
# ResNet50's and Xception's, MobileNetV2's and EfficientNetB5's 1x1 convolutions: (output side, inputs, outputs). They
# are most of a step's work, and which formulation is the fastest changes with the sizes.
POINTWISE = (
    *((56, 256, 64), (28, 512, 128), (28, 128, 512), (14, 1024, 256), (14, 256, 1024), (7, 2048, 512), (7, 512, 2048)),
    *((109, 128, 128), (55, 256, 256), (28, 728, 728), (14, 728, 728), (14, 728, 1024), (7, 1536, 2048)),
    *((112, 16, 96), (56, 144, 24), (28, 32, 192), (28, 192, 32), (14, 96, 576), (14, 576, 96), (7, 160, 960)),
    *((112, 24, 144), (56, 40, 240), (28, 64, 384), (28, 384, 64), (14, 176, 1056), (14, 1056, 176), (7, 1824, 304)),
)
# (output side, kernel, stride, inputs, outputs, groups): DenseNet's first, then what the other families need, at last
# attention's: a map from all channels, CBAM's over places, ECA's along the channels.
SHAPES = [
    (112, 7, 2, 3, 64, 1),
    *((side, 1, 1, inputs, 128, 1) for side, inputs in ((56, 64), (56, 192), (28, 256), (14, 512), (7, 768))),
    *((side, 1, 1, inputs, outputs, 1) for side, inputs, outputs in ((14, 512, 256), (7, 1024, 512))),
    *((side, 3, 1, 128, 32, 1) for side in (56, 28, 14, 7)),
    (56, 3, 1, 64, 64, 1),
    (14, 3, 1, 256, 256, 1),
    (56, 1, 1, 64, 256, 1),
    *((side, 1, 1, inputs, outputs, 1) for side, inputs, outputs in POINTWISE),
    *((side, 1, 2, inputs, 2 * inputs, 1) for side, inputs in ((28, 256), (14, 512), (7, 1024))),
    (112, 3, 2, 3, 32, 1),
    *((side, 3, 1, c, c, c) for side, c in ((109, 128), (56, 96), (28, 728), (14, 384))),
    *((side, 3, 2, c, c, c) for side, c in ((56, 96), (28, 144), (7, 576))),
    *((side, 5, 1, c, c, c) for side, c in ((28, 384), (14, 384), (7, 1824))),
    *((side, 3, 1, channels, channels, 32) for side, channels in ((14, 256), (7, 1024))),
    (7, 1, 1, 1664, 1, 1),
    (7, 7, 1, 2, 1, 1),
    (56, 5, 1, 1, 1, 1),
]


def arrays(side: int, size: int, stride: int, inputs: int, outputs: int, groups: int):
    """x, kernel, gradient of the result, and the convolution's strides and padding."""
    rng = np.random.default_rng(0)
    pad = (size - 1) // 2
    x = rng.standard_normal((BATCH, side * stride, side * stride, inputs), dtype=np.float32)
    kernel = rng.standard_normal((size, size, inputs // groups, outputs), dtype=np.float32)
    y_gradient = rng.standard_normal((BATCH, side, side, outputs), dtype=np.float32)
    strides, padding = (stride, stride), ((pad, pad), (pad, pad))
    if stride == 1 or size > 1:
        assert (
            jax.eval_shape(lambda x, k: formulations.plain(x, k, strides, padding, groups), x, kernel).shape[1] == side
        )
    return jax.device_put((x, kernel, y_gradient)), strides, padding


def milliseconds(candidates: dict, rounds: int) -> dict[str, float]:
    """The least of interleaved rounds: others' load on the machine only ever adds."""
    taken: dict[str, float] = {}
    for name, run in candidates.items():
        jax.block_until_ready(run())
        taken[name] = seconds(run)
    # What is far behind does not run again: its large copies would leave the caches cold for the others.
    near = [name for name, first in taken.items() if first < 2.5 * min(taken.values())]
    for _ in range(rounds):
        for name in near:
            taken[name] = min(taken[name], seconds(candidates[name]))
    return {name: round(1e3 * t, 3) for name, t in taken.items()}


def seconds(run) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def shape_of(spec: tuple[int, int, int, int, int, int]) -> formulations.Shape:
    side, size, stride, inputs, outputs, groups = spec
    return formulations.Shape(BATCH * side * side, (size, size), (stride, stride), inputs, outputs, groups)


def rows_of(spec: tuple[int, int, int, int, int, int], rounds: int) -> list[dict]:
    side, size, _, inputs, outputs, groups = spec
    (x, kernel, y_gradient), strides, padding = arrays(*spec)
    shape = shape_of(spec)
    rows = []
    operations: dict = {
        "forward": (x, kernel, ()),
        "input_gradient": (y_gradient, kernel, (x.shape,)),
        "kernel_gradient": (x, y_gradient, (kernel.shape,)),
    }
    for operation, (a, b, result) in operations.items():
        runs = {}
        for name, fn in formulations.formulations(operation, shape, padding).items():
            if name == "native" and not native.available():
                continue
            compiled = jax.jit(lambda a, b, fn=fn, result=result: fn(a, b, *result, strides, padding, groups))
            runs[name] = lambda compiled=compiled, a=a, b=b: compiled(a, b)
        rows.append({**shape._asdict(), "operation": operation, "ms": milliseconds(runs, rounds)})
        best = min(rows[-1]["ms"], key=rows[-1]["ms"].get)
        gflops = 2 * shape.pixels * size * size * inputs // groups * outputs / rows[-1]["ms"][best] / 1e6
        print(f"{shape.kind:18} {side:4} {size}x{size} {inputs:4} -> {outputs:4} {operation:16}", end=" ")
        print(f"{best:16} {gflops:6.0f} GFLOP/s  {rows[-1]['ms']}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--kind", choices=sorted({shape_of(spec).kind for spec in SHAPES}), help="default: all")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    prepare()  # builds the kernels, which are formulations too
    kept = [row for row in convolution.table()["rows"] if args.kind and convolution.shape_of_row(row).kind != args.kind]
    chosen = [spec for spec in SHAPES if args.kind in (None, shape_of(spec).kind)]
    rows = kept + [row for spec in chosen for row in rows_of(spec, args.rounds)]
    machine = f"{platform.machine()}, {os.cpu_count()} CPUs, jaxlib {metadata.version('jaxlib')}"
    if args.write:
        lines = ",\n".join("  " + json.dumps(row) for row in rows)
        command = f"python tools/bench/tune_conv.py --rounds {args.rounds} --write"
        head = f'{{"machine": {json.dumps(machine)}, "command": {json.dumps(command)},'
        TABLE.write_text(f'{head}\n "rows": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
