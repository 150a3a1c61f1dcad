"""Several processes are one run: how they find each other, and that they give one process's numbers."""

import json
import pathlib
import signal

import numpy as np
import pytest

from bmjax.data.batches import eval_batches
from bmjax.data.dataset import Dataset
from bmjax.runs.checkpoint import Checkpoints
from bmjax.training import hosts
from bmjax.training.hosts import Cluster, chosen, detected
from tests.helpers.processes import Processes, run_alone, together

SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
OMPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
ADDRESS = {"JAX_COORDINATOR_ADDRESS": "node0:8476"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        (SLURM | {"SLURM_NTASKS": "2"}, Cluster("slurm")),
        (SLURM | {"SLURM_NTASKS": "1"}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, None),  # within sbatch, not by srun
        (OMPI | {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:3"}, Cluster("ompi")),
        (OMPI | ADDRESS, Cluster("ompi", 4, 3, "node0:8476", 1)),
        (OMPI | {"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "0"}, Cluster("tpu")),
        ({"TPU_WORKER_HOSTNAMES": "a", "TPU_WORKER_ID": "0"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, Cluster("tpu")),
        (
            ADDRESS | {"JAX_NUM_PROCESSES": "2", "JOB_COMPLETION_INDEX": "1"},
            Cluster("environment", 2, 1, "node0:8476"),
        ),
        (ADDRESS | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, None),
    ],
)
def test_a_cluster_is_known_by_its_environment(environ, expected):
    assert detected(environ) == expected


@pytest.mark.parametrize(
    ("arguments", "environ", "message"),
    [
        ((None, 1, None), {}, "without --hosts"),
        ((0, None, None), {}, "--hosts is 0; expected at least 1"),
        ((2, 2, "a:1"), {}, "host 2 of 2 hosts; expected one of 0 to hosts - 1"),
        ((2, None, "a:1"), {}, "host None of 2 hosts"),
        ((2, 0, None), {}, "coordinator's address is None; expected host 0's"),
        ((2, 0, "node0"), {}, "coordinator's address is 'node0'"),
        ((None, None, None), OMPI, "coordinator's address is None"),
        ((None, None, None), ADDRESS | {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES is 'two'; expected a whole"),
    ],
)
def test_what_is_missing_is_said(monkeypatch, arguments, environ, message):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        chosen(*arguments)


def test_one_host_ignores_the_cluster(monkeypatch):
    for name, value in (SLURM | {"SLURM_NTASKS": "2"}).items():
        monkeypatch.setenv(name, value)
    assert chosen(None, None, None) == Cluster("slurm")
    assert chosen(1, None, None) is None


def test_alone_nothing_is_asked_of_anyone():
    value = {"a": object()}
    assert hosts.told(value) is value
    assert hosts.leads()
    assert type(hosts.signals()) is hosts.Signals
    with pytest.raises(KeyError), hosts.together("nothing"):
        raise KeyError


def test_hosts_read_their_part_of_each_evaluation_batch():
    images = np.arange(10, dtype=np.uint8).repeat(12).reshape(10, 2, 2, 3)
    names = tuple(map(str, range(10)))
    dataset = Dataset("d", ("a",), images, np.zeros(10, np.int32), names, ("",) * 10, "", ())
    whole = list(eval_batches(dataset, np.arange(10), 4))
    parts = [list(eval_batches(dataset, np.arange(10), 4, (i, 2))) for i in range(2)]
    for one, halves in zip(whole, zip(*parts, strict=True), strict=True):
        np.testing.assert_array_equal(np.concatenate([half["image"] for half in halves]), one["image"])
        assert all((half["weight"] == one["weight"]).all() and (half["index"] == one["index"]).all() for half in halves)


EXPERIMENT = """
import os, signal
import flax.linen as nn
from bmjax.config import AugmentConfig, Config, DataConfig, HeadConfig, ModelConfig, OptimConfig, StageConfig
from bmjax.config import TrainConfig
from bmjax.layers import BatchNorm, Conv


class Net(nn.Module):
    stages: tuple[str, ...] = ("fine", "coarse")

    @nn.compact
    def __call__(self, x, *, train=False, mode="train", tap=lambda stage, x: x):
        for stage, width in zip(self.stages, (16, 32)):
            x = Conv(width, 3, strides=2, name=stage)(x)
            x = tap(stage, nn.relu(BatchNorm(name=f"{stage}_norm")(x, train=train, mode=mode)))
        return x


def config():
    return Config(
        name="net",
        data=DataConfig(image_size=16, synthetic_per_class=12, stratify=True, cache_dir="cache"),
        augment=AugmentConfig(brightness=0.1),
        model=ModelConfig(
            backbone="experiment.py:Net", weights=None, preprocess="tf", attention="se", head=HeadConfig(widths=(8,))
        ),
        optim=OptimConfig(name="adam"),
        stages=(StageConfig(epochs=2),),
        train=TrainConfig(batch_size=8, eval_batch_size=12, accumulate=2, ema_decay=0.9, dtype="float64",
                          checkpoint_steps=4, final_test=True, train_eval_epochs=0),
    )


def on_event(event):
    import jax
    for name, number in (("SIGNAL_AT", signal.SIGTERM), ("KILL_AT", signal.SIGKILL)):
        at, host = os.environ.get(name, "0 0").split()
        if event.kind == "step" and event.step == int(at) and jax.process_index() == int(host):
            os.kill(os.getpid(), number)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the experiment, and its run by one process."""
    folder = tmp_path_factory.mktemp("hosts")
    (folder / "experiment.py").write_text(EXPERIMENT)
    run_alone(["train", "experiment.py", "--run_dir", "one"], folder, **settings(folder))
    return folder


def settings(folder):
    cache = {"BMJAX_CACHE": str(folder / "bmjax"), "JAX_COMPILATION_CACHE_DIR": str(folder / "x")}
    return cache | {"JAX_ENABLE_X64": "1", "BMJAX_NATIVE": "0"}


def state_of(run: pathlib.Path):
    last = Checkpoints(run / "checkpoints/last")
    arrays = last.raw(step := last.latest())
    last.close()
    return step, arrays


def assert_same_run(run, expected):
    (step, ours), (expected_step, theirs) = state_of(run), state_of(expected)
    assert step == expected_step
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_allclose(value, theirs[name], rtol=0, atol=1e-9, err_msg=name)
    for split in ("train", "val", "test"):
        mine, others = (np.load(folder / f"predictions_{split}.npz") for folder in (run, expected))
        np.testing.assert_array_equal(mine["index"], others["index"])
        np.testing.assert_allclose(mine["probs"], others["probs"], rtol=0, atol=1e-6)  # kept as float32
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines() if '"train"' in line]
    assert steps == list(range(1, step + 1)), "one writer, each step once"


def test_two_processes_are_one_stopped_and_resumed_and_evaluated(folder):
    """A signal to host 1 alone stops both at the same step; one process with two devices goes on; two evaluate."""
    train = ["train", "experiment.py", "--run_dir", "two"]
    ended = together(train, 2, 1, cwd=folder, SIGNAL_AT="5 1", **settings(folder))
    assert [code for code, _, _ in ended] == [143, 143], ended
    assert "stopped by SIGTERM at step" in ended[0][2]
    assert [line for line in ended[1][1].splitlines() if "Gloo" not in line] == [], "host 0 alone speaks"
    step, _ = state_of(folder / "two")
    assert 5 < step < 14
    run_alone([*train, "--resume"], folder, devices=2, **settings(folder))
    assert_same_run(folder / "two", folder / "one")
    ended = together(["eval", "two", "--split", "val"], 2, 1, cwd=folder, **settings(folder))
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert_same_run(folder / "two", folder / "one")


def test_a_failure_of_one_ends_all_with_a_reason(folder):
    """Before anything is written; the folder holds a run already, as host 0 alone may see."""
    ended = together(["train", "experiment.py", "--run_dir", "one"], 2, 1, cwd=folder, **settings(folder))
    assert [code for code, _, _ in ended] == [2, 2], ended
    assert all("one holds a run already" in err for _, _, err in ended)
    ended = together(["train", "experiment.py", "--train.batch_size", "9"], 2, 1, cwd=folder, **settings(folder))
    assert [code for code, _, _ in ended] == [2, 2], ended
    assert not (folder / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "devices", "further"), [
    (2, 2, []),
    (4, 1, []),
    (2, 2, ["--train.shard_params", "True"]),
    (2, 2, ["--train.mesh", "data=2,model=2"]),
    (4, 1, ["--train.mesh", "data=2,model=2", "--train.shard_params", "True"]),
])  # fmt: skip
def test_more_processes_and_devices_and_meshes_are_one(folder, tmp_path, processes, devices, further):
    run = tmp_path / "run"
    words = ["train", "experiment.py", "--run_dir", run, *further]
    ended = together(words, processes, devices, cwd=folder, SIGNAL_AT="9 1", **settings(folder))
    assert [code for code, _, _ in ended] == [143] * processes, ended
    devices = 1 if not further else 2
    ended = together([*words, "--resume"], 2, devices, cwd=folder, **settings(folder))
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert_same_run(run, folder / "one")


@pytest.mark.slow
def test_two_processes_compare_as_one(folder):
    words = ["compare", "experiment.py", "--variants", "se", "--seeds", "1", "--end-to-end"]
    run_alone([*words, "--name", "alone"], folder, **settings(folder))
    ended = together([*words, "--name", "both"], 2, 1, cwd=folder, **settings(folder))
    assert [code for code, _, _ in ended] == [0, 0], ended
    alone, both = (json.loads((folder / f"runs/{name}/comparison.json").read_text()) for name in ("alone", "both"))
    assert alone["accuracies"] == both["accuracies"]
    ended = together([*words[:-1], "--cached", "--name", "cached"], 2, 1, cwd=folder, **settings(folder))
    assert [code for code, _, _ in ended] == [2, 2]


@pytest.mark.slow
def test_a_killed_host_ends_the_others_and_the_run_goes_on(folder, tmp_path):
    run = tmp_path / "run"
    words = ["train", "experiment.py", "--run_dir", run]
    started = Processes(words, 2, 1, cwd=folder, KILL_AT="6 1", **settings(folder))
    codes = [code for code, _, _ in started.ended()]
    assert codes[1] == -signal.SIGKILL
    assert codes[0] not in (0, None)
    run_alone([*words, "--resume"], folder, **settings(folder))
    assert_same_run(run, folder / "one")


@pytest.mark.slow
@pytest.mark.parametrize("layout", [["--train.shard_params", "True"], ["--train.mesh", "data=4,model=2"]])
def test_eight_devices_are_one(folder, tmp_path, layout):
    words = ["train", "experiment.py", "--train.batch_size", "16", "--run_dir"]
    run_alone([*words, tmp_path / "one"], folder, **settings(folder))
    run_alone([*words, tmp_path / "eight", *layout], folder, devices=8, **settings(folder))
    assert_same_run(tmp_path / "eight", tmp_path / "one")


@pytest.mark.slow
def test_logical_shards_give_eight_devices_and_two_processes_the_same_bits(folder, tmp_path):
    # As users train: with float64 switched on XLA rounds an optimizer's scalars otherwise in another program.
    plain = settings(folder) | {"JAX_ENABLE_X64": "0"}
    words = ["train", "experiment.py", "--train.batch_size", "32", "--train.logical_shards", "16"]
    words += ["--train.accumulate", "1", "--train.dtype", "float32", "--run_dir"]
    run_alone([*words, tmp_path / "one"], folder, **plain)
    run_alone([*words, tmp_path / "eight"], folder, devices=8, **plain)
    ended = together([*words, tmp_path / "two"], 2, 2, cwd=folder, **plain)
    assert [code for code, _, _ in ended] == [0, 0], ended
    _, one = state_of(tmp_path / "one")
    for name in ("eight", "two"):
        _, other = state_of(tmp_path / name)
        for leaf, value in other.items():
            np.testing.assert_array_equal(value, one[leaf], err_msg=f"{name} {leaf}")
