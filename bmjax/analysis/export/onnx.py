"""A program as ONNX, by jax2onnx (extra `export`), checked in ONNX Runtime."""

from __future__ import annotations

import dataclasses
import importlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np

from bmjax.analysis.export.program import Facts
from bmjax.files import write_bytes


def check_extra() -> None:
    """Refuses, before anything is computed, where the extra is not installed.

    Raises:
      ValueError: says how to install it.
    """
    try:
        for name in ("jax2onnx", "onnxruntime"):
            importlib.import_module(name)
    except ImportError as e:
        raise ValueError(f"--format onnx needs {e.name}; install it: pip install 'bmjax[export]'") from e


def export_onnx(function: Callable[[jax.Array], jax.Array], facts: Facts) -> Any:
    """The model as ONNX's own object, for any number of images, its facts in its metadata.

    Raises:
      ValueError: the converter does not know an operation; names it.
    """
    for noisy in ("onnx_ir", "jax2onnx"):  # they warn of what concerns themselves
        logging.getLogger(noisy).setLevel(logging.ERROR)
    to_onnx = importlib.import_module("jax2onnx").to_onnx
    size = facts.image_size
    images = jax.ShapeDtypeStruct(jax.export.symbolic_shape(f"b, {size}, {size}, 3"), np.uint8)
    try:
        model: Any = to_onnx(
            function, [images], model_name="bmjax", input_names=["images"], output_names=["probabilities"]
        )
    except Exception as e:  # the converter raises its own kinds, NotImplementedError, KeyError, TypeError...
        raise ValueError(
            f"jax2onnx can't convert {facts.backbone}: {str(e).splitlines()[0] or type(e).__name__}; expected "
            "--format stablehlo for this model"
        ) from e
    _pool_over_places(model)
    for name, value in dataclasses.asdict(facts).items():
        entry = model.metadata_props.add()
        entry.key, entry.value = name, value if isinstance(value, str) else json.dumps(value)
    return model


def _pool_over_places(model: Any) -> None:
    """Max-pools as ONNX Runtime has them, over the last two axes.

    The converter takes the window (1, k, k, 1) over [b, h, w, c] for one over four axes of places, two Unsqueezes,
    MaxPool, Squeeze, which runtimes refuse. Here it becomes Transpose, MaxPool over h and w, Transpose.
    """
    helper = importlib.import_module("onnx.helper")
    nodes = model.graph.node
    made_by = {name: node for node in nodes for name in node.output}
    used_by = {name: node for node in nodes for name in node.input}
    for pool in [node for node in nodes if node.op_type == "MaxPool"]:
        given = {a.name: list(a.ints) for a in pool.attribute if a.ints}
        if len(window := given["kernel_shape"]) != 4 or (window[0], window[3]) != (1, 1):
            continue
        before, after = [], used_by[pool.output[0]]
        source = pool.input[0]
        while source in made_by and made_by[source].op_type == "Unsqueeze":
            before.append(made_by[source])
            source = before[-1].input[0]
        given = {name: [*v[1:3], *v[5:7]] if name == "pads" else v[1:3] for name, v in given.items()}
        inside = f"{pool.name}_channels_first"
        new = [
            helper.make_node("Transpose", [source], [f"{inside}_in"], f"{inside}_to", perm=[0, 3, 1, 2]),
            helper.make_node("MaxPool", [f"{inside}_in"], [f"{inside}_out"], inside, **given),
            helper.make_node("Transpose", [f"{inside}_out"], [after.output[0]], f"{inside}_back", perm=[0, 2, 3, 1]),
        ]
        place = list(nodes).index(pool) - len(before)
        for old in (*before, pool, after):
            nodes.remove(old)
        for node in reversed(new):
            nodes.insert(place, node)
        stale = {name for node in (*before, pool) for name in node.output}
        for info in [v for v in model.graph.value_info if v.name in stale]:
            model.graph.value_info.remove(info)


def write_onnx(path: Path, model: Any) -> None:
    """Writes one file, weights included, whole or not at all."""
    write_bytes(path, model.SerializeToString())


def onnx_session(path: Path, threads: int | None = None) -> Callable[[np.ndarray], np.ndarray]:
    """The file in ONNX Runtime on the CPU: images uint8 [b, s, s, 3] -> probabilities float32 [b, k].

    Raises:
      ValueError: the runtime refuses the model; says why.
    """
    onnxruntime = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or os.cpu_count() or 1
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as e:
        raise ValueError(f"{path}: ONNX Runtime refuses it: {str(e).splitlines()[0][:300]}") from e
    return lambda images: session.run(None, {"images": images})[0]
