"""Batches: number k is the same from any start and on any number of hosts; every image counts, once an epoch."""

import dataclasses
import itertools
import subprocess
import sys
import time

import numpy as np
import pytest

from bmjax.data.batches import TrainBatches, batch_places, eval_batches, steps_per_epoch
from bmjax.data.builders.bm_cytomorphology import COUNTS
from bmjax.data.dataset import Dataset


def dataset_of(n, size=4):
    images = np.broadcast_to(np.arange(n, dtype=np.uint8)[:, None, None, None], (n, size, size, 3))
    labels = (np.arange(n) % 3).astype(np.int32)
    return Dataset("d", ("a", "b", "c"), images, labels, tuple(map(str, range(n))), tuple(map(str, range(n))), "f")


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key])
        assert a[key].dtype == b[key].dtype


def test_a_batch_holds_what_it_names():
    dataset = dataset_of(50)
    rows = np.arange(10, 50)
    batch = TrainBatches(dataset, rows, 16, 3).batch(5)
    assert batch["image"].shape == (16, 4, 4, 3)
    assert batch["image"].dtype == np.uint8
    assert {batch[k].dtype for k in ("label", "index", "position")} == {np.dtype(np.int32)}
    np.testing.assert_array_equal(batch["image"], dataset.images[batch["index"]])
    np.testing.assert_array_equal(batch["label"], dataset.labels[batch["index"]])
    np.testing.assert_array_equal(batch["position"], np.arange(16))
    assert set(batch["index"]) <= set(rows)


@pytest.mark.parametrize("start", [0, 1, 7, 1000])
@pytest.mark.parametrize("workers", [1, 3])
def test_batch_k_is_the_same_from_any_start(start, workers):
    make = lambda w: TrainBatches(dataset_of(37), np.arange(37), 8, 5, workers=w)  # noqa: E731
    random_access = make(1)
    for k, batch in itertools.islice(enumerate(make(workers).batches(start), start), 12):
        assert_equal(batch, random_access.batch(k))


def test_places_are_those_of_the_batches():
    rows = np.arange(5, 46)
    batches = TrainBatches(dataset_of(50), rows, 16, 7)
    places = batch_places(np.zeros(41, np.int32), 16, 7, 2, 5)
    np.testing.assert_array_equal(rows[places], [batches.batch(k)["index"] for k in range(2, 7)])
    assert (batch_places(np.zeros(41, np.int32), 16, 8, 2, 5) != places).any()


def uneven(counts):
    """A dataset with so many images of each class, and all of its rows but the first two, shuffled."""
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts)).astype(np.int32)
    n = len(labels)
    images = np.zeros((n, 2, 2, 3), np.uint8)
    names = tuple(map(str, range(n)))
    return Dataset("d", tuple(map(str, range(len(counts)))), images, labels, names, names, "f"), np.arange(2, n)


