"""Fetching NLD-AA, from a server on this machine that breaks connections, lies about sizes and serves hostile archives."""

import importlib.util
import io
import re
import shutil
import stat
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

import custom_nethack_pomdp as pomdp

ROOT = Path(__file__).resolve().parents[1]
GAMES = ROOT / "tests" / "data" / "nle_data"
TASTER = "nld-aa-taster/nld-aa-taster.zip"


def load_script():
    spec = importlib.util.spec_from_file_location("get_nld_aa_script", ROOT / "scripts" / "get_nld_aa.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


script = load_script()


def zipped(files, infos=()):
    """{name: bytes} -> bytes of a zip."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        for info, content in infos:
            archive.writestr(info, content)
    return buffer.getvalue()


NOISE = np.random.default_rng(0).bytes(300_000)
PLAIN = zipped({"nld-aa/nle_data/1/a.ttyrec3.bz2": NOISE, "nld-aa/nle_data/1/nle.1.xlogfile": b"x\n", "nld-aa/nle_data/2/b": b""})


class Server(ThreadingHTTPServer):
    """Serves `files`; breaks off each of the first `breaks` answers after `burst` bytes. Keeps (path, Range, If-Range) in `asked`."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.breaks, self.burst, self.ranges, self.errors, self.asked = {}, 0, 100_000, True, [], []
        self.etag, self.extra, self.shift, self.length = '"one"', 0, 0, True
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        server, wanted = self.server, self.headers.get("Range")
        server.asked.append((self.path, wanted, self.headers.get("If-Range")))
        if server.errors:
            self.send_error(server.errors.pop(0))
            return
        content = server.files.get(self.path.lstrip("/"))
        if content is None:
            self.send_error(404)
            return
        first = 0
        if wanted and server.ranges and self.headers.get("If-Range") == server.etag:
            first = int(re.fullmatch(r"bytes=(\d+)-", wanted).group(1)) + server.shift
            if first >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        if server.etag:
            self.send_header("ETag", server.etag)
        if server.length:
            self.send_header("Content-Length", str(len(content) - first + server.extra))
        self.end_headers()
        body = content[first:]
        if server.breaks > 0:
            server.breaks -= 1
            body = body[: server.burst]
        self.wfile.write(body)
        self.close_connection = True


@pytest.fixture
def server():
    server = Server()
    server.files[TASTER] = PLAIN
    yield server
    server.shutdown()
    server.server_close()


def get(server, out, *arguments):
    return script.main(["--out", str(out), "--base_url", server.url, "--pause", "0", "--timeout", "5", "--retries", "2", *arguments])


def files_of(out):
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*"))
            if path.is_file() and not path.name.startswith(".") and script.DOWNLOADS not in path.parts}  # fmt: skip


def unpacked(archive):
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        return {info.filename: opened.read(info) for info in opened.infolist() if not info.is_dir()}


def mistake(capsys):
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("get_nld_aa: error: ") and sum("error:" in line for line in lines) == 1
    return lines[-1]


# --- it works
def test_games_are_fetched_and_can_be_found(tmp_path, server, capsys):
    """A real folder of games, as the project reads it; the second time nothing is fetched."""
    folder = GAMES / "mon-hum-neu-1-4"
    server.files[TASTER] = zipped({f"nld-aa-taster/nle_data/one/{path.name}": path.read_bytes() for path in folder.iterdir()})
    assert get(server, tmp_path / "out") == 0
    found = pomdp.find_nld_games(tmp_path / "out", "mon-hum-neu")
    assert len(found.games) == 1 and not found.problems
    text = capsys.readouterr().out
    assert f"inspect_data.py {tmp_path / 'out'}" in text and f"--data_path {tmp_path / 'out'}" in text
    assert list((tmp_path / "out" / script.DOWNLOADS).iterdir()) == []
    assert get(server, tmp_path / "out") == 0 and len(server.asked) == 1 and "unpacked before" in capsys.readouterr().out


def test_parts_have_the_names_of_the_data_set(tmp_path, server):
    server.files = {f"nld-aa/nld-aa-dir-{part}.zip": zipped({f"nle_data/{part}/game": part}) for part in ("aa", "ab", "ap")}
    assert get(server, tmp_path, "--parts", "1-2,ap", "--keep_zips") == 0
    assert files_of(tmp_path) == {f"nle_data/{part}/game": part.encode() for part in ("aa", "ab", "ap")}
    assert len(list((tmp_path / script.DOWNLOADS).glob("*.zip"))) == 3
    assert len(script.archives("all", script.BASE_URL)) == 16
    assert script.archives("taster", script.BASE_URL)[0].url == "https://dl.fbaipublicfiles.com/nld/nld-aa-taster/nld-aa-taster.zip"
    assert script.archives("16", script.BASE_URL)[0].url == "https://dl.fbaipublicfiles.com/nld/nld-aa/nld-aa-dir-ap.zip"


