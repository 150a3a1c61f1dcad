"""The doctor finds the traps that are set for it."""

import importlib.util
import os
import platform
import subprocess
import sys
from importlib import metadata

import jax
import pytest

from bmjax import environment
from bmjax.cli import doctor
from bmjax.cpu import build as native
from bmjax.weights.catalog import RECORDS


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("BMJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "jax"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)


def level(subject):
    levels = {level for level, name, _ in doctor.examine() if name == subject}
    assert len(levels) == 1
    return levels.pop()


def test_a_sound_environment_has_no_failure():
    findings = doctor.examine()
    assert {level for level, _, _ in findings} <= {"OK", "WARN"}
    assert {"python", "jax", "jaxlib", "devices", "cache", "W&B", "x64", "XLA_FLAGS"} <= {
        name for _, name, _ in findings
    }
    assert all(text for _, _, text in findings)


def test_a_package_too_old_or_missing_fails(monkeypatch):
    version = metadata.version
    monkeypatch.setattr(metadata, "requires", lambda name: ["flax>=99", "no-such-thing>=1", "never; extra == 'test'"])
    monkeypatch.setattr(metadata, "version", lambda name: "1.0" if name == "bmjax" else version(name))
    found = {name: (level, text) for level, name, text in doctor._packages()}
    assert found["flax"][0] == "FAIL"
    assert "needs flax>=99" in found["flax"][1]
    assert found["no-such-thing"] == (
        "FAIL",
        'not installed; needs no-such-thing>=1; python -m pip install "no-such-thing>=1"',
    )
    assert "never" not in found


def test_missing_importlib_resources_fails(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "importlib_resources" else find(n))
    assert level("importlib_resources for tfds") == "FAIL"


def test_a_cache_that_cannot_be_written_fails(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BMJAX_CACHE", str(tmp_path / "file"))
    assert level("cache") == "FAIL"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "file"))
    assert level("compiled programs") == "WARN"
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    assert level("compiled programs") == "WARN"


def test_a_damaged_weight_file_fails():
    assert level("weights") == "OK"
    folder = environment.cache_folder() / "weights"
    folder.mkdir(parents=True)
    (folder / RECORDS[0].file_name).write_text("damaged")
    assert level("weights") == "FAIL"


def test_settings_that_change_numbers_warn(monkeypatch):
    assert (level("x64"), level("random numbers")) == ("OK", "OK")
    with jax.enable_x64(True):
        assert level("x64") == "WARN"
    with jax.threefry_partitionable(False):
        assert level("random numbers") == "WARN"


def test_the_flags_for_cpus(monkeypatch):
    monkeypatch.setattr(environment, "CPU_FLAGS_JAXLIB", (metadata.version("jaxlib"),))
    monkeypatch.setenv("XLA_FLAGS", " ".join(("--some", *environment.CPU_FLAGS)))
    assert level("XLA_FLAGS") == "OK"
    monkeypatch.setenv("XLA_FLAGS", "")
    assert level("XLA_FLAGS") == "WARN"
    monkeypatch.setattr(environment, "CPU_FLAGS_JAXLIB", ())
    monkeypatch.setattr(environment, "CPU_FLAGS_NEEDLESS", ())
    assert level("XLA_FLAGS") == "OK"
    monkeypatch.setattr(environment, "CPU_FLAGS_NEEDLESS", (metadata.version("jaxlib"),))
    assert level("XLA_FLAGS") == "OK"
    monkeypatch.setenv("XLA_FLAGS", f"{environment.VIRTUAL_DEVICES}=4")
    assert level("XLA_FLAGS") == "WARN"
    monkeypatch.setenv("XLA_FLAGS", f"{environment.VIRTUAL_DEVICES}=4 {environment.CPU_FLAGS[1]}")
    assert level("XLA_FLAGS") == "OK"


