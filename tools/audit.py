"""Known weaknesses of what bmjax is installed with: `python tools/audit.py`.

Asks pip-audit about each package of this environment. Exits with 1 and names package, version and advisory where there
is one; without pip-audit or without a network it says so and exits with 0, so that CI runs offline too.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

SECONDS = 300


def findings(report: dict) -> list[str]:
    """A line for each weakness in pip-audit's JSON report."""
    return [
        f"{package['name']} {package['version']}: {weakness['id']}, mended in "
        f"{', '.join(weakness.get('fix_versions', ())) or 'no version yet'}"
        for package in report["dependencies"]
        for weakness in package.get("vulns", ())
    ]


def main() -> int:
    if importlib.util.find_spec("pip_audit") is None:
        print("audit: skipped, for pip-audit is not installed (python -m pip install pip-audit)")
        return 0
    command = [sys.executable, "-m", "pip_audit", "--format", "json", "--progress-spinner", "off", "--skip-editable"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        report = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError) as e:
        print(f"audit: skipped, for the advisories are not to be had ({type(e).__name__})")
        return 0
    found = findings(report)
    print("\n".join(found) or f"audit: {len(report['dependencies'])} packages, no known weakness")
    return int(bool(found))


if __name__ == "__main__":
    raise SystemExit(main())