# --- trouble with the connection
def test_a_broken_connection_goes_on_where_it_stopped(tmp_path, server):
    server.breaks = 2
    assert get(server, tmp_path) == 0
    assert files_of(tmp_path) == unpacked(PLAIN)
    assert [asked[1] for asked in server.asked] == [None, "bytes=100000-", "bytes=200000-"]
    assert [asked[2] for asked in server.asked] == [None, '"one"', '"one"']


def test_another_command_goes_on_where_the_first_gave_up(tmp_path, server, capsys):
    server.breaks, server.burst = 3, 70_000
    server.errors = [500, 503, 500]
    assert get(server, tmp_path) == 2 and "tried 3 times" in mistake(capsys) and len(server.asked) == 3
    server.burst = 0
    assert get(server, tmp_path) == 2  # nothing comes
    server.burst, server.breaks = 70_000, 1
    assert get(server, tmp_path) == 0 and files_of(tmp_path) == unpacked(PLAIN)


def test_a_server_that_ignores_ranges_is_read_from_the_start(tmp_path, server):
    server.breaks, server.ranges = 1, False
    assert get(server, tmp_path) == 0 and files_of(tmp_path) == unpacked(PLAIN)
    assert [asked[1] for asked in server.asked] == [None, "bytes=100000-"]


def test_a_file_that_has_changed_is_fetched_anew(tmp_path, server, capsys):
    server.breaks = 1
    server.errors = []
    assert script.main(["--out", str(tmp_path), "--base_url", server.url, "--retries", "0", "--pause", "0"]) == 2
    server.files[TASTER], server.etag = zipped({"other": NOISE[::-1]}), '"two"'
    assert get(server, tmp_path) == 0 and files_of(tmp_path) == {"other": NOISE[::-1]}


def test_without_anything_to_know_the_file_by_no_range_is_asked_for(tmp_path, server):
    server.etag, server.breaks = None, 1
    assert get(server, tmp_path) == 0 and files_of(tmp_path) == unpacked(PLAIN)
    assert [asked[1] for asked in server.asked] == [None, None]


def test_another_range_than_was_asked_for_is_not_glued_on(tmp_path, server):
    server.breaks, server.shift = 1, 7
    assert get(server, tmp_path) == 0 and files_of(tmp_path) == unpacked(PLAIN)


def test_what_was_fetched_whole_before_is_used(tmp_path, server):
    """The run before was stopped between the last byte and the renaming."""
    folder = tmp_path / script.DOWNLOADS
    folder.mkdir()
    (folder / "nld-aa-taster.zip.part").write_bytes(PLAIN)
    script.write_json(folder / "nld-aa-taster.zip.part.json", {"validator": '"one"', "bytes": len(PLAIN)})
    assert get(server, tmp_path) == 0 and files_of(tmp_path) == unpacked(PLAIN) and len(server.asked) == 1
    shutil.rmtree(tmp_path / "nld-aa")
    (tmp_path / script.DONE).unlink()
    (folder / "nld-aa-taster.zip.part").write_bytes(PLAIN + b"more")  # longer than the server's
    script.write_json(folder / "nld-aa-taster.zip.part.json", {"validator": '"one"', "bytes": len(PLAIN)})
    assert get(server, tmp_path) == 0 and files_of(tmp_path) == unpacked(PLAIN)


def test_a_server_that_promises_more_than_it_sends(tmp_path, server, capsys):
    server.extra, server.ranges = 10, False
    assert get(server, tmp_path) == 2 and not files_of(tmp_path)
    assert "bytes" in mistake(capsys) and not list((tmp_path / script.DOWNLOADS).glob("*.zip"))


def test_errors_of_the_server(tmp_path, server, capsys):
    server.errors = [503, 500]  # pass
    assert get(server, tmp_path / "a") == 0
    server.files.clear()
    asked = len(server.asked)
    assert get(server, tmp_path / "b") == 2 and "404" in mistake(capsys) and len(server.asked) == asked + 1
    server.shutdown()
    server.server_close()
    assert get(server, tmp_path / "c") == 2 and "tried 3 times" in mistake(capsys)