def test_balanced_sampling_draws_each_class_equally_and_each_image_before_one_again():
    """At the collection's 21 frequencies, a hundredth of them: 2 images to 294."""
    counts = [max(2, n // 100) for n in COUNTS.values()]
    dataset, rows = uneven(counts)
    batches = TrainBatches(dataset, rows, 32, 3, sampling="balanced")
    drawn = np.concatenate([batches.batch(k)["index"] for k in range(21 * 20)])
    labels = dataset.labels[drawn]
    assert set(np.bincount(labels)) == {32 * 20}
    stretches = labels.reshape(-1, 21)
    assert (np.sort(stretches, axis=1) == np.arange(21)).all()
    assert len({tuple(stretch) for stretch in stretches}) == len(stretches)
    for label in range(21):
        own, seen = rows[dataset.labels[rows] == label], drawn[labels == label]
        epochs = seen[: len(seen) // len(own) * len(own)].reshape(-1, len(own))
        assert (np.sort(epochs, axis=1) == own).all()
        if len(own) > 8:
            assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_places_of_balanced_batches_are_those_of_the_batches():
    dataset, rows = uneven([5, 1, 30])
    batches = TrainBatches(dataset, rows, 16, 7, sampling="balanced")
    places = batch_places(dataset.labels[rows], 16, 7, 2, 5, "balanced")
    np.testing.assert_array_equal(rows[places], [batches.batch(k)["index"] for k in range(2, 7)])


@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_hosts_together_hold_the_global_batch(process_count):
    dataset, rows = dataset_of(41), np.arange(41)
    whole = TrainBatches(dataset, rows, 16, 5)
    hosts = [
        TrainBatches(dataset, rows, 16, 5, process_index=i, process_count=process_count) for i in range(process_count)
    ]
    streams = [host.batches(3) for host in hosts]
    for k in range(3, 12):
        parts = [next(stream) for stream in streams]
        assert all(len(part["label"]) == 16 // process_count for part in parts)
        assert_equal({key: np.concatenate([part[key] for part in parts]) for key in parts[0]}, whole.batch(k))


@pytest.mark.parametrize("case", range(12))
def test_a_run_that_is_stopped_anywhere_and_goes_on_with_other_hosts_sees_the_same_batches(case):
    """Random sizes, seeds, stops and numbers of hosts."""
    rng = np.random.default_rng(case)
    n, size = int(rng.integers(1, 60)), int(rng.choice([4, 8, 12, 24]))
    dataset, seed = dataset_of(60), int(rng.integers(2**31))
    rows = np.sort(rng.permutation(60)[:n])
    sampling = ("uniform", "balanced")[case % 2]
    whole, k, end = TrainBatches(dataset, rows, size, seed, sampling=sampling), int(rng.integers(1000)), 0
    while end < 12:
        hosts = int(rng.choice([h for h in (1, 2, 3, 4) if size % h == 0]))
        workers = int(rng.integers(1, 4))
        streams = [
            TrainBatches(
                dataset, rows, size, seed, process_index=i, process_count=hosts, workers=workers, sampling=sampling
            ).batches(k)
            for i in range(hosts)
        ]
        for _ in range(int(rng.integers(1, 6))):
            parts = [next(stream) for stream in streams]
            assert_equal({key: np.concatenate([part[key] for part in parts]) for key in parts[0]}, whole.batch(k))
            k, end = k + 1, end + 1


@pytest.mark.parametrize(("n", "size"), [(1, 4), (5, 16), (16, 16), (17, 16), (37, 8), (101, 32)])
def test_every_epoch_holds_every_image_once_in_another_order(n, size):
    rows = np.arange(100, 100 + n)
    batches = TrainBatches(dataset_of(256), rows, size, 0)
    epochs = 4
    stream = np.concatenate([batches.batch(k)["index"] for k in range(-(-n * epochs // size))])
    orders = [tuple(stream[e * n : (e + 1) * n]) for e in range(epochs)]
    for order in orders:
        assert sorted(order) == list(rows)
    if n > 4:
        assert len(set(orders)) == epochs


def test_the_seed_decides_the_order():
    dataset, rows = dataset_of(64), np.arange(64)
    first = [TrainBatches(dataset, rows, 64, seed).batch(0)["index"] for seed in (0, 0, 1)]
    np.testing.assert_array_equal(first[0], first[1])
    assert (first[0] != first[2]).any()
    assert (first[0] != rows).any()


def test_all_first_places_are_as_likely():
    """No image is favoured: over epochs, each lands in the first half of the order about half the time."""
    n, epochs = 20, 200
    batches = TrainBatches(dataset_of(n), np.arange(n), n, 1)
    first_half = np.zeros(n)
    for k in range(epochs):
        first_half[batches.batch(k)["index"][: n // 2]] += 1
    assert np.abs(first_half - epochs / 2).max() < 4 * (epochs / 4) ** 0.5


def test_steps_per_epoch():
    assert [steps_per_epoch(n, 16) for n in (1, 15, 16, 17, 32, 33)] == [1, 1, 1, 2, 2, 3]


def test_impossible_batches_are_refused():
    with pytest.raises(ValueError, match="no image to train on"):
        TrainBatches(dataset_of(4), np.array([], np.int64), 2, 0)
    with pytest.raises(ValueError, match=r"train.batch_size is 6; expected a multiple of the 4 processes"):
        TrainBatches(dataset_of(4), np.arange(4), 6, 0, process_count=4)


@pytest.mark.parametrize("n", [1, 7, 15, 16, 17, 31, 33])
def test_evaluation_counts_every_image_once(n):
    dataset = dataset_of(100)
    rows = np.random.default_rng(n).permutation(100)[:n]
    batches = list(eval_batches(dataset, rows, 16))
    assert len(batches) == steps_per_epoch(n, 16)
    for batch in batches:
        assert batch["image"].shape == (16, 4, 4, 3)
        assert batch["weight"].dtype == np.float32
        assert set(batch["weight"]) <= {0.0, 1.0}
        np.testing.assert_array_equal(batch["image"], dataset.images[batch["index"]])
        np.testing.assert_array_equal(batch["label"], dataset.labels[batch["index"]])
    counted = np.concatenate([batch["index"][batch["weight"] == 1] for batch in batches])
    np.testing.assert_array_equal(counted, rows)


LIMITED = """
import resource, sys
import bmjax
import numpy as np
from bmjax.data import Dataset
from bmjax.data.images.cache import cached
from bmjax.data.batches import TrainBatches, eval_batches
from pathlib import Path

n, size, room = 4000, 160, 128 << 20
now = int(next(line for line in open("/proc/self/status") if line.startswith("VmData")).split()[1]) << 10
resource.setrlimit(resource.RLIMIT_DATA, (now + room, now + room))
pictures = (np.full((size, size, 3), i % 251, np.uint8) for i in range(n))
images, _ = cached(Path(sys.argv[1]), "key", n, size, pictures, progress=False)
assert images.nbytes > 2 * room
try:
    np.array(images)
except MemoryError:
    print("the images don't fit")
rows = np.arange(n)
dataset = Dataset("d", ("a",), images, np.zeros(n, np.int32), tuple(map(str, rows)), ("",) * n, "f")
stream = TrainBatches(dataset, rows, 32, 0).batches(0)
for _ in range(n // 32):
    batch = next(stream)
    assert (batch["image"][:, 0, 0, 0] == batch["index"] % 251).all()
print(sum(int(b["weight"].sum()) for b in eval_batches(dataset, rows, 64)), "evaluated")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts private memory on Linux only")
def test_data_larger_than_memory(tmp_path):
    """A cache is written, shuffled and evaluated by a process that may have less memory of its own than the images."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["the images don't fit", "4000 evaluated"]


def test_nothing_to_evaluate_gives_no_batch():
    assert list(eval_batches(dataset_of(4), np.array([], np.int64), 2)) == []


def test_thousands_of_images_a_second(tmp_path):
    """From a memory map at 224 pixels: far more than a network takes. Prints the rate; the bound is a tenth of it."""
    images = np.lib.format.open_memmap(tmp_path / "a.npy", mode="w+", dtype=np.uint8, shape=(400, 224, 224, 3))
    images[:] = 7
    dataset = dataclasses.replace(dataset_of(400), images=images, labels=np.zeros(400, np.int32))
    stream = TrainBatches(dataset, np.arange(400), 32, 0).batches(0)
    next(stream)
    start = time.perf_counter()
    for _ in range(60):
        next(stream)
    rate = 60 * 32 / (time.perf_counter() - start)
    print(f"{rate:.0f} images/s at 224 x 224")
    assert rate > 1000
