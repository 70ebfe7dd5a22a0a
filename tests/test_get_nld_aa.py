# SPDX-License-Identifier: MIT
"""scripts/get_nld_aa.sh against a server on this machine: breaks, damage, hostile archives,
mistakes."""

import io
import os
import re
import subprocess
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from conftest import LIMIT_S

import custom_nethack_pomdp as pomdp

ROOT = Path(__file__).resolve().parents[1]
TASTER = "/nld-aa-taster/nld-aa-taster.zip"


def zipped(files):
    """{name or ZipInfo: bytes} -> bytes of a zip."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


NOISE = np.random.default_rng(0).bytes(300_000)
PLAIN = {"nle_data/1/a.ttyrec3.bz2": NOISE, "nle_data/1/nle.1.xlogfile": b"x\n"}


class Handler(BaseHTTPRequestHandler):
    """Serves `files`; breaks off the first `breaks` answers after 100,000 bytes; keeps the ranges
    asked for."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        server, content, wanted = (
            self.server,
            self.server.files.get(self.path),
            self.headers.get("Range"),
        )
        if content is None:
            self.send_error(404)
            return
        first = (
            int(re.fullmatch(r"bytes=(\d+)-", wanted).group(1)) if wanted and server.ranges else 0
        )
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(server.claimed or len(content) - first))
        self.end_headers()
        if self.command == "GET":
            server.asked.append(wanted)
            end = first + 100_000 if len(server.asked) <= server.breaks else None
            self.wfile.write(content[first:end])
        self.close_connection = True

    do_HEAD = do_GET


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.breaks, server.ranges, server.claimed, server.asked = (
        {TASTER: zipped(PLAIN)},
        0,
        True,
        0,
        [],
    )
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def get(server, *arguments):
    """-> exit code, standard output, last line of standard error."""
    environment = {
        **os.environ,
        "NLD_URL": f"http://127.0.0.1:{server.server_port}",
        "NLD_PAUSE": "0",
    }
    command = ["bash", str(ROOT / "scripts" / "get_nld_aa.sh"), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    return done.returncode, done.stdout, (done.stderr.splitlines() or [""])[-1]


def files_of(out):
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in out.rglob("[!.]*")
        if path.is_file()
    }


def test_games_are_fetched_and_can_be_found_and_are_not_fetched_twice(tmp_path, server):
    folder = ROOT / "tests" / "data" / "nle_data" / "mon-hum-neu-1-4"
    server.files[TASTER] = zipped(
        {f"nle_data/one/{path.name}": path.read_bytes() for path in folder.iterdir()}
    )
    out = tmp_path / "some games"
    assert get(server, out)[0] == 0
    games, problems = pomdp.find_nld_games(out, "mon-hum-neu")
    assert len(games) == 1 and not problems
    assert sum(path.stat().st_size for path in out.glob(".*")) == 0, "the archive takes room"
    code, text, _ = get(server, out)
    assert code == 0 and "unpacked before" in text and len(server.asked) == 1


def test_parts_have_the_names_of_the_data_set(tmp_path, server):
    server.files = {
        f"/nld-aa/nld-aa-dir-{part}.zip": zipped({f"{part}/game": part})
        for part in ("aa", "ab", "ap")
    }
    assert get(server, tmp_path, "aa", "ap")[0] == 0
    assert files_of(tmp_path) == {"aa/game": b"aa", "ap/game": b"ap"}
    code, _, error = get(
        server, tmp_path, "all"
    )  # goes through the letters, up to the first that is missing
    assert (
        code == 2
        and "nld-aa-dir-ac.zip cannot be fetched" in error
        and "ab/game" in files_of(tmp_path)
    )


@pytest.mark.parametrize(
    "ranges, asked",
    [(True, [None, "bytes=100000-", "bytes=200000-"]), (False, [None, "bytes=100000-", None])],
)
def test_a_broken_connection_goes_on_where_it_stopped(tmp_path, server, ranges, asked):
    """Or from the beginning, where the server cannot go on in the middle."""
    server.breaks, server.ranges = (2 if ranges else 1), ranges
    assert get(server, tmp_path)[0] == 0 and files_of(tmp_path) == PLAIN and server.asked == asked


def test_the_next_command_goes_on_too(tmp_path, server):
    (tmp_path / ".nld-aa-taster.zip").write_bytes(
        server.files[TASTER][:1000]
    )  # left by a command that was killed
    assert (
        get(server, tmp_path)[0] == 0
        and files_of(tmp_path) == PLAIN
        and server.asked == ["bytes=1000-"]
    )


def test_a_changed_byte_is_noticed_before_anything_is_unpacked(tmp_path, server):
    content = server.files[TASTER]
    place = content.index(NOISE[1000:1050])  # noise is stored as it is
    server.files[TASTER] = content[:place] + b"!" + content[place + 1 :]
    code, _, error = get(server, tmp_path)
    assert code == 2 and "damaged" in error and not files_of(tmp_path)
    server.files[TASTER] = content
    assert get(server, tmp_path)[0] == 0 and files_of(tmp_path) == PLAIN, (
        "the damaged archive was kept"
    )


def link(name):
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, 0o120777 << 16
    return info


@pytest.mark.parametrize(
    "hostile", ["../out.txt", "a/../../out.txt", "/tmp/out.txt", link("a")], ids=str
)
def test_archives_that_lead_outside_are_refused(tmp_path, server, hostile):
    server.files[TASTER] = zipped({"good": b"1", hostile: b"/etc"})
    code, _, error = get(server, tmp_path / "out")
    assert code == 2 and "is refused" in error and not files_of(tmp_path)


def test_mistakes_get_one_line(tmp_path, server):
    (tmp_path / "file").touch()
    with open(tmp_path / ".get_nld_aa.lock", "w") as lock:
        pomdp.fcntl.flock(lock, pomdp.fcntl.LOCK_EX)
        assert "another get_nld_aa.sh is at work" in get(server, tmp_path)[2]
    for says, arguments in {
        "give the folder": (),
        "there is no part aq; there are taster, aa ab": (tmp_path, "aa", "aq"),
        "cannot write to": (tmp_path / "file" / "folder",),
    }.items():
        code, _, error = get(server, *arguments)
        assert code == 2 and error.startswith("error: ") and says in error
    server.claimed = 2**55
    assert "make room" in get(server, tmp_path)[2]
    assert not server.asked