# --- trouble with the archive
def test_a_truncated_archive_is_removed_and_fetched_anew(tmp_path, server, capsys):
    server.files[TASTER], server.length = PLAIN[:-30], False  # a server that does not say how long it is
    assert get(server, tmp_path) == 2 and "is damaged" in mistake(capsys)
    assert not files_of(tmp_path) and not list((tmp_path / script.DOWNLOADS).iterdir())
    server.files[TASTER] = PLAIN
    assert get(server, tmp_path) == 0 and files_of(tmp_path) == unpacked(PLAIN)


def test_a_changed_byte_is_noticed(tmp_path, server, capsys):
    place = PLAIN.index(NOISE[1000:1050])  # noise is stored as it is
    server.files[TASTER] = PLAIN[:place] + b"!" + PLAIN[place + 1 :]
    assert get(server, tmp_path) == 2 and "CRC-32" in mistake(capsys)
    assert not any(name.endswith("bz2") for name in files_of(tmp_path)) and not list(tmp_path.rglob("*.part"))


def special(name, kind):
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, (kind | 0o777) << 16
    return info


@pytest.mark.parametrize("hostile", ["../out.txt", "a/../../out.txt", "/tmp/out.txt", "a\\..\\..\\out.txt", "C:/out.txt", "a/\x1b[31m"])
def test_names_that_lead_outside_are_refused(tmp_path, server, capsys, hostile):
    """Before anything is written, also of the files before it."""
    server.files[TASTER] = zipped({"good": b"1", hostile: b"2"})
    out = tmp_path / "deep" / "out"
    assert get(server, out) == 2 and "is refused" in mistake(capsys)
    assert not files_of(out) and not (tmp_path / "out.txt").exists() and not (tmp_path / "deep" / "out.txt").exists()


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR], ids=["link", "pipe", "device"])
def test_links_and_devices_are_refused(tmp_path, server, capsys, kind):
    server.files[TASTER] = zipped({"good": b"1"}, [(special("evil", kind), b"/etc")])
    assert get(server, tmp_path) == 2 and "no plain file" in mistake(capsys) and not files_of(tmp_path)


def test_nothing_is_written_through_a_link_or_over_another_file(tmp_path, server, capsys):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "nld-aa").symlink_to(elsewhere)
    assert get(server, tmp_path / "out") == 2 and "behind a link" in mistake(capsys)
    assert not files_of(elsewhere)
    (tmp_path / "out" / "nld-aa").unlink()
    mine = tmp_path / "out" / "nld-aa" / "nle_data" / "2" / "b"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    assert get(server, tmp_path / "out") == 2 and "another content" in mistake(capsys) and mine.read_text() == "mine"
    mine.write_text("")  # as in the archive
    assert get(server, tmp_path / "out") == 0 and files_of(tmp_path / "out") == unpacked(PLAIN)


def test_too_little_space_is_said_before(tmp_path, server, capsys):
    buffer = bytearray(PLAIN)
    central = buffer.rindex(b"PK\x01\x02", 0, buffer.rindex(b"PK\x01\x02"))
    buffer[central + 24 : central + 28] = (2**32 - 2).to_bytes(4, "little")  # claims 4 GB unpacked
    server.files[TASTER] = bytes(buffer)
    free = shutil.disk_usage(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script.shutil, "disk_usage", lambda _: free._replace(free=10**9))
        assert get(server, tmp_path) == 2
    assert "GB are free" in mistake(capsys) and not files_of(tmp_path)


# --- mistakes
@pytest.mark.parametrize("arguments, says", [
    (["--parts", "17"], "numbers from 1 to 16"), (["--parts", "3-1"], "numbers from 1 to 16"), (["--parts", "x"], "numbers from 1 to 16"),
    (["--parts", ""], "numbers from 1 to 16"), (["--base_url", "file:///etc"], "http:// or https://"), (["--retries", "-1"], "negative"),
])  # fmt: skip
def test_mistakes_get_one_line(tmp_path, capsys, arguments, says):
    assert script.main(["--out", str(tmp_path / "out"), *arguments]) == 2
    assert says in mistake(capsys) and not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_to_or_is_in_use(tmp_path, server, capsys):
    import fcntl

    (tmp_path / "file").write_text("")
    assert get(server, tmp_path / "file") == 2 and "cannot write" in mistake(capsys)
    with open(tmp_path / f"{script.DONE}.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert get(server, tmp_path) == 2 and "another get_nld_aa" in mistake(capsys)
