"""Trackers: JSONL on disk, always, and Weights & Biases. The only file that imports wandb, and only when used.

Only process 0 writes. After a rewind (a resume from an earlier checkpoint) nothing is logged until past the last
logged step; the steps between are the same again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import socket
import threading
import time
import urllib.parse
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from bmjax.config.training import TrackingConfig
from bmjax.files import printable

log = logging.getLogger(__name__)


def _shown(value: Any) -> Any:
    """A value whose text W&B can send: names of files need not be UTF-8."""
    if isinstance(value, dict):
        return {_shown(key): _shown(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_shown(v) for v in value]
    return printable(value, lines=True) if isinstance(value, str) else value


def _said(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


class Tracker(Protocol):
    """Where a run's figures go."""

    def log(self, step: int, metrics: dict[str, Any], *, kind: str) -> None:
        """Figures of a step; `kind` is "train" or "epoch", each with a record of its own per step."""
        ...

    def summary(self, metrics: dict[str, Any]) -> None:
        """Figures of the whole run."""
        ...

    def confusion(self, labels: np.ndarray, predictions: np.ndarray, classes: Sequence[str]) -> None: ...

    def mispredicted(
        self, images: np.ndarray, labels: np.ndarray, probs: np.ndarray, ids: Sequence[str], classes: Sequence[str]
    ) -> None:
        """Cells that were taken for another class: images uint8 [n, h, w, 3], labels [n], probs [n, k]."""
        ...

    def checkpoint_artifact(self, folder: Path, metadata: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class NoTracker:
    """Writes nothing."""

    def log(self, step: int, metrics: dict[str, Any], *, kind: str) -> None: ...
    def summary(self, metrics: dict[str, Any]) -> None: ...
    def confusion(self, labels: np.ndarray, predictions: np.ndarray, classes: Sequence[str]) -> None: ...
    def mispredicted(
        self, images: np.ndarray, labels: np.ndarray, probs: np.ndarray, ids: Sequence[str], classes: Sequence[str]
    ) -> None: ...
    def checkpoint_artifact(self, folder: Path, metadata: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


class JsonlTracker(NoTracker):
    """One JSON object a line: kind, step, time, and the figures. Each step stands there once per kind.

    `last` maps each kind to its last logged step. A line that a kill tore is cut off when the file is opened, which is
    said; so are steps up to `resumed_at` that are not there, for they are not trained again.

    Raises:
      ValueError: a line that was finished is no record; names file and line.
      OSError: the disk is full; names the file.
    """

    def __init__(self, path: Path, resumed_at: int = 0):
        self.last: dict[str, int] = {}
        self._path, steps = path, set[int]()
        if path.exists():
            text = path.read_bytes()
            whole = text[: text.rfind(b"\n") + 1]
            if len(whole) < len(text):
                log.warning("%s: the last line is not whole, and is cut off: %r", path, text[len(whole) :][:80])
                with path.open("r+b") as f:
                    f.truncate(len(whole))
            for number, line in enumerate(whole.splitlines(), 1):
                try:
                    record = json.loads(line)
                    self.last[record["kind"]] = max(record["step"], self.last.get(record["kind"], -1))
                    steps |= {record["step"]} if record["kind"] == "train" else set()
                except (ValueError, KeyError, TypeError) as e:
                    raise ValueError(f"{path}, line {number}: {line[:80]!r} is no record of a step: {e!r}") from e
        missing = sorted(set(range(1, resumed_at + 1)) - steps)
        if missing:
            log.warning(
                "%s lacks %d of the %d steps trained so far, the first of them step %d: the record is not whole",
                *(path, len(missing), resumed_at, missing[0]),
            )
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, metrics: dict[str, Any], *, kind: str) -> None:
        if step <= self.last.get(kind, -1):
            return
        self.last[kind] = step
        line = json.dumps({"kind": kind, "step": step, "time": round(time.time(), 3)} | metrics) + "\n"
        try:
            self._file.write(line)
            self._file.flush()
        except OSError as e:
            raise OSError(e.errno, f"{e.strerror}; free some space and go on with --resume", str(self._path)) from e

    def close(self) -> None:
        with contextlib.suppress(OSError):  # of a full disk, which was raised before
            self._file.flush()
            os.fsync(self._file.fileno())
        with contextlib.suppress(OSError):
            self._file.close()


INIT_SECONDS = 20.0
"""How long W&B's server may take to answer at the start."""
FINISH_SECONDS = 60.0
"""How long a run waits at its end for W&B's server to take the rest."""


def agents_run() -> str | None:
    """The id that an agent of a W&B sweep has given this process's run; None outside of a sweep."""
    return os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None


def new_run_id() -> str:
    """An id for a run, made before its first step and kept in its checkpoints; in a W&B sweep the agent's."""
    return agents_run() or uuid.uuid4().hex[:12]


def _server() -> urllib.parse.ParseResult:
    return urllib.parse.urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))


