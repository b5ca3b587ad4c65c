"""What the process does to a loaded model."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

FORK = """
import os, sys
from tael import LLM, SamplingParams, TaelError

llm = LLM(sys.argv[1], max_model_len=1024)
params = SamplingParams(temperature=0, max_tokens=2)
expected = llm.generate("Hello", params)[0].text
child = os.fork()
if child == 0:
    try:
        llm.generate("Hello", params)
    except TaelError as error:
        os._exit(7 if "fork" in str(error) else 1)
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert llm.generate("Hello", params)[0].text == expected
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_is_told_to_load_its_own_model(
    model_path: Callable[[str], Path],
) -> None:
    """The threads of the pool stay behind: waiting for them would never end."""
    command = [sys.executable, "-c", FORK, str(model_path("smollm2:135m"))]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
