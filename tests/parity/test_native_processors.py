"""The kernels as they are compiled for processors with less than this one: the whole of ``test_native.py`` again."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from chiasm.nn import kernels

AGAIN = """
import sys, pytest
from chiasm.nn import kernels
kernels.FLAGS = tuple(flag.replace("native", sys.argv[1]) for flag in kernels.FLAGS)
assert kernels.library() is not None
sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", sys.argv[2]]))
"""


@pytest.mark.slow
@pytest.mark.skipif(kernels.library() is None or platform.machine() != "x86_64", reason="needs g++ for x86")
@pytest.mark.parametrize(("processor", "needs"), [("x86-64-v2", "sse4_2"), ("skylake-avx512", "avx512bw")])
def test_older_processors_compute_the_same(processor, needs, tmp_path):
    """Without vectors of 512 bits; and with those, but without products of bytes and of bfloat16."""
    if needs not in kernels._processor():
        pytest.skip(f"this processor has no {needs}")
    command = [sys.executable, "-c", AGAIN, processor, str(Path(__file__).with_name("test_native.py"))]
    done = subprocess.run(command, env={**os.environ, "CHIASM_CACHE": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
