"""All checks, in the order of their cost: `python tools/check.py`. Format, lint, types, tests.

Further arguments go to pytest. Exits with the first failure.
"""

import subprocess
import sys

CHECKS = (
    ("ruff", "format", "--check", "."),
    ("ruff", "check", "."),
    ("pyright", "--pythonpath", sys.executable),
    # Two processes: tracing and most compiling keep one core busy. A file's tests share what they compile.
    ("pytest", "-n", "2", "--dist", "loadfile"),
)


def main() -> int:
    for module, *arguments in CHECKS:
        extra = sys.argv[1:] if module == "pytest" else []
        print("+", module, *arguments, *extra, flush=True)
        code = subprocess.run([sys.executable, "-m", module, *arguments, *extra], check=False).returncode
        if code:
            return code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