def has_key() -> bool:
    """Whether a W&B key is set in the environment or in ~/.netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    return netrc.is_file() and (_server().hostname or "") in netrc.read_text()


def reachable(timeout: float = 3.0) -> bool:
    """Whether W&B's server takes a connection."""
    url = _server()
    try:
        with socket.create_connection((url.hostname or "", url.port or (80 if url.scheme == "http" else 443)), timeout):
            return True
    except OSError:
        return False


def why_offline() -> str | None:
    """Why W&B can't be used online here; None where it can, as far as can be told beforehand."""
    if not has_key():
        return "there is no key"
    return None if reachable() else f"{_server().hostname} can't be reached"


class WandbTracker:
    """Logs to W&B from a thread of its own, so that no server can stop or slow a run; metrics.jsonl has all anyway.

    Steps go by our own `global_step`, since W&B drops steps that go back; one log call a step and kind. `last` maps
    each kind to the last step logged before a resume: an offline resume is a run folder of its own with the same id,
    and what came before must not be logged again. A server that does not take the run in INIT_SECONDS is not asked
    again, and the run is logged offline; one that is lost later is waited for at the end, for FINISH_SECONDS at most.
    """

    def __init__(
        self,
        config: TrackingConfig,
        run_dir: Path,
        run_id: str,
        run_config: dict[str, Any],
        last: dict[str, int] | None = None,
    ):
        self._config, self._run_dir, self._run_id, self._run_config = config, run_dir, run_id, run_config
        self._last, self._jobs = dict(last or {}), queue.SimpleQueue[Callable[[Any], None] | None]()
        self._folder: str | None = None
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def _init(self, mode: str, run_id: str) -> Any:
        import wandb

        return wandb.init(
            project=self._config.project,
            group=self._config.group or None,
            tags=list(self._config.tags) or None,
            name=_shown(self._run_config.get("name")),
            id=run_id,
            # Offline too: `wandb sync` then appends a resumed run's folders in the order of their start.
            resume="allow",
            dir=str(self._run_dir),
            config=_shown(self._run_config),
            mode=mode,  # type: ignore[arg-type]
            settings=wandb.Settings(
                silent=True,
                reinit="create_new",  # other runs may be open: `bmjax compare` trains several at once
                init_timeout=INIT_SECONDS,
                finish_timeout=FINISH_SECONDS,
                finish_timeout_raises=True,
            ),
        )

    def _start(self) -> Any:
        """W&B's run; offline where the server is not to be had."""
        mode, run_id, why = self._config.wandb, self._run_id, None
        if mode == "auto" and (asked := os.environ.get("WANDB_MODE")):
            mode = {"dryrun": "offline", "run": "online"}.get(asked, asked)  # the user's environment decides
        elif mode == "auto":
            mode, why = "online", why_offline()
        if mode == "online" and why is None:
            try:
                return self._init("online", run_id)
            except Exception as e:  # a key that is refused, a server that does not answer or answers nonsense
                why = _said(e)
                run_id = f"{run_id}-offline"  # this process can't start the failed one's id again
        if why is not None:
            log.warning("W&B: %s, so the run is logged offline", why)
            mode = "offline"
        run = self._init(mode, run_id)
        if mode == "offline":
            self._folder = str(run.dir).removesuffix("/files")
        return run

    def _work(self) -> None:
        """The thread: starts the run, then does one job after another."""
        try:
            run = self._start()
            run.define_metric("global_step")
            run.define_metric("*", step_metric="global_step")
        except Exception as e:
            log.warning("W&B: %s; nothing is logged there, and all is in metrics.jsonl", _said(e))
            return
        said = False
        for job in iter(self._jobs.get, None):
            try:
                job(run)
            except Exception as e:
                if not said:
                    log.warning("W&B: %s; it may lack figures, and all are in metrics.jsonl", _said(e))
                said = True
        try:
            run.finish()
        except Exception as e:
            log.warning("W&B: not everything is sent (%s)", _said(e))
            self._folder = self._folder or str(run.dir).removesuffix("/files")

    def log(self, step: int, metrics: dict[str, Any], *, kind: str) -> None:
        if step <= self._last.get(kind, -1):
            return
        self._last[kind] = step
        # With the kind before every name, an epoch's mean loss and a step's loss never share a curve.
        figures = {"global_step": step} | {f"{kind}/{name}": value for name, value in metrics.items()}
        self._jobs.put(lambda run: run.log(figures))

    def summary(self, metrics: dict[str, Any]) -> None:
        self._jobs.put(lambda run: run.summary.update(_shown(metrics)))

    def made(self, make: Callable[[Any], dict[str, Any]]) -> None:
        """Logs what `make` makes of the module wandb: tables and pictures by name."""

        def job(run: Any) -> None:
            import wandb

            run.log(make(wandb))

        self._jobs.put(job)

    def confusion(self, labels: np.ndarray, predictions: np.ndarray, classes: Sequence[str]) -> None:
        matrix = {"y_true": labels.tolist(), "preds": predictions.tolist(), "class_names": _shown(classes)}
        self.made(lambda wandb: {"confusion": wandb.plot.confusion_matrix(**matrix)})

    def mispredicted(
        self, images: np.ndarray, labels: np.ndarray, probs: np.ndarray, ids: Sequence[str], classes: Sequence[str]
    ) -> None:
        def make(wandb: Any) -> dict[str, Any]:
            table = wandb.Table(columns=["id", "cell", "true", "predicted", "probability"])
            names = _shown(classes)
            for image, label, p, name in zip(images, labels, probs, _shown(ids), strict=True):
                top = int(p.argmax())
                table.add_data(name, wandb.Image(image), names[label], names[top], float(p[top]))
            return {"mispredicted": table}

        self.made(make)

    def checkpoint_artifact(self, folder: Path, metadata: dict[str, Any]) -> None:
        def job(run: Any) -> None:
            import wandb

            artifact = wandb.Artifact(f"best-{run.id}", type="model", metadata=metadata)
            artifact.add_dir(str(folder))
            run.log_artifact(artifact)

        self._jobs.put(job)

    def close(self) -> None:
        """Sends what is left, and says what is not sent and how to send it."""
        self._jobs.put(None)
        self._thread.join(INIT_SECONDS + FINISH_SECONDS + 10)
        if self._thread.is_alive():
            log.warning("W&B: it does not end; what it has is in %s", self._run_dir / "wandb")
        elif self._folder:
            what = "logged offline; send it" if "offline-run" in self._folder else "send the rest"
            log.warning("W&B: %s with: wandb sync %s", what, self._folder)


