"""Every kernel compiles for the GPUs that are supported, without one; on Hopper without spills, and to wgmma."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ahead import ARCHITECTURES, FILES

# Bytes of stack that a kernel may spill to on sm_80, whose smaller tiles were measured by nobody yet.
MOST_STACK_ON_80 = 256
ABSENT = {("quantise", 80)}  # the format is of sm_89 and later
MOST_SHARED = {80: 163 * 1024, 90: 227 * 1024}
SHARED_OF_86 = 99 * 1024
# What `sam_fast.ops.two_way_attention` asks of Triton only where there is as much as on sm_80.
LARGE = {f"{way} 128 {dtype}" for way in ("absorbed", "projected") for dtype in ("bf16", "fp16")}


@pytest.fixture(scope="module")
def compiled() -> dict[str, list[dict]]:
    """File -> one row per variant and architecture; compiled by a process without the interpreter."""
    script = Path(__file__).parents[1] / "ahead.py"
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    output = subprocess.run(
        [sys.executable, script, "--json"], check=True, capture_output=True, text=True, env=environment
    ).stdout
    rows = [json.loads(line) for line in output.splitlines()]
    return {file: [row for row in rows if row["file"] == file] for file in FILES}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("file", FILES)
def test_compiles(compiled, file, architecture):
    rows = [row for row in compiled[file] if row["architecture"] == architecture]
    assert bool(rows) != ((file, architecture) in ABSENT), f"kernels/{file}.py has {len(rows)} variants"
    for row in rows:
        if architecture == 90:
            assert row["stack"] == 0 and row["spills"] == 0, row
            assert not row["expects_wgmma"] or row["wgmma"] > 0, row
        assert row["stack"] <= MOST_STACK_ON_80, row
        small = architecture == 80 and row["variant"] not in LARGE  # sm_86 and sm_89 are launched likewise
        assert row["shared"] <= (SHARED_OF_86 if small else MOST_SHARED[architecture]), row
