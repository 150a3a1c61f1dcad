"""Proofs that nothing is lost, in real processes and on real files.

    python tools/torture.py kills --times 200 --saving 50
    python tools/torture.py damage --times 300

`kills`: tiny runs, by turns on images and on cached feature maps, are killed (SIGKILL) at random instants, `--saving`
of them while a checkpoint is being written, and resumed, `--each` times a run. Each must end bit-equal to a run that
was never stopped: checkpoint, predictions, and a record with each step once; and nothing half written may be left.

`damage`: files of checkpoints and caches are cut off, emptied, removed or have one bit flipped. Each read must give the
right numbers or name the damage; where an earlier whole checkpoint is there, it must be used.

    python tools/torture.py inputs --times 20000

`inputs`: a small valid file of every reader is changed, cut off or added to, so many times in all; each read must give
a result or one clear error, within 5 s and 1 GB. It runs the test of tests/test_readers.py, which has the readers.

    python tools/torture.py cost

prints the seconds that the digests cost.

All print what happened, and exit with 1 if one failed. `--seed` repeats the draw; a kill's instant is real time.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import itertools
import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

NOT_COMPARED = {"time", "images_per_second", "input_wait"}
"""Of a record: what is measured by a clock; and everything under `seconds/` and `memory/`."""


def configuration(folder: Path, maps: bool) -> Any:
    """A run of seconds, with a checkpoint every few steps; on cached feature maps or on images."""
    from bmjax import config

    off = config.AugmentConfig(flip=False, right_angles=False)
    last = ("head",) if maps else ("backbone", "attention", "head")
    return config.Config(
        run_dir=str(folder / "run"),
        data=config.DataConfig(image_size=32, synthetic_per_class=20, cache_dir=str(folder.parent / "cache")),
        augment=off if maps else config.AugmentConfig(),
        model=config.ModelConfig("densenet_tiny", None, attention="se", head=config.HeadConfig(widths=(8,))),
        optim=config.OptimConfig(name="adam"),
        features=config.FeaturesConfig(maps),
        stages=(config.StageConfig(3, ("attention", "head")), config.StageConfig(2, last)),
        train=config.TrainConfig(
            batch_size=16, eval_batch_size=32, devices=1, train_eval_epochs=0, checkpoint_steps=None if maps else 2
        ),
    )


def train(folder: Path, maps: bool) -> Path:
    """Trains, or goes on with, the run in a folder."""
    import bmjax
    from bmjax.training import run

    run._MAPS_CHECKPOINT_SECONDS = 0.0  # a checkpoint an epoch, as on images
    return bmjax.train(configuration(folder, maps), resume=True).run_dir


def records(run_dir: Path) -> dict[str, list[dict[str, Any]]]:
    """The records of a run by kind, without what a clock measures."""
    from bmjax.runs.records import read_records

    def kept(record: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in record.items() if k not in NOT_COMPARED and "seconds/" not in k and "memory/" not in k}

    return {kind: [kept(r) for r in read_records(run_dir, kind)] for kind in ("train", "epoch")}


def difference(a: Path, b: Path) -> str | None:
    """What differs between two finished runs, and what should not lie in the second; None if nothing."""
    from bmjax.runs.checkpoint import Checkpoints
    from bmjax.runs.records import read_predictions

    for name in ("last", "best"):
        one, other = (Checkpoints(run / "checkpoints" / name) for run in (a, b))
        if one.latest() != other.latest():
            return f"checkpoints/{name}: step {one.latest()} and {other.latest()}"
        pair = [c.raw(c.steps()[0]) for c in (one, other)]
        if pair[0].keys() != pair[1].keys() or any(not np.array_equal(v, pair[1][k]) for k, v in pair[0].items()):
            return f"checkpoints/{name}: other arrays"
    for split in ("train", "val"):
        one, other = read_predictions(a, split), read_predictions(b, split)
        if one is None or other is None or not np.array_equal(one.probs, other.probs):
            return f"other predictions of {split}"
    left, right = records(a), records(b)
    if left != right:
        return "another record"
    steps = [r["step"] for r in right["train"]]
    if steps != list(range(1, len(steps) + 1)):
        return f"steps {steps}"
    half = [p for p in b.rglob("*") if "orbax-checkpoint-tmp" in p.name or p.name.startswith(".") or p.name == "lock"]
    return f"left behind: {half[0]}" if half else None


def _compare(a: str, b: str, answer: Any) -> None:
    answer.put(difference(Path(a), Path(b)))


def _train(folder: str, maps: bool) -> None:
    logging.disable(logging.CRITICAL)
    train(Path(folder), maps)


def is_saving(run_dir: Path) -> bool:
    """Whether a checkpoint is half written."""
    return any(run_dir.glob("checkpoints/*/*.orbax-checkpoint-tmp*"))


class Processes:
    """Real processes, each forked from one that has imported bmjax and no more, which saves the import."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["bmjax.training.run"])

    def run(self, target: Callable[..., None], *arguments: Any, until: Callable[[float], bool] | None = None) -> bool:
        """Runs a function in a process; kills it when `until` (of the seconds it has run) says so. Whether it ended by
        itself.

        Raises:
          RuntimeError: it failed.
        """
        process = self._context.Process(target=target, args=arguments)
        process.start()
        began = time.monotonic()
        while process.is_alive():
            if until is not None and until(time.monotonic() - began):
                assert process.pid is not None
                os.kill(process.pid, signal.SIGKILL)
                process.join()
                return process.exitcode == 0
            process.join(0.002)
        if process.exitcode:
            raise RuntimeError(f"{target.__name__}{arguments}: exit status {process.exitcode}")
        return True

    def compared(self, a: Path, b: Path) -> str | None:
        """As `difference`, in a process."""
        answer = self._context.SimpleQueue()
        self.run(_compare, str(a), str(b), answer)
        return answer.get()


