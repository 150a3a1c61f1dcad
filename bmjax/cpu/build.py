"""Kernels for CPUs in C++ (kernels/kernels.cc), compiled once on this machine and called by XLA as custom calls.

A C++ compiler is all they need; the headers come with jaxlib. Where there is none, or on another platform, in another
type or over several devices, the same is computed by the reference that each call names, in jax.numpy. `BMJAX_NATIVE=0`
does without them altogether. `bmjax doctor` says what is used.

Only `prepare` compiles and loads them. Tracing takes the kernels that are loaded, and none where none are.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bmjax.environment import cache_folder, why_foreign
from bmjax.files import checksum, write_text
from bmjax.layers.dispatch import partitioned

log = logging.getLogger(__name__)
SOURCE = Path(__file__).parent / "kernels" / "kernels.cc"
"""It includes the headers that lie beside it."""
TARGETS = (
    "conv",
    "conv_norm",
    "conv_norm_add",
    "conv_kernel_gradient",
    "norm_conv",
    "norm_conv_into",
    "norm_conv_backward",
    "norm_product_backward",
    "depthwise_conv",
    "depthwise_conv_kernel_gradient",
    "normed_conv",
    "normed_conv_kernel_gradient",
    "normed_depthwise_conv",
    "normed_depthwise_conv_kernel_gradient",
    "max_pool_backward",
    "moments",
    "channel_sums",
    "relu_sums",
    "after",
)
_loaded: list[bool] = []
_preparing = threading.Lock()
_off: ContextVar[bool] = ContextVar("_off", default=False)  # of this thread: another may trace beside it


class Build(NamedTuple):
    """The library's file, or why there is none."""

    path: Path | None
    said: str


def _compiler() -> str | None:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((found for name in names if (found := shutil.which(name))), None)


def _processor() -> str:
    """What tells processors apart for which a compiler makes other code."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.exists() else []
    flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return f"{platform.system()} {platform.machine()} {platform.processor()} {flags}"


def _folder() -> Path:
    """Where compiled kernels are kept: with XLA's compiled programs, if these are in a folder."""
    programs = os.environ.get("JAX_COMPILATION_CACHE_DIR", "")
    return (Path(programs) if programs and "://" not in programs else cache_folder()) / "native"


@functools.cache
def build() -> Build:
    """Compiles the kernels, if no earlier process has, and says so before it does."""
    if os.environ.get("BMJAX_NATIVE", "1") == "0":
        return Build(None, "not used: BMJAX_NATIVE is 0")
    compiler = _compiler()
    if compiler is None:
        return Build(None, "not used: no C++ compiler found (CXX, c++, g++, clang++)")
    tune = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    command = [compiler, "-std=c++17", "-O3", tune, "-fPIC", "-shared", "-w", f"-I{jax.ffi.include_dir()}", str(SOURCE)]
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    sources = (path.read_text() for path in [*sorted(SOURCE.parent.glob("*.h")), SOURCE])
    parts = (*sources, version, _processor(), metadata.version("jaxlib"), tune)
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    path = _folder() / f"kernels-{key}.so"
    said = f"compiled by {version.splitlines()[0] if version else compiler}"
    if _is_own(path):
        return Build(path, said)
    started = time.perf_counter()
    log.info("compiling the kernels for this CPU with %s, once on this machine: 10 to 70 s", Path(compiler).name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if why := why_foreign(path.parent):
            log.warning("%s %s, so nothing is loaded from it; slower convolutions are used", path.parent, why)
            return Build(None, f"not used: {path.parent} {why}; set BMJAX_CACHE, or take the right away (chmod go-w)")
        # Under a name of its own first: other processes may build at the same time, or this one may be killed.
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True)
            if done.returncode:
                last = "\n".join(done.stderr.strip().splitlines()[-5:])
                log.warning("%s can't be compiled by %s; slower convolutions are used\n%s", SOURCE, compiler, last)
                return Build(None, f"not used: {compiler} can't compile them")
            made.chmod(0o700)
            # The digest first: a library without one is not loaded.
            write_text(_digest_of(path), checksum(made, "sha256"))
            os.replace(made, path)
    except OSError as error:
        log.warning("the kernels can't be kept in %s (%s); slower convolutions are used", path.parent, error)
        return Build(None, f"not used: {path.parent} can't be written")
    log.info("compiled the kernels for this CPU in %.0f s", time.perf_counter() - started)
    return Build(path, said)


