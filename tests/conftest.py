"""What every test sees: four CPU devices, strict rank promotion, the compilation cache, the folder of shared data."""

import os
import pathlib

# Before jax is imported: the parallel tests need several devices.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=4".strip()
os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")

import bmjax  # noqa: F401, I001  (sets the flags it measures as faster, before jax is imported)
import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """The folder with real cells and weights that lies beside the project, where there is one."""
    default = pathlib.Path(__file__).resolve().parents[2] / "shared"
    folder = pathlib.Path(os.environ.get("BMJAX_SHARED", default))
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder} (set BMJAX_SHARED)")
    return folder