def kills(args: argparse.Namespace) -> int:
    """Kills and resumes runs; see the module."""
    chance, processes = random.Random(args.seed), Processes()
    work = Path(tempfile.mkdtemp(prefix="torture-"))
    engines = {"images": [False], "maps": [True], "both": [False, True]}[args.on]
    for maps in engines:
        processes.run(_train, str(work / f"whole-{maps}"), maps)  # it compiles and fills the caches, too
    count, failed, left = collections.Counter[str](), list[str](), args.times
    while left:
        maps = engines[count["runs"] % len(engines)]
        folder = work / f"run-{count['runs']}"
        count["runs"] += 1
        for _ in range(min(args.each, left)):
            saving = count["while saving"] < args.saving
            lines = logged(work / f"whole-{maps}" / "run")
            if processes.run(_train, str(folder), maps, until=_instant(folder / "run", lines, saving, chance)):
                break
            count["while saving" if is_saving(folder / "run") else "otherwise"] += 1
            left -= 1
        processes.run(_train, str(folder), maps)
        if (why := processes.compared(work / f"whole-{maps}" / "run", folder / "run")) is not None:
            failed.append(f"{folder}: {why}")
        else:
            shutil.rmtree(folder)
    print(
        f"{args.times} kills of {count['runs']} runs, {count['while saving']} while a checkpoint was being written: "
        f"{count['runs'] - len(failed)} runs end bit-equal with each step once, {len(failed)} do not"
    )
    return _end(work, failed)


def logged(run_dir: Path) -> int:
    """How many lines a run's record has."""
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def _instant(run_dir: Path, lines: int, saving: bool, chance: random.Random) -> Callable[[float], bool]:
    """When to kill: at a random instant between here and the end of the record's `lines`, now and then while it starts;
    or as soon after one as a checkpoint is half written."""
    start = logged(run_dir)
    at = chance.randrange(start, max(lines, start + 1))
    delay, starting = chance.uniform(0, 0.2), chance.random() < 0.1 and not saving
    reached: list[float] = []

    def now(passed: float) -> bool:
        if starting:
            return passed > 10 * delay
        if not reached and logged(run_dir) >= max(at, start + 1):
            reached.append(passed)
        return bool(reached) and (is_saving(run_dir) if saving else passed > reached[0] + delay)

    return now


def _end(work: Path, failed: list[str]) -> int:
    for line in failed:
        print(f"FAILED: {line}", file=sys.stderr)
    if not failed:
        shutil.rmtree(work)
    return int(bool(failed))


KINDS = ("cut off", "emptied", "removed", "one bit flipped")


