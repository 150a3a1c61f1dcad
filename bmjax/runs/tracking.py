"""Trackers: JSONL on disk, always, and Weights & Biases. The only file that imports wandb, and only when used.

Only process 0 writes. After a rewind (a resume from an earlier checkpoint) nothing is logged until past the last
logged step; the steps between are the same again.
"""

from __future__ import annotations

import hashlib
import logging
import os
import queue
import re
import socket
import threading
import urllib.parse
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from bmjax.config.training import TrackingConfig
from bmjax.files import printable
from bmjax.runs.identity import downloads
from bmjax.runs.jsonl import JsonlTracker, NoTracker, Tracker
from bmjax.runs.tables import Finished, media_of, run_files

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


_MODES = {name: name for name in ("online", "offline", "disabled", "shared")} | {"dryrun": "offline", "run": "online"}
"""What WANDB_MODE may be, in any case of letters."""
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


def _why_no_server() -> str | None:
    """Why WANDB_BASE_URL is no address; None where it is one."""
    try:
        why = "" if _server().hostname and (_server().port or True) else "it names no host"
    except ValueError as e:  # a port beyond 65535, half a bracket
        why = str(e)
    return f"WANDB_BASE_URL is {os.environ.get('WANDB_BASE_URL')!r}, which is no address ({why})" if why else None


def has_key() -> bool:
    """Whether a W&B key is set in the environment or in ~/.netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    if _why_no_server() is not None:
        return False
    netrc = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    return netrc.is_file() and (_server().hostname or "") in netrc.read_text()


def reachable(timeout: float = 3.0) -> bool:
    """Whether W&B's server takes a connection."""
    try:
        url = _server()
        with socket.create_connection((url.hostname or "", url.port or (80 if url.scheme == "http" else 443)), timeout):
            return True
    except (OSError, ValueError):  # a ValueError: a port, or the name of a host, that none can have
        return False


def why_offline() -> str | None:
    """Why W&B can't be used online here; None where it can, as far as can be told beforehand."""
    if (why := _why_no_server()) is not None:
        return why
    if not has_key():
        return "there is no key"
    return None if reachable() else f"{_server().hostname} can't be reached"


def shown_as(kind: str, name: str) -> str:
    """The name that W&B shows a figure under: `val/accuracy` as it is, a step's loss `train/loss`, and an epoch's mean
    loss `epoch/train_loss`, so that the two never share a curve."""
    if kind != "epoch":
        return f"{kind}/{name}"
    if name.startswith("train/"):
        return f"epoch/{name.replace('/', '_')}"
    return name if "/" in name else f"epoch/{name}"


def project_of(config: TrackingConfig) -> str:
    """The project at W&B: the field `tracking.project`, or, where that is left as it is, WANDB_PROJECT."""
    default = TrackingConfig().project
    return (os.environ.get("WANDB_PROJECT") or default) if config.project == default else config.project


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
            entity=self._config.entity or None,
            project=project_of(self._config),
            group=self._config.group or None,
            job_type=self._config.job_type or None,
            notes=_shown(self._config.notes) or None,
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
            mode = _MODES.get(asked.strip().lower(), "")  # the user's environment decides
            why = None if mode else f"WANDB_MODE is {asked!r}, where {', '.join(_MODES)} are known"
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
        figures = {"global_step": step} | {shown_as(kind, name): value for name, value in metrics.items()}
        self._jobs.put(lambda run: run.log(figures))

    def log_media(self, make: Callable[[Any], dict[str, Any]]) -> None:
        """Logs tables and pictures by name, which `make` makes with the module wandb, in the tracker's thread."""

        def job(run: Any) -> None:
            import wandb

            run.log(make(wandb))

        self._jobs.put(job)

    def finished(self, finished: Finished) -> None:
        self.log_media(lambda wandb: media_of(wandb, finished))
        # After the last row of the history, which would write over it.
        self._jobs.put(lambda run: run.summary.update(_shown(finished.summary)))
        self._jobs.put(lambda run: self._log_artifact(run, finished))

    def _log_artifact(self, run: Any, finished: Finished) -> None:
        """The whole run as a model: what `bmjax predict wandb:ENTITY/PROJECT/NAME` reads."""
        import wandb

        split = finished.predictions.split
        metadata = finished.summary | {"split": split, "classes": list(finished.predictions.classes)}
        about = f"The run {self._run_config.get('name')}: bmjax predict wandb:ENTITY/PROJECT/best-{run.id} IMAGES"
        artifact = wandb.Artifact(f"best-{run.id}", "model", _shown(about), _shown(metadata))
        for path in run_files(finished.run_dir):
            artifact.add_file(str(path), path.relative_to(finished.run_dir).as_posix())
        run.log_artifact(artifact)

    def close(self) -> None:
        """Sends what is left, and says what is not sent and how to send it."""
        self._jobs.put(None)
        self._thread.join(INIT_SECONDS + FINISH_SECONDS + 10)
        if self._thread.is_alive():
            log.warning("W&B: it does not end; what it has is in %s", self._run_dir / "wandb")
        elif self._folder:
            what = "logged offline; send it" if "offline-run" in self._folder else "send the rest"
            log.warning("W&B: %s with: wandb sync %s", what, self._folder)


