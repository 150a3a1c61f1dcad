"""What every test sees: four CPU devices, strict rank promotion, the compilation cache, the folder of shared data.

With BMJAX_TEST_ACCELERATOR=1, as `python tools/check.py --accelerator` sets it, the tests marked `accelerator` see the
devices that there are, and compute float32 in float32.
"""

import contextlib
import dataclasses
import gc
import os
import pathlib

ON_ACCELERATOR = os.environ.get("BMJAX_TEST_ACCELERATOR", "0") not in ("", "0")
if not ON_ACCELERATOR:
    # Before jax is imported: the parallel tests need several devices.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=4".strip()
os.environ.setdefault("KERAS_BACKEND", "jax")
# Many tests compile the same small programs, each in well under the second that jax asks for by itself.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")

# isort: off
import bmjax  # noqa: F401  (sets its flags before jax is imported)
import jax
import pytest
# isort: on

from bmjax.layers import prepare

prepare()  # built before a test moves the cache
jax.config.update("jax_numpy_rank_promotion", "raise")
if ON_ACCELERATOR:
    jax.config.update("jax_default_matmul_precision", "highest")  # TF32 would compare roundings

with contextlib.suppress(ImportError):  # a machine with an accelerator needs pytest alone
    from hypothesis import HealthCheck, settings

    # `--hypothesis-profile slow`, as `python tools/check.py --slow` gives it, for 5,000 examples of each property.
    settings.register_profile("quick", max_examples=200, deadline=None, suppress_health_check=[*HealthCheck])
    settings.register_profile("slow", settings.get_profile("quick"), max_examples=5000)
    settings.load_profile("quick")


def pytest_report_header() -> str:
    kinds = ", ".join(sorted({device.device_kind for device in jax.devices()}))
    return f"devices: {len(jax.devices())} {jax.default_backend()} ({kinds}), jax {jax.__version__}"


def pytest_collection_finish() -> None:
    # Tracing makes so many objects that Python's collector of cycles took an eighth of the tests' time: what was
    # imported is left out of its rounds, and they come less often.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """The folder with real cells and weights that lies beside the project, where there is one."""
    default = pathlib.Path(__file__).resolve().parents[2] / "shared"
    folder = pathlib.Path(os.environ.get("BMJAX_SHARED", default))
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder} (set BMJAX_SHARED)")
    return folder


def _tiny(folder):
    """A run of seconds: rendered cells, a tiny DenseNet, two stages of two epochs, everything random switched on.

    Norms keep their running statistics: a pass over the images after each epoch would be a fifth of its time.
    """
    from bmjax.config import (
        AugmentConfig,
        Config,
        DataConfig,
        HeadConfig,
        ModelConfig,
        OptimConfig,
        ScheduleConfig,
        StageConfig,
        TrainConfig,
    )

    return Config(
        name="tiny",
        run_dir=str(folder / "run"),
        data=DataConfig(image_size=32, synthetic_per_class=20, cache_dir=str(folder / "cache")),
        augment=AugmentConfig(rotate=20, shift=0.1, zoom=0.1, brightness=0.1, contrast=0.1, hue=0.05),
        model=ModelConfig(backbone="densenet_tiny", weights=None, attention="cbam", head=HeadConfig(widths=(16,))),
        optim=OptimConfig(name="adam", schedule=ScheduleConfig(kind="plateau", patience=1, warmup_epochs=0.5)),
        stages=(StageConfig(epochs=2, train=("attention", "head")), StageConfig(epochs=2, lr_scale=0.3)),
        train=TrainConfig(
            batch_size=16,
            eval_batch_size=16,
            ema_decay=0.9,
            accumulate=2,
            train_eval_epochs=0,
            recompute_statistics="never",
        ),
    )


@pytest.fixture
def tiny_config(tmp_path):
    """A run in which everything is switched on, see `_tiny`."""
    return _tiny(tmp_path)


@pytest.fixture
def quick_config(tmp_path):
    """The same of two convolutions, without augmentation, on one device: for tests to which the model does not matter.

    Compiling is most of what a test costs that trains.
    """
    from bmjax.config import AugmentConfig

    tiny = _tiny(tmp_path)
    return dataclasses.replace(
        tiny,
        data=dataclasses.replace(tiny.data, image_size=16),
        augment=AugmentConfig(flip=False, right_angles=False),
        model=dataclasses.replace(tiny.model, backbone="tests.helpers.net:Net", preprocess="tf", attention="none"),
        train=dataclasses.replace(tiny.train, accumulate=1, devices=1),
    )