@dataclasses.dataclass(frozen=True)
class Subject:
    """Files that are read together: `read` gives what to compare; with `spare` an earlier one may stand in."""

    name: str
    files: list[Path]
    read: Callable[[], Any]
    spare: bool = False


def damage_file(path: Path, kind: str, chance: random.Random) -> None:
    """Damages a file."""
    data = bytearray(path.read_bytes())
    if kind == "removed":
        path.unlink()
        return
    if kind == "one bit flipped" and data:
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes({"cut off": data[: chance.randrange(len(data))] if data else data, "emptied": b""}.get(kind, data))


def leaves(tree: Any) -> list[bytes]:
    """The bytes of every array of a tree, with its type and shape."""
    import jax

    return [f"{x.dtype}{x.shape}".encode() + x.tobytes() for x in map(np.asarray, jax.tree.leaves(tree))]


def subjects(run_dir: Path, config: Any) -> Iterator[Subject]:
    """What is read of a run and its caches."""
    from bmjax.data.load import load_dataset
    from bmjax.runs.checkpoint import Checkpoints
    from bmjax.runs.folder import load_run
    from bmjax.training.features import FeatureMaps

    def newest(name: str) -> Any:
        checkpoints = Checkpoints(run_dir / "checkpoints" / name)
        step, found = checkpoints.newest_whole(lambda step: (checkpoints.meta(step), checkpoints.raw(step)))
        return step, found[0], leaves(found[1])

    for name in ("last", "best"):
        step = Checkpoints(run_dir / "checkpoints" / name).latest()
        files = [p for p in (run_dir / "checkpoints" / name / str(step)).rglob("*") if p.is_file()]
        yield Subject(f"checkpoints/{name}", files, lambda name=name: newest(name), spare=True)
    files = [p for p in (run_dir / "checkpoints/best").rglob("*") if p.is_file()]
    yield Subject("load_run", files, lambda: (lambda run: (run.step, leaves(run.variables)))(load_run(run_dir)), True)
    cache = Path(config.data.cache_dir)
    images = list(cache.glob("*/images.npy")) + list(cache.glob("*/skipped.json"))
    yield Subject("images' cache", images, lambda: leaves([load_dataset(config.data).images]))
    features = FeatureMaps(config, load_dataset(config.data))
    rows = np.arange(40)
    files = [cache / "features" / f"{features.fingerprint(rows)[:32]}.npy"]
    features.maps(rows)
    yield Subject("feature maps", files, lambda: leaves([features.maps(rows)]))


