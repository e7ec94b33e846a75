"""Run every benchmark of this folder; what follows is handed to each."""

import subprocess
import sys
from pathlib import Path

BENCHMARKS = ("dense_to_sparse.py", "spawn_phase.py")


def main() -> int:
    """The first exit status that is not 0, or 0."""
    statuses = [
        subprocess.run([sys.executable, Path(__file__).with_name(name), *sys.argv[1:]]).returncode
        for name in BENCHMARKS
    ]
    return next((status for status in statuses if status), 0)


if __name__ == "__main__":
    sys.exit(main())