def _digest_of(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _is_own(path: Path) -> bool:
    """Whether a library is there that this user compiled, as it was compiled."""
    if not path.exists():
        return False
    if why := why_foreign(path.parent) or why_foreign(path):
        log.warning("%s %s; it is not loaded", path, why)
        return False
    digest = _digest_of(path)
    if not digest.exists():  # of a version before the digests
        return False
    if checksum(path, "sha256").encode() != digest.read_bytes():
        log.warning("%s is not as it was compiled; it is compiled again", path)
        return False
    return True


@functools.cache
def _load() -> bool:
    path, _ = build()
    if path is None:
        return False
    try:
        library = ctypes.CDLL(str(path))
        for name in TARGETS:
            function = jax.ffi.pycapsule(getattr(library, f"bmjax_{name}"))
            jax.ffi.register_ffi_target(f"bmjax_{name}", function, platform="cpu")
    except (OSError, AttributeError, RuntimeError) as error:
        log.warning("%s can't be used (%s); slower convolutions are", path, error)
        return False
    _loaded.append(True)
    return True


def prepare() -> None:
    """Compiles the kernels, if need be, and loads them; takes the place of bmjax.layers.dispatch.prepare."""
    with _preparing:  # one thread compiles, the others wait for it
        _load()


def available() -> bool:
    """Whether the kernels are loaded."""
    return bool(_loaded)


@contextlib.contextmanager
def off() -> Iterator[None]:
    """Traces what is inside without the kernels: for tests and comparisons."""
    token = _off.set(True)
    try:
        yield
    finally:
        _off.reset(token)


def usable(dtype: Any) -> bool:
    """Whether an operation on CPUs in this type takes a kernel, if there is one for it."""
    return dtype == jnp.float32 and available() and not _off.get() and not partitioned()


def _attribute(value: float | bool | Sequence[int]) -> Any:
    if isinstance(value, bool):
        return value
    if isinstance(value, float):
        return np.float64(value)
    return np.int64(value) if isinstance(value, int) else np.asarray(value, np.int64)


def call(
    name: str,
    reference: Callable[..., Any],
    *args: jax.Array,
    aliases: dict[int, int] | None = None,
    like: Any = None,
    **attributes: float | bool | Sequence[int],
) -> Any:
    """The kernel's result for `args`: arrays as `reference(*args)` gives them but for rounding, derivatives included.

    Where no kernel can be used, it is the reference's. `aliases`: which argument's memory takes which result. `like`:
    the results' shapes, as arrays or `jax.ShapeDtypeStruct`s; without it the reference is traced for them.
    """
    if not all(usable(a.dtype) for a in args if jnp.issubdtype(a.dtype, jnp.floating)):
        return reference(*args)

    def computed(*args: jax.Array) -> Any:
        results = jax.eval_shape(reference, *args) if like is None else like
        flat, tree = jax.tree.flatten(results)
        flat = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in flat]
        run = jax.ffi.ffi_call(f"bmjax_{name}", flat, vmap_method="sequential", input_output_aliases=aliases or {})
        return tree.unflatten(run(*args, **{k: _attribute(v) for k, v in attributes.items()}))

    # Of any order: the derivative of a kernel is that of its reference.
    function = jax.custom_jvp(computed)
    function.defjvp(lambda primals, tangents: jax.jvp(reference, primals, tangents))
    return function(*args)


def described() -> str:
    """What is used, in words; takes the place of bmjax.layers.dispatch.described."""
    if available():
        return f"kernels, {build().said}"
    return build().said if _load.cache_info().currsize else "not used: not prepared"
