"""Downloading checkpoints, from a server on this machine."""

from __future__ import annotations

import hashlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from sam_fast import checkpoints
from sam_fast.checkpoints import default_directory, download_checkpoint

CONTENT = bytes(range(251)) * 20_000  # 5 MB: five chunks
NAME = f"sam_vit_b_{hashlib.sha256(CONTENT).hexdigest()[:6]}.pth"


class _Server(ThreadingHTTPServer):
    """Serves CONTENT as NAME; the attributes make it misbehave."""

    ranges = True  # answer Range requests with 206
    stop_after: int | None = None  # close the connection after this many bytes
    say_length = True
    lull = 0.0  # seconds between the halves of a body

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requested: list[str | None] = []  # Range header of each request
        self.url = f"http://127.0.0.1:{self.server_port}/models"


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.requested.append(wanted)
        if self.path != f"/models/{NAME}":
            return self.send_error(404)
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and self.server.ranges else 0
        if start >= len(CONTENT):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(CONTENT)}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        body = CONTENT[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
        if self.server.say_length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        body = body[: self.server.stop_after]
        self.wfile.write(body[: len(body) // 2])
        time.sleep(self.server.lull)
        self.wfile.write(body[len(body) // 2 :])
        return None


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setitem(checkpoints.OFFICIAL_FILES, "vit_b", NAME)
    server = _Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_download_reports_progress(server, tmp_path):
    calls: list[tuple[int, int | None]] = []
    path = download_checkpoint("vit_b", tmp_path / "new", server.url + "/", lambda *call: calls.append(call))
    assert path == tmp_path / "new" / NAME
    assert path.read_bytes() == CONTENT
    assert list(path.parent.iterdir()) == [path]  # no .part left
    done = [call[0] for call in calls]
    assert len(done) >= 5 and done == sorted(done) and done[-1] == len(CONTENT)
    assert {call[1] for call in calls} == {len(CONTENT)}


def test_a_file_that_is_there_is_checked_not_fetched(server, tmp_path):
    (tmp_path / NAME).write_bytes(CONTENT)
    assert download_checkpoint("vit_b", tmp_path, server.url).read_bytes() == CONTENT
    assert server.requested == []


def test_a_damaged_file_that_is_there_is_named_and_kept(server, tmp_path):
    (tmp_path / NAME).write_bytes(b"damaged")
    with pytest.raises(RuntimeError, match=f"{NAME} is .*expected it to begin with {NAME[10:16]}; delete it"):
        download_checkpoint("vit_b", tmp_path, server.url)
    assert (tmp_path / NAME).read_bytes() == b"damaged"
    assert server.requested == []


def test_an_interrupted_download_goes_on(server, tmp_path):
    server.stop_after = 3_000_000
    with pytest.raises(RuntimeError, match=f"ended after 3000000 of {len(CONTENT)} bytes"):
        download_checkpoint("vit_b", tmp_path, server.url)
    assert (tmp_path / f"{NAME}.part").stat().st_size == 3_000_000
    server.stop_after = None
    calls: list[tuple[int, int | None]] = []
    path = download_checkpoint("vit_b", tmp_path, server.url, lambda *call: calls.append(call))
    assert path.read_bytes() == CONTENT
    assert server.requested == [None, "bytes=3000000-"]
    assert calls[0][0] > 3_000_000 and calls[-1] == (len(CONTENT), len(CONTENT))


@pytest.mark.parametrize("there", [0, 1_000_000], ids=["new", "begun"])
def test_downloads_at_the_same_time_make_one_request(server, tmp_path, there):
    server.lull = 0.2
    if there:
        (tmp_path / f"{NAME}.part").write_bytes(CONTENT[:there])
    with ThreadPoolExecutor() as pool:
        calls = [pool.submit(download_checkpoint, "vit_b", tmp_path, server.url) for _ in range(3)]
    assert [call.result() for call in calls] == [tmp_path / NAME] * 3
    assert (tmp_path / NAME).read_bytes() == CONTENT
    assert len(server.requested) == 1
    assert list(tmp_path.iterdir()) == [tmp_path / NAME]


def test_after_a_failure_the_next_in_line_goes_on(server, tmp_path):
    server.lull, server.stop_after = 0.2, 3_000_000
    with ThreadPoolExecutor() as pool:
        calls = [pool.submit(download_checkpoint, "vit_b", tmp_path, server.url) for _ in range(2)]
    broken = [isinstance(call.exception(), RuntimeError) for call in calls]
    assert sum(broken) == 1
    assert calls[broken.index(False)].result().read_bytes() == CONTENT
    assert server.requested == [None, "bytes=3000000-"]


def test_a_server_without_ranges_starts_again(server, tmp_path):
    (tmp_path / f"{NAME}.part").write_bytes(CONTENT[:1_000_000])
    server.ranges = False
    assert download_checkpoint("vit_b", tmp_path, server.url).read_bytes() == CONTENT
    assert server.requested == ["bytes=1000000-"]


def test_a_complete_part_is_only_checked(server, tmp_path):
    (tmp_path / f"{NAME}.part").write_bytes(CONTENT)
    assert download_checkpoint("vit_b", tmp_path, server.url).read_bytes() == CONTENT


def test_a_part_that_is_too_long_is_dropped(server, tmp_path):
    (tmp_path / f"{NAME}.part").write_bytes(CONTENT + b"more")
    assert download_checkpoint("vit_b", tmp_path, server.url).read_bytes() == CONTENT
    assert server.requested[-1] is None


def test_a_server_that_does_not_say_the_length(server, tmp_path):
    server.say_length = False
    calls: list[tuple[int, int | None]] = []
    download_checkpoint("vit_b", tmp_path, server.url, lambda *call: calls.append(call))
    assert calls[-1] == (len(CONTENT), None)


def test_a_wrong_hash_is_refused_and_the_next_call_begins_anew(server, tmp_path):
    (tmp_path / f"{NAME}.part").write_bytes(b"x" * 1_000_000)
    with pytest.raises(
        RuntimeError, match=rf"SHA-256 of .*\.part is [0-9a-f]{{64}}, expected it to begin with {NAME[10:16]}"
    ):
        download_checkpoint("vit_b", tmp_path, server.url)
    assert list(tmp_path.iterdir()) == []
    assert download_checkpoint("vit_b", tmp_path, server.url).read_bytes() == CONTENT


def test_http_errors_name_the_address(server, tmp_path):
    with pytest.raises(RuntimeError, match=rf"could not download {server.url}/sam_vit_l_0b3195\.pth: .*404"):
        download_checkpoint("vit_l", tmp_path, server.url)
    assert list(tmp_path.iterdir()) == []


def test_no_server(tmp_path):
    with pytest.raises(RuntimeError, match=r"could not download http://127\.0\.0\.1:9/"):
        download_checkpoint("vit_b", tmp_path, "http://127.0.0.1:9")


def test_unknown_model(tmp_path):
    with pytest.raises(ValueError, match="must be one of vit_b, vit_l, vit_h, got 'vit_x'"):
        download_checkpoint("vit_x", tmp_path)


def test_default_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_directory() == tmp_path / "sam_fast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_directory() == tmp_path / "home" / ".cache" / "sam_fast"


def test_official_names_end_with_the_known_hashes():
    assert checkpoints.OFFICIAL_FILES == {
        "vit_b": "sam_vit_b_01ec64.pth",
        "vit_l": "sam_vit_l_0b3195.pth",
        "vit_h": "sam_vit_h_4b8939.pth",
    }