def register_sweep(tree: dict[str, Any], project: str) -> str | None:
    """Registers a sweep's configuration with W&B's server; its id, or None, said why, where there is none to use."""
    if (why := why_offline()) is not None:
        log.warning("W&B: %s, so the sweep is not registered", why)
        return None
    import wandb

    try:
        return wandb.sweep(tree, project=project)
    except (wandb.Error, OSError) as e:
        log.warning("W&B: %s: %s, so the sweep is not registered", type(e).__name__, e)
        return None


class MultiTracker:
    """Passes everything on to several trackers."""

    def __init__(self, trackers: Sequence[Tracker]):
        self._trackers = tuple(trackers)

    def log(self, step: int, metrics: dict[str, Any], *, kind: str) -> None:
        for t in self._trackers:
            t.log(step, metrics, kind=kind)

    def summary(self, metrics: dict[str, Any]) -> None:
        for t in self._trackers:
            t.summary(metrics)

    def confusion(self, labels: np.ndarray, predictions: np.ndarray, classes: Sequence[str]) -> None:
        for t in self._trackers:
            t.confusion(labels, predictions, classes)

    def mispredicted(
        self, images: np.ndarray, labels: np.ndarray, probs: np.ndarray, ids: Sequence[str], classes: Sequence[str]
    ) -> None:
        for t in self._trackers:
            t.mispredicted(images, labels, probs, ids, classes)

    def checkpoint_artifact(self, folder: Path, metadata: dict[str, Any]) -> None:
        for t in self._trackers:
            t.checkpoint_artifact(folder, metadata)

    def close(self) -> None:
        for t in self._trackers:
            t.close()


def make_tracker(
    config: TrackingConfig,
    run_dir: Path,
    run_id: str,
    run_config: dict[str, Any],
    process_index: int = 0,
    *,
    resumed_at: int = 0,
) -> Tracker:
    """JSONL, and W&B unless it is off; on processes other than 0 nothing. `resumed_at`: the step of the checkpoint that
    the run goes on from."""
    if process_index != 0:
        return NoTracker()
    jsonl = JsonlTracker(run_dir / "metrics.jsonl", resumed_at)
    if config.wandb == "off":
        return jsonl
    try:
        return MultiTracker([jsonl, WandbTracker(config, run_dir, run_id, run_config, jsonl.last)])
    except BaseException:
        jsonl.close()
        raise
