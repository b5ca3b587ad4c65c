"""Nothing of a run of the suite goes on when its process was killed."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import os, sys
from tael.evals.context import suite

def cell(job, rows):
    os.write(1, f"{os.getpid()}\\n".encode())
    while True:
        pass

if __name__ == "__main__":
    suite._run = cell
    suite._run_isolated(None, None)
"""


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="asks the kernel when a process ends")
def test_a_cell_ends_with_the_run(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    with subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE) as run:
        assert run.stdout is not None
        child = os.pidfd_open(int(run.stdout.readline()))
        ended: list[int] = []
        try:
            run.kill()
            ended, _, _ = select.select([child], [], [], 30)
            assert ended, "the cell computes on"
        finally:
            if not ended:
                signal.pidfd_send_signal(child, signal.SIGKILL)
            os.close(child)