def register_sweep(tree: dict[str, Any], project: str, entity: str = "") -> str | None:
    """Registers a sweep's configuration with W&B's server; its id, or None, said why, where there is none to use."""
    if (why := why_offline()) is not None:
        log.warning("W&B: %s, so the sweep is not registered", why)
        return None
    import wandb

    try:
        return wandb.sweep(tree, entity=entity or None, project=project)
    except (wandb.Error, OSError) as e:
        log.warning("W&B: %s: %s, so the sweep is not registered", type(e).__name__, e)
        return None


REMOTE = "wandb:"


def local_run(run_dir: str | Path) -> Path:
    """A run's folder on this machine: as given, or for `wandb:ENTITY/PROJECT/NAME[:VERSION]` the artifact, downloaded.

    Without a version the latest is meant. It is kept in bmjax's cache by its digest, and files that are there already
    are checked by W&B and not fetched again. Code that such a run names is run only with trust, see `check_trust`.

    Raises:
      ValueError: it names no artifact, there is no key, the server refuses, or a file would stand outside the folder or
        come from elsewhere.
    """
    text = str(run_dir)
    if not text.startswith(REMOTE):
        return Path(run_dir)
    name = text.removeprefix(REMOTE)
    if not re.fullmatch(r"[^/:\s]+/[^/:\s]+/[^/:\s]+(:[^/:\s]+)?", name):
        raise ValueError(f"{text!r} names no artifact; expected wandb:ENTITY/PROJECT/NAME or wandb:.../NAME:VERSION")
    if (why := _why_no_server()) is not None:
        raise ValueError(f"{text}: {why}; expected one such as https://api.wandb.ai")
    if not has_key():
        raise ValueError(f"{text}: there is no key of W&B; expected WANDB_API_KEY, or `wandb login` before")
    import wandb

    try:
        artifact = wandb.Api().artifact(name if ":" in name else f"{name}:latest")
        entries = artifact.manifest.entries
        for path, entry in entries.items():
            if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts or "\\" in path:
                raise ValueError(f"it holds the file {path!r}; expected names within a run's folder")
            if ref := getattr(entry, "ref", None):  # an address, or a file of this machine, that W&B would follow
                raise ValueError(f"its file {path!r} stands elsewhere, at {ref!r}; expected files of its own")
        if "config.json" not in entries:
            raise ValueError("it holds no config.json; expected a run that bmjax logged as a model")
        folder = downloads() / hashlib.sha256(f"{name} {artifact.digest}".encode()).hexdigest()[:16]
        log.info("%s: %d files into %s", text, len(entries), folder)
        return Path(artifact.download(root=str(folder)))
    except (wandb.Error, ValueError, OSError) as e:
        raise ValueError(f"{text}: {_said(e)}") from e


class MultiTracker:
    """Passes everything on to several trackers."""

    def __init__(self, trackers: Sequence[Tracker]):
        self._trackers = tuple(trackers)

    def log(self, step: int, metrics: dict[str, Any], *, kind: str) -> None:
        for t in self._trackers:
            t.log(step, metrics, kind=kind)

    def finished(self, finished: Finished) -> None:
        for t in self._trackers:
            t.finished(finished)

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