def test_what_gpus_bring(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.delenv("XLA_PYTHON_CLIENT_PREALLOCATE", raising=False)
    found = {name: (level, text) for level, name, text in doctor._gpu()}
    assert "takes 0.75" in found["GPU memory"][1]
    assert found["GPU determinism"][0] == "WARN"
    assert found["GPU flags"][0] == ("WARN" if metadata.version("jaxlib") in environment.GPU_FLAGS_JAXLIB else "OK")
    monkeypatch.setenv("XLA_FLAGS", " ".join((environment.DETERMINISTIC_FLAG, *environment.GPU_FLAGS)))
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    found = {name: (level, text) for level, name, text in doctor._gpu()}
    assert found["GPU memory"] == ("OK", "taken as needed")
    assert found["GPU determinism"] == ("OK", "on")
    assert found["GPU flags"][0] == "OK"


def test_what_precision_comes_to(monkeypatch):
    assert doctor._precision(jax, "cpu")[2] == "exact to float32"
    assert "TF32, 10 bits" in doctor._precision(jax, "gpu")[2]
    assert "--train.precision highest" in doctor._precision(jax, "tpu")[2]
    monkeypatch.setenv("BMJAX_FORMS", "dense_remat")
    assert level("BMJAX_FORMS") == "WARN"


def test_what_is_needed_for_one_field_alone_is_no_failure(monkeypatch):
    def version(name):
        if name in ("wandb", "tensorflow-datasets"):
            raise metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(metadata, "requires", lambda name: ["wandb>=0.31", "tensorflow-datasets"])
    monkeypatch.setattr(metadata, "version", version)
    found = {name: (level, text) for level, name, text in doctor._packages()}
    assert found["wandb"][0] == found["tensorflow-datasets"][0] == "WARN"
    assert "needed only for tracking.wandb" in found["wandb"][1]


PRINT_FLAGS = "import os, sys, bmjax; print(os.environ.get('XLA_FLAGS', ''), 'jax' in sys.modules)"


def flags(code=PRINT_FLAGS, **given):
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS", "BMJAX_DETERMINISTIC")}
    done = subprocess.run([sys.executable, "-c", code], env=env | given, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_determinism_is_asked_for_before_jax_is_imported():
    assert environment.DETERMINISTIC_FLAG not in flags()
    assert flags(BMJAX_DETERMINISTIC="1")[-2:] == [environment.DETERMINISTIC_FLAG, "False"]
    own = flags(BMJAX_DETERMINISTIC="1", XLA_FLAGS="--xla_gpu_deterministic_ops=false")
    assert own[0] == "--xla_gpu_deterministic_ops=false"
    assert environment.DETERMINISTIC_FLAG not in own
    main = "import os; from bmjax.cli.main import main; main(['list', 'optimizers', '--deterministic']); "
    assert environment.DETERMINISTIC_FLAG in flags(main + "print(os.environ['XLA_FLAGS'])")
    with pytest.raises(ValueError, match="comes too late: jax is imported"):
        environment.make_deterministic()


def test_flags_for_gpus_are_set_only_where_one_is_expected(monkeypatch):
    point = metadata.EntryPoint("xla_cuda13", "jax_plugins.xla_cuda13", "jax_plugins")
    monkeypatch.setattr(metadata, "entry_points", lambda group: [point])
    for asked, expected in (("", True), ("cpu", False), ("cuda,cpu", True), ("tpu", False)):
        monkeypatch.setenv("JAX_PLATFORMS", asked)
        assert environment.gpu_expected() is expected
    monkeypatch.setattr(metadata, "entry_points", lambda group: [])
    monkeypatch.setenv("JAX_PLATFORMS", "")
    assert not environment.gpu_expected()


@pytest.mark.parametrize("version", environment.CPU_FLAGS_NEEDLESS)
def test_collectives_of_virtual_devices_come_one_after_another(monkeypatch, version):
    monkeypatch.setattr(metadata, "version", lambda name: version)
    monkeypatch.delitem(sys.modules, "jax")
    for given, added in (("", ""), (f"{environment.VIRTUAL_DEVICES}=4", f" {environment.CPU_FLAGS[1]}")):
        monkeypatch.setenv("XLA_FLAGS", given)
        environment.apply()
        assert os.environ["XLA_FLAGS"] == given + added


def test_wandb(monkeypatch):
    assert "there is no key" in doctor._wandb()[2]
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert "can't be reached" in doctor._wandb()[2]
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert "WANDB_MODE=disabled decides" in doctor._wandb()[2]


FREED = """
import resource, sys
if "bmjax" in sys.argv:
    import bmjax
import numpy as np
faults = []
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(30_000_000, np.float32)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(faults[-1])
"""


def page_faults(*arguments, **given):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    run = [sys.executable, "-c", FREED, *arguments]
    return int(subprocess.run(run, env=env | given, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc can be told to")
def test_what_is_freed_is_kept_for_the_next_array():
    """A second array of 120 MB costs no page fault, where it costs hundreds without bmjax or with one's own setting."""
    kept = page_faults("bmjax", JAX_PLATFORMS="cpu")
    assert kept < 50
    assert page_faults() > kept + 50
    assert page_faults("bmjax", JAX_PLATFORMS="cpu", MALLOC_TOP_PAD_="131072") > kept + 50
    assert page_faults("bmjax", JAX_PLATFORMS="cuda,cpu") > kept + 50


def test_kernels_that_can_not_be_built_are_a_warning(monkeypatch):
    assert level("kernels for CPUs") == "OK"
    monkeypatch.setattr(native, "build", lambda: native.Build(None, "not used: no C++ compiler found"))
    monkeypatch.setattr(native, "available", lambda: False)
    assert level("kernels for CPUs") == "WARN"
