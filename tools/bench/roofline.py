"""A model of cost: a train step's FLOPs and bytes by kind of layer, and the time that a device's limits allow for it.

    python tools/bench/roofline.py [--backbone densenet121] [--size 224] [--batch 16 32 256]

The step is traced and not run: every convolution, product, reduction, pooling and concatenation counts its FLOPs and
its operands' and result's bytes, once each. A norm's two sums read the map once on the way forward, and gradient and
map once on the way back; normalising, with the ReLU after it, is a pass of its own, for XLA puts it into no
convolution: map in and out forward; gradient and map in, gradient out on the way back. What else is element by element
(sums of residuals, the optimizer) is taken for free, so the bounds are still too high. A kind's time is the larger of
FLOPs / peak and bytes / bandwidth (Williams et al. 2009, "Roofline"), and kinds follow one another. That is a bound for
a program of one operation after another. The kernels of bmjax/cpu/kernels sum, normalise and concatenate within the
passes of the convolutions beside them; for these a second bound leaves these out. This machine's limits are measured;
an H100's are its maker's, and the shares of them that a program is assumed to reach are ours.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import platform
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

# isort: off
import bmjax  # noqa: F401  (sets its flags before jax is imported)
import jax
import jax.numpy as jnp
import numpy as np

# isort: on

from bmjax.config import ModelConfig
from bmjax.layers.dispatch import traced_for
from bmjax.model.create import create
from bmjax.model.parameters import count_parameters

CLASSES = 7
# NVIDIA's data sheet of the H100 SXM: dense TF32 and bfloat16, HBM3, NVLink one way.
TF32, BFLOAT16, HBM, NVLINK = 495e12, 989e12, 3.35e12, 450e9
REACHED_COMPUTE, REACHED_BANDWIDTH = 0.4, 0.8


@dataclasses.dataclass(frozen=True)
class Device:
    """FLOP/s and bytes/s; `bytes_each` to a number of a feature map."""

    name: str
    compute: float
    bandwidth: float
    bytes_each: int = 4
    fuses: bool = False
    """Whether norms and concatenations cost nothing beside convolutions."""

    def step_seconds(self, found: dict[str, Cost]) -> float:
        """The bound of a train step, by its cost by kind."""
        free = ("norms' sums", "normalise", "concatenation") if self.fuses else ()
        return sum(cost.seconds(self) for kind, cost in found.items() if not kind.startswith(free))


@dataclasses.dataclass
class Cost:
    """Of all operations of one kind: how many, FLOPs, and numbers read and written."""

    count: int = 0
    flops: float = 0.0
    numbers: float = 0.0

    def seconds(self, device: Device) -> float:
        return max(self.flops / device.compute, self.numbers * device.bytes_each / device.bandwidth)


def _equations(jaxpr: Any) -> Iterator[Any]:
    """All equations, those of inner programs too."""
    for equation in jaxpr.eqns:
        inner = [v for v in jax.tree.leaves(equation.params, is_leaf=_is_program) if _is_program(v)]
        if not inner:
            yield equation
        for program in inner:
            yield from _equations(getattr(program, "jaxpr", program))


def _is_program(value: object) -> bool:
    # The two classes of jax 0.10 are one in 0.12.
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")


def _numbers(variables: list[Any]) -> float:
    return sum(math.prod(v.aval.shape) for v in variables)


def _describe(equation: Any) -> tuple[str, float] | None:
    """(kind, FLOPs) of an operation that counts."""
    name, result = equation.primitive.name, equation.outvars[0].aval
    way = "backward" if "transpose" in str(equation.source_info.name_stack) else "forward"
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        spec = equation.params["dimension_numbers"]
        taps = [kernel[i] for i in spec.rhs_spec[2:]]
        flops = 2 * math.prod(result.shape) * kernel[spec.rhs_spec[1]] * math.prod(taps)
        flops /= math.prod(equation.params["lhs_dilation"])  # the zeros that a strided one's gradient slides over
        out = [result.shape[i] for i in spec.out_spec[2:]]
        if way == "backward" and math.prod(taps) > math.prod(out):  # a map slides over a map, and gives a kernel
            return f"kernel gradient {'x'.join(map(str, out))}", flops
        return f"{'input gradient' if way == 'backward' else 'forward'} {'x'.join(map(str, taps))}", flops
    if name == "dot_general":
        ((contracted, _), _) = equation.params["dimension_numbers"]
        depth = math.prod(equation.invars[0].aval.shape[i] for i in contracted)
        return "dense layers", 2 * math.prod(result.shape) * depth
    size = max((math.prod(v.aval.shape) for v in equation.invars if hasattr(v, "aval")), default=0)
    if name.startswith(("reduce_window", "select_and")):
        return f"pooling, {way}", float(size)
    if name in ("concatenate", "split"):
        return f"concatenation, {way}", 0.0
    return None


@dataclasses.dataclass
class _Norms:
    """What a norm's sums tell of its passes: on the way back, one is over the gradient, one over gradient * map."""

    products: dict[Any, Any] = dataclasses.field(default_factory=dict)
    sums: list[Any] = dataclasses.field(default_factory=list)

    def see(self, equation: Any) -> None:
        if equation.primitive.name == "mul":
            self.products[equation.outvars[0]] = equation.invars[0]
        if equation.primitive.name == "reduce_sum" and len(equation.invars[0].aval.shape) == 4:
            self.sums.append(equation)

    def add_to(self, found: dict[str, Cost]) -> None:
        backward = [e for e in self.sums if "transpose" in str(e.source_info.name_stack)]
        paired = {self.products[e.invars[0]] for e in backward if e.invars[0] in self.products}
        for equation in self.sums:
            operand = equation.invars[0]
            size = math.prod(operand.aval.shape)
            if equation not in backward:  # of two sums that read the map together
                _add(found, "norms' sums, forward", 1, 2.0 * size, size / 2)
            elif operand in self.products:  # with its partner: reads gradient and map
                _add(found, "norms' sums, backward", 2, 3.0 * size, 2.0 * size)
                _add(found, "normalise and ReLU, forward", 1, 3.0 * size, 2.0 * size)
                _add(found, "normalise and ReLU, backward", 1, 5.0 * size, 3.0 * size)
            elif operand not in paired:  # a bias's gradient
                _add(found, "biases' sums, backward", 1, float(size), float(size))


