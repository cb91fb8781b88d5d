"""The model's operations in each instruction set that this CPU runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

LEVELS = ["base", "avx2", "avx512", "avx512bf16"]
FILES = ["test_gelu.py", "test_int8_rows.py", "test_perceptron.py", "test_rel_pos_attention.py"]
FILES += ["test_two_way_attention.py", "test_upscale_masks.py"]


@pytest.mark.parametrize("level", LEVELS)
def test_each_instruction_set(level):
    environment = os.environ | {"SAM_FAST_CPU": ""}
    probe = [sys.executable, "-c", "from sam_fast import native; print(native.cpu_level())"]
    best = subprocess.run(probe, env=environment, capture_output=True, text=True, check=True).stdout.strip()
    if LEVELS.index(level) > LEVELS.index(best):
        pytest.skip(f"this CPU has {best}, not {level}")
    environment["SAM_FAST_CPU"] = level
    files = [str(Path(__file__).with_name(name)) for name in FILES]
    check = f"from sam_fast import native; assert native.cpu_level() == {level!r}; import pytest, sys; "
    check += f"sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', *{files!r}]))"
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", check], env=environment, cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
