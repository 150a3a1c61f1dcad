"""Initial values without compiling the network: what they are drawn from is evaluated an operation at a time.

One program for all initial values has a random number generator for each kernel in it, and takes longer to compile
than the network itself. Here kernels of all shapes share a few programs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import Literal, jaxpr_as_fun

# What shapes a drawn value, by NumPy: equal to the bit, and a program less for each shape.
_SHAPING: dict[str, Callable[..., np.ndarray]] = {
    "slice": lambda x, *, start_indices, limit_indices, strides: x[
        tuple(map(slice, start_indices, limit_indices, strides or (1,) * x.ndim))
    ],
    "reshape": lambda x, *, new_sizes, **_: x.reshape(new_sizes),
    "mul": lambda x, y, **_: x * y,
}
_FORWARD = {"conv_general_dilated", "dot_general", "ffi_call", "custom_jvp_call", "custom_vjp_call", "while", "scan"}


def he_normal(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """A kernel [..., c, n], normal, of variance 2 over the values that enter an output (He et al. 2015).

    As `jax.nn.initializers.variance_scaling(2.0, "fan_in", "normal")`. Values are drawn by the power of four, of which
    those that are needed come first whatever their number, so that kernels of many shapes share a program.
    """
    n = math.prod(shape)
    drawn = jax.random.normal(key, (4 ** -(-max(n - 1, 0).bit_length() // 2),), dtype)[:n].reshape(shape)
    return drawn * jnp.asarray(math.sqrt(2 / math.prod(shape[:-1])), dtype)


def evaluated(function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments) of arrays, without the operations that its results do not need.

    Where they need convolutions or products, as values that depend on data do, the whole is compiled as by jit.
    """
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
    jaxpr = closed.jaxpr
    needed, kept, constant = {id(v) for v in jaxpr.outvars}, [], {}
    for equation in reversed(jaxpr.eqns):
        if not any(id(v) in needed for v in equation.outvars):
            continue
        if equation.primitive.name == "broadcast_in_dim" and isinstance(value := equation.invars[0], Literal):
            constant[id(equation.outvars[0])] = value.val  # zeros and ones: nothing to compile
            continue
        kept.append(equation)
        needed |= {id(v) for v in equation.invars}
    used = {id(v) for equation in kept for v in equation.invars}
    if used & constant.keys() or any(equation.primitive.name in _FORWARD for equation in kept):
        return jax.jit(function)(*arguments)
    shaping, drawing, inputs = [], [], set[int]()
    for equation in kept:  # from the last on
        last = equation.primitive.name in _SHAPING and inputs.isdisjoint(map(id, equation.outvars))
        (shaping if last else drawing).append(equation)
        inputs |= set() if last else {id(v) for v in equation.invars}
    shaped = {id(v) for equation in shaping for v in equation.outvars}
    wanted = {id(v): v for e in shaping for v in e.invars if not isinstance(v, Literal)} | {
        id(v): v for v in jaxpr.outvars
    }
    drawn = [v for v in wanted.values() if id(v) not in constant.keys() | shaped]
    small = closed.replace(jaxpr=jaxpr.replace(eqns=drawing[::-1], outvars=drawn))
    known = dict(zip(map(id, drawn), jaxpr_as_fun(small)(*jax.tree.leaves(arguments)), strict=True))
    for equation in shaping[::-1]:
        values = (v.val if isinstance(v, Literal) else known[id(v)] for v in equation.invars)
        values = (v if isinstance(v, Tracer) else np.asarray(v) for v in values)  # those of a trace around this
        known[id(equation.outvars[0])] = _SHAPING[equation.primitive.name](*values, **equation.params)
    leaves = [
        np.full(shape.shape, constant[id(v)], shape.dtype) if id(v) in constant else known[id(v)]
        for v, shape in zip(jaxpr.outvars, jax.tree.leaves(shapes), strict=True)
    ]
    # jnp.asarray would compile a copy for each shape.
    return jax.tree.unflatten(jax.tree.structure(shapes), jax.device_put(leaves))