def _add(found: dict[str, Cost], kind: str, count: int, flops: float, numbers: float) -> None:
    cost = found[kind]
    cost.count, cost.flops, cost.numbers = cost.count + count, cost.flops + flops, cost.numbers + numbers


def costs(backbone: str, size: int, batch: int) -> tuple[dict[str, Cost], int]:
    """(cost by kind of a train step, parameters), traced as for an accelerator."""
    model = create(ModelConfig(backbone, None, attention="none"), CLASSES)
    images = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.float32)
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(0)}
    with traced_for("gpu"):
        variables = jax.eval_shape(lambda x: model.init(keys, x), images)

        def loss(params: Any, statistics: Any, x: jax.Array) -> jax.Array:
            given = {"params": params, "batch_stats": statistics}
            logits, _ = model.apply(given, x, train=True, mutable=["batch_stats"], rngs=keys)
            return jax.nn.log_softmax(logits)[:, 0].sum()

        step = jax.make_jaxpr(jax.grad(loss))(variables["params"], variables["batch_stats"], images)
    found: dict[str, Cost] = defaultdict(Cost)
    norms = _Norms()
    for equation in _equations(step.jaxpr):
        norms.see(equation)
        if (described := _describe(equation)) is not None:
            kind, flops = described
            _add(found, kind, 1, flops, _numbers([*equation.invars, *equation.outvars]))
    norms.add_to(found)
    return dict(sorted(found.items(), key=lambda item: -item[1].flops)), count_parameters(variables["params"])


def measured() -> Device:
    """This machine: a product of 2048 x 2048 matrices, and adding one to 128 MB; the best of five."""
    a = jnp.asarray(np.random.default_rng(0).standard_normal((2048, 2048), np.float32))
    big = jnp.ones(2**25, jnp.float32)

    def best(function: Any, *arguments: Any) -> float:
        compiled = jax.jit(function)
        compiled(*arguments).block_until_ready()
        taken = []
        for _ in range(5):
            start = time.perf_counter()
            compiled(*arguments).block_until_ready()
            taken.append(time.perf_counter() - start)
        return min(taken)

    return Device("this machine", 2 * 2048**3 / best(jnp.matmul, a, a), 2 * big.nbytes / best(lambda x: x + 1, big))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--backbone", default="densenet121")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 32, 256])
    options = parser.parse_args()
    here = measured()
    print(
        f"{platform.machine()}, {os.cpu_count()} CPUs: {here.compute / 1e9:.0f} GFLOP/s, "
        f"{here.bandwidth / 1e9:.1f} GB/s; {options.backbone}, {options.size}x{options.size}, float32"
    )
    found, parameters = costs(options.backbone, options.size, options.batch[0])
    header = ("operations", "GFLOP", "GB", "FLOP a byte", "bound here, ms", "share")
    print(f"\n| train step, batch {options.batch[0]} | {' | '.join(header)} |")
    print("|---|---|---|---|---|---|---|")
    total = here.step_seconds(found)
    for kind, cost in found.items():
        seconds, size = cost.seconds(here), 4 * cost.numbers
        print(
            f"| {kind} | {cost.count} | {cost.flops / 1e9:.1f} | {size / 1e9:.2f} | {cost.flops / size:.1f} | "
            f"{1000 * seconds:.0f} | {100 * seconds / total:.0f} % |"
        )
    devices = [
        here,
        dataclasses.replace(here, name="this machine, fused", fuses=True),
        Device("H100, TF32, its limits", TF32, HBM),
        assumed := Device("H100, TF32, assumed", REACHED_COMPUTE * TF32, REACHED_BANDWIDTH * HBM),
        Device("H100, bfloat16, assumed", REACHED_COMPUTE * BFLOAT16, REACHED_BANDWIDTH * HBM, 2),
    ]
    print(f"\n| train, images/s at most | {' | '.join(f'batch {b} a device' for b in options.batch)} |")
    print("|---" * (len(options.batch) + 1) + "|")
    steps = {b: costs(options.backbone, options.size, b)[0] for b in options.batch}
    for device in devices:
        rates = [b / device.step_seconds(steps[b]) for b in options.batch]
        print(f"| {device.name} | {' | '.join(f'{rate:,.1f}' for rate in rates)} |")
    # A ring's all-reduce sends each gradient twice, less an eighth, and is assumed to wait for the step's end.
    exchange = 2 * 7 / 8 * 4 * parameters / NVLINK
    rates = [8 * b / (exchange + assumed.step_seconds(steps[b])) for b in options.batch]
    print(f"| eight H100, TF32, assumed | {' | '.join(f'{rate:,.1f}' for rate in rates)} |")


if __name__ == "__main__":
    main()