def damage(args: argparse.Namespace) -> int:
    """Damages files and reads; see the module."""
    from bmjax.runs.checkpoint import Checkpoints, Damaged

    work, chance = Path(tempfile.mkdtemp(prefix="torture-")), random.Random(args.seed)
    logging.disable(logging.INFO)
    run_dir, config = train(work / "one", True), configuration(work / "one", True)
    said = _Said()
    logging.getLogger("bmjax").addHandler(said)
    logging.getLogger("bmjax").propagate = False
    found = list(subjects(run_dir, config))
    right = {subject.name: subject.read() for subject in found}
    # What an earlier checkpoint gives, by reading without the newest.
    earlier = {}
    for name in ("last", "best"):
        steps = Checkpoints(run_dir / "checkpoints" / name).steps()
        earlier[f"checkpoints/{name}"] = steps[1] if len(steps) > 1 else None
    earlier["load_run"] = earlier["checkpoints/best"]
    count, failed = collections.Counter[str](), list[str]()
    backup = work / "whole"
    shutil.copytree(run_dir, backup / "run")
    shutil.copytree(config.data.cache_dir, backup / "cache")
    for number, kind in zip(range(args.times), itertools.cycle(KINDS), strict=False):
        subject = found[number // len(KINDS) % len(found)]
        path = chance.choice(subject.files)
        damage_file(path, kind, chance)
        said.lines.clear()
        what = f"{subject.name}: {path.relative_to(work)} {kind}"
        try:
            now = subject.read()
            if now == right[subject.name]:
                count["right numbers, made again and said" if said.lines else "right numbers: nothing that counts"] += 1
            elif subject.spare and now[0] == earlier[subject.name] and any(str(run_dir) in s for s in said.lines):
                count["named, the checkpoint before it used"] += 1
            else:
                failed.append(f"{what}: other numbers")
        except Damaged as e:
            count["named, no other there"] += 1
            if subject.spare and earlier[subject.name] is not None:
                failed.append(f"{what}: {e}, though an earlier one is whole")
        except Exception as e:
            failed.append(f"{what}: {e!r}")
        for here, whole in ((run_dir, backup / "run"), (Path(config.data.cache_dir), backup / "cache")):
            shutil.rmtree(here)
            shutil.copytree(whole, here)
    print(f"{args.times} damaged files, {len(failed)} failed: {json.dumps(count)}")
    return _end(work, failed)


def cost(args: argparse.Namespace) -> int:
    """Seconds that the digests take of a checkpoint of DenseNet121 with Adam and an average, and of a cache."""
    import jax
    import optax

    from bmjax.config import ModelConfig
    from bmjax.files import mapped, seal
    from bmjax.model.create import create, init
    from bmjax.runs import checkpoint
    from bmjax.runs.state import create_state

    model = create(ModelConfig("densenet121", None), 7)
    shapes = jax.eval_shape(lambda: init(model, jax.random.key(0), 224))
    shapes = jax.eval_shape(lambda v: create_state(v, optax.adam(1e-3), lambda _: True, seed=0, ema=True), shapes)
    rng = np.random.default_rng(args.seed)
    state = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(x.dtype), shapes)
    work = Path(tempfile.mkdtemp(prefix="torture-"))
    took = collections.defaultdict[str, list[float]](list)

    def timed(what: str, function: Callable[[], Any]) -> None:
        began = time.perf_counter()
        function()
        took[what].append(time.perf_counter() - began)

    path, images = work / "images.npy", rng.integers(0, 255, (args.times, 224, 224, 3), np.uint8)
    for i in range(3):
        checkpoints = checkpoint.Checkpoints(work / str(i))
        items = {"model": checkpoint._model_item(state), "train": checkpoint._train_item(state)}
        timed("digests of a checkpoint", lambda items=items: checkpoint._digests(items))
        timed("save, digests included", lambda c=checkpoints: (c.save(state, {}), c.wait()))
        timed("restore, digests included", lambda c=checkpoints: c.restore(int(state.step), state))
        checkpoints.close()
        np.save(path, images)
        timed("sealing a cache", lambda: seal(path))
        timed("opening a sealed cache", lambda: mapped(path, sealed=True))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 1e6
    print(
        f"state of {size:.0f} MB, cache of {images.nbytes / 1e6:.0f} MB ({args.times} images of 224 px); medians of 3"
    )
    for what, seconds in took.items():
        print(f"{what}: {np.median(seconds):.2f} s")
    shutil.rmtree(work)
    return 0


def inputs(args: argparse.Namespace) -> int:
    """Mutates inputs of all readers; see the module."""
    root = Path(__file__).resolve().parents[1]
    sys.path.insert(0, str(root))
    os.environ["BMJAX_MUTATIONS"] = "1"
    from tests.test_readers import IN_PROCESSES, READERS

    each = -(-10 * args.times // (10 * len(READERS) - 9 * len(IN_PROCESSES)))
    each = -(-each // 10) * 10
    total = each * (len(READERS) - len(IN_PROCESSES)) + each // 10 * len(IN_PROCESSES)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout", "3600"]
    command += [str(root / "tests/test_readers.py"), "-k", "mutated"]
    code = subprocess.run(command, env=os.environ | {"BMJAX_MUTATIONS": str(each)}, cwd=root, check=False).returncode
    print(f"{total} mutated inputs of {len(READERS)} readers: {'all read or refused' if not code else 'FAILED'}")
    return int(bool(code))


class _Said(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    for function, times in ((kills, 200), (damage, 300), (inputs, 20_000), (cost, 2000)):
        verb = verbs.add_parser(function.__name__)
        verb.add_argument("--times", type=int, default=times)
        verb.add_argument("--seed", type=int, default=0)
        verb.set_defaults(run=function)
    killing = verbs.choices["kills"]
    killing.add_argument("--saving", type=int, default=50, help="kills while a checkpoint is being written")
    killing.add_argument("--on", choices=("images", "maps", "both"), default="both", help="what the runs train on")
    killing.add_argument("--each", type=int, default=5, help="kills of one run")
    options = parser.parse_args(arguments)
    return options.run(options)


if __name__ == "__main__":
    sys.exit(main())
