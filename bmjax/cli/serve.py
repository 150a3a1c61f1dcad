"""`bmjax serve`: a page and a JSON API on a run or an exported model, for this machine unless told otherwise."""

from __future__ import annotations

import argparse
import ipaddress
import logging
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bmjax.cli.output import add_checkpoint
from bmjax.cli.reading import add_pixel_size, add_threshold, check_pixel_size, check_threshold

if TYPE_CHECKING:
    from bmjax.analysis.serve.engine import Engine

log = logging.getLogger(__name__)


def add_parser(verbs: Any) -> None:
    """Adds `serve` to a parser's verbs."""
    p = verbs.add_parser(
        "serve",
        help="a page and a JSON API on a run or an exported model (extra serve)",
        description="Drop cells on the page and see class, probability, where the attention looked, and \"don't "
        "know\". A run shows its attention's map; a file of `bmjax export` has none. No image that is sent is kept. "
        "Not for diagnosis.",
    )
    p.add_argument("models", metavar="run", nargs="+",
                   help="folder of a run, or of several as one; or a .zip file of `bmjax export`")  # fmt: skip
    p.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s, this machine)")
    p.add_argument("--port", type=int, default=8765, help="0 takes a free one (default: %(default)s)")
    p.add_argument("--batch-size", type=int, default=8, help="images at most at once (default: %(default)s)")
    add_pixel_size(p)
    add_threshold(p)
    add_checkpoint(p)
    p.set_defaults(run=run)


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    del rest
    check_threshold(options)
    check_pixel_size(options)
    if not 0 <= options.port < 65536:
        raise ValueError(f"--port is {options.port}; expected one from 0 to 65535")
    if options.batch_size < 1:
        raise ValueError(f"--batch-size is {options.batch_size}; expected at least 1")
    for model in options.models:
        if not Path(model).exists():
            raise FileNotFoundError(f"{model} is not there; expected a run's folder or a file of `bmjax export`")
        if len(options.models) > 1 and not Path(model).is_dir():
            raise ValueError(f"{model} is no folder; expected folders of runs, where several are given")
    try:
        import python_multipart  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as e:
        raise ValueError(f"serve needs {e.name}; install it: pip install 'bmjax[serve]'") from e
    from bmjax.analysis.serve.app import LOOPBACK, make_app
    from bmjax.data.images.decode import quiet

    with _listening(options.host, options.port) as listener:  # an address in use is told before the model is compiled
        began = time.monotonic()
        log.info("serve: reading and compiling %s", ", ".join(options.models))
        engine = _engine(options)
        here = _is_loopback(options.host)
        name = f"[{options.host}]" if ":" in options.host else options.host
        app = make_app(engine, (*LOOPBACK, name) if here else ("*",))
        config = uvicorn.Config(
            app, loop="asyncio", http="h11", ws="none", log_config=None, log_level="warning", access_log=False,
            timeout_graceful_shutdown=2, limit_concurrency=256, server_header=False,
        )  # fmt: skip
        maps = "with" if engine.has_maps else "without"
        print(
            f"http://{name}:{listener.getsockname()[1]} serves {engine.facts.run}, {len(engine.facts.classes)} "
            f"classes, {maps} attention maps ({time.monotonic() - began:.0f} s); Ctrl-C ends it",
            flush=True,
        )
        if not here:
            log.warning(
                "--host is %s: whoever reaches this machine may use the model; there is no password and no encryption",
                options.host,
            )
        with quiet():
            uvicorn.Server(config).run(sockets=[listener])
    return 0


def _listening(host: str, port: int) -> socket.socket:
    """A socket that listens there.

    Raises:
      OSError: it can't; names the address.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
        found.listen(128)
    except OSError as e:
        found.close()
        raise OSError(f"can't listen at {host}:{port}: {e.strerror or e}; expected a free address (--port)") from e
    return found


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _engine(options: argparse.Namespace) -> Engine:
    """The model, compiled; a run's or an export's, by what the path is."""
    import dataclasses

    from bmjax.analysis.evaluate.judge import at_pixel_size, check_knows_scale, same_classes, say_unmatched
    from bmjax.analysis.evaluate.undecided import kept_calibrations, undecided_below
    from bmjax.analysis.serve.engine import engine_of_export, engine_of_runs
    from bmjax.runs.folder import load_run

    if Path(options.models[0]).is_dir():
        runs = [load_run(model, options.which, trust=options.trust) for model in options.models]
        same_classes(runs)
        say_unmatched(runs)
        calibrations = kept_calibrations(runs)
        threshold = undecided_below(runs, calibrations, options.error_rate, options.undecided)
        return engine_of_runs(at_pixel_size(runs, options.pixel_size), calibrations, threshold, options.batch_size)
    if options.error_rate is not None:
        raise ValueError("--error-rate is for a run; an export has its threshold within (`bmjax export --error-rate`)")
    engine = engine_of_export(Path(options.models[0]), options.batch_size)
    if options.pixel_size is not None:
        check_knows_scale(engine.facts.data_config(), options.pixel_size, options.models[0])
        reading = engine.facts.reading | {"pixel_size": options.pixel_size}
        engine.facts = dataclasses.replace(engine.facts, reading=reading)
    if options.undecided is not None:
        engine.facts = dataclasses.replace(engine.facts, undecided_below=options.undecided)
    return engine
