"""Several real processes on loopback that run one command together, as hosts do."""

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment(devices: int = 1, **further: str) -> dict[str, str]:
    """That of a process with so many CPU devices."""
    flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in f]
    flags.append(f"--xla_force_host_platform_device_count={devices}")
    given = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "OMPI_"))}
    return given | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags)} | further


class Processes:
    """`bmjax` with the same words on so many hosts."""

    def __init__(self, words, hosts=2, devices=1, cwd=None, **further):
        command = [sys.executable, "-m", "bmjax", *map(str, words), "--hosts", str(hosts)]
        command += ["--coordinator", f"127.0.0.1:{free_port()}", "--host"]
        self.started = [
            subprocess.Popen(
                [*command, str(i)],
                env=environment(devices, **further),
                cwd=cwd,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for i in range(hosts)
        ]

    def ended(self, timeout=240) -> list[tuple[int, str, str]]:
        """(exit status, standard output, standard error) of each, when all have ended."""
        until, found = time.monotonic() + timeout, []
        try:
            for process in self.started:
                out, err = process.communicate(timeout=max(1.0, until - time.monotonic()))
                found.append((process.returncode, out, err))
        finally:
            self.kill()
        return found

    def signal(self, host: int, number: signal.Signals) -> None:
        self.started[host].send_signal(number)

    def kill(self) -> None:
        for process in self.started:
            with contextlib.suppress(OSError):
                process.kill()


def together(words, hosts=2, devices=1, cwd=None, **further) -> list[tuple[int, str, str]]:
    return Processes(words, hosts, devices, cwd, **further).ended()


def run_alone(words, cwd, devices=1, **further) -> None:
    """`bmjax` in one process."""
    command = [sys.executable, "-m", "bmjax", *map(str, words)]
    ended = subprocess.run(
        command, env=environment(devices, **further), cwd=cwd, capture_output=True, text=True, timeout=240
    )
    assert ended.returncode == 0, ended.stderr
