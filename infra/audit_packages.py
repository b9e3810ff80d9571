"""Looks up known vulnerabilities of the packages that a deployment installs; ``make check`` calls it.

``python -m infra.audit_packages``; exit code 1 if there are some, with the versions that fix them. If advisories
cannot be reached, it logs one line and the check continues.
"""

import json
import subprocess
import sys
from typing import Any

from tasks.files import REPOSITORY

LOCKS = ("requirements-cpu.lock", "requirements-gpu.lock")
CONNECTION_S, LONGEST_S = 10, 180


def main() -> int:
    """Audits the hash-pinned packages; returns the exit code."""
    found, unknown = [], ""
    for lock in LOCKS:
        packages = ask_advisories(str(REPOSITORY / "infra" / lock))
        found += [package for package in packages if package.get("vulns")]
        if not any("vulns" in package for package in packages):
            unknown = lock
            break  # the next lock would wait just as long
    for package in found:
        for flaw in package["vulns"]:
            fixed_in = ", ".join(flaw["fix_versions"]) or "no version yet"
            print(f"{package['name']} {package['version']}: {flaw['id']}, fixed in {fixed_in}")
    if unknown:
        also = "" if unknown == LOCKS[-1] else f" and {LOCKS[-1]}"
        print(
            f"note: no advisories could be fetched for {unknown}{also}, whose packages were not audited",
            file=sys.stderr,
        )
    return 1 if found else 0


def ask_advisories(lock: str) -> list[dict[str, Any]]:
    """pip-audit's result for each package of a lock, ``name, version, vulns``; empty if it has none."""
    command = [sys.executable, "-m", "pip_audit", "--progress-spinner", "off", "--format", "json", "--disable-pip"]
    command += ["--timeout", str(CONNECTION_S), "--require-hashes", "--requirement", lock]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST_S, check=False)
        return list(json.loads(done.stdout)["dependencies"])
    except (subprocess.TimeoutExpired, OSError, ValueError, KeyError):
        return []


if __name__ == "__main__":
    sys.exit(main())
