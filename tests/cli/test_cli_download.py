"""`sam-fast download`, from a server of its own that stands in for the official one."""

from __future__ import annotations

import functools
import hashlib
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from sam_fast import checkpoints

CONTENT = bytes(range(256)) * 4096


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """The tests' output is no access log."""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder that the server serves; `vit_b` is a file of 1 MiB in it, named by its true hash."""
    folder = tmp_path / "served"
    folder.mkdir()
    name = f"sam_vit_b_{hashlib.sha256(CONTENT).hexdigest()[:6]}.pth"
    (folder / name).write_bytes(CONTENT)
    http = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(folder)))
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    real = checkpoints.download_checkpoint
    url = f"http://127.0.0.1:{http.server_port}/"
    monkeypatch.setattr(checkpoints, "OFFICIAL_FILES", {"vit_b": name, "vit_l": "sam_vit_l_000000.pth"})
    monkeypatch.setattr(checkpoints, "download_checkpoint", functools.partial(real, base_url=url))
    yield folder
    http.shutdown()
    thread.join()
    http.server_close()


def test_prints_the_path_of_the_file(cli: Any, server: Path, tmp_path: Path) -> None:
    path = Path(cli("download", "vit_b", "--directory", tmp_path / "weights").strip())
    assert path.parent == tmp_path / "weights"
    assert path.read_bytes() == CONTENT
    (server / path.name).unlink()
    assert Path(cli("download", "vit_b", "--directory", tmp_path / "weights").strip()) == path  # it is there already


def test_failure_is_one_line(cli: Any, server: Path, tmp_path: Path) -> None:
    text = cli("download", "vit_l", "--directory", tmp_path, expect=1)
    assert "404" in text
    assert len(text.splitlines()) == 1


def test_unknown_model_is_a_usage_error(cli: Any, server: Path, tmp_path: Path) -> None:
    assert "vit_x" in cli("download", "vit_x", "--directory", tmp_path, expect=2)
