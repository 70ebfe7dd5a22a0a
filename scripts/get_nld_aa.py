"""Fetch NLD-AA, the recorded games of AutoAscend, and unpack it: the small taster pack, or numbered parts of the whole.

    python scripts/get_nld_aa.py --out DATA_DIR                       # the taster pack: 1,934 games, a download of 1.7 GB
    python scripts/get_nld_aa.py --out DATA_DIR --parts 1-3           # parts aa, ab and ac, some 6 GB each
    python scripts/get_nld_aa.py --out DATA_DIR --parts all           # all 16, some 90 GB

A download that breaks off goes on where it stopped, by itself and when the command is given again. Its size is compared with
what the server says; no checksums of the archives are published, but every file in them has one, which is compared while it is
unpacked. A file is unpacked only inside DATA_DIR: an archive with names that lead outside, links or devices is refused
before anything is written. What was unpacked before is not fetched again, and an archive is removed once it is unpacked, unless
`--keep_zips` is given.

The data is Meta's (NetHack General Public License), described in arXiv 2211.00539; the addresses are those of NLE's DATASET.md.
"""
import argparse
import fcntl
import http.client
import json
import os
import shutil
import stat
import sys
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import Any, Dict, List, NamedTuple, Optional, Sequence
from urllib.parse import urlparse

from tqdm import tqdm

BASE_URL = "https://dl.fbaipublicfiles.com/nld"
PARTS = [f"a{letter}" for letter in "abcdefghijklmnop"]  # nld-aa-dir-aa.zip to nld-aa-dir-ap.zip
PIECE = 1 << 20  # bytes read at a time
DONE = ".nld_aa.json"  # in DATA_DIR: the archives that were unpacked
DOWNLOADS = ".downloads"  # in DATA_DIR; readers of games pass over it, since it holds no xlogfile


class UserError(Exception):
    """What the user can mend: told in one line, exit code 2."""


class Broken(Exception):
    """A download broke off, or the server was not able to answer: trying again may help."""


class Archive(NamedTuple):
    name: str
    url: str


def archives(parts: str, base_url: str) -> List[Archive]:
    """taster, all, or numbers, ranges and letters by commas: '1-3,ap'. Raises UserError."""
    base = base_url.rstrip("/")
    if urlparse(base).scheme not in ("http", "https") or not urlparse(base).netloc:
        raise UserError(f"--base_url must begin with http:// or https://, not {base_url!r}")
    if parts == "taster":
        return [Archive("nld-aa-taster.zip", f"{base}/nld-aa-taster/nld-aa-taster.zip")]
    chosen: List[str] = []
    for word in (",".join(PARTS) if parts == "all" else parts).split(","):
        first, dash, last = word.strip().partition("-")
        ends = [PARTS.index(end) + 1 if end in PARTS else int(end) if end.isdecimal() else 0 for end in (first, last if dash else first)]
        if not 1 <= ends[0] <= ends[1] <= len(PARTS):
            raise UserError(f"--parts takes taster, all, or numbers from 1 to {len(PARTS)} such as 1-3,7, not {parts!r}")
        chosen += [part for part in PARTS[ends[0] - 1 : ends[1]] if part not in chosen]
    return [Archive(f"nld-aa-dir-{part}.zip", f"{base}/nld-aa/nld-aa-dir-{part}.zip") for part in chosen]


# --- downloading
def read_json(path: Path) -> Dict[str, Any]:
    """The object in a file, {} if there is none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_json(path: Path, content: Dict[str, Any]) -> None:
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(json.dumps(content, indent=1), encoding="utf-8")
    os.replace(fresh, path)


def content_range(text: Optional[str]) -> Sequence[Optional[int]]:
    """'bytes 5-9/10' -> (5, 10); 'bytes */10' -> (None, 10); what is not of that form -> (None, None)."""
    place, slash, total = (text or "").removeprefix("bytes ").partition("/")
    first = place.partition("-")[0]
    return (int(first) if first.isdecimal() else None, int(total) if slash and total.isdecimal() else None)


def check_space(folder: Path, needed: int, what: str) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(f"{what} needs {needed / 1e9:.1f} GB more in {folder}, where {free / 1e9:.1f} GB are free")


def fetch_once(url: str, part: Path, timeout: float, bar: Any) -> None:
    """Goes on with the download in `part` to its end. Raises Broken where that fails, UserError where it cannot work.

    Beside `part` lies a note of the file's ETag or date: if the server's file has changed since, the download begins anew.
    """
    note = part.with_name(part.name + ".json")
    have, known = (part.stat().st_size if part.exists() else 0), read_json(note)
    headers = {"Accept-Encoding": "identity", "User-Agent": "get_nld_aa"}
    if have and known.get("validator"):
        headers.update({"Range": f"bytes={have}-", "If-Range": known["validator"]})
    else:
        have = 0
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout) as response:
            first, total = content_range(response.headers.get("Content-Range"))
            if response.status == 206 and first != have:
                part.unlink(missing_ok=True)
                raise Broken("the server sent another part of the file than was asked for")
            if response.status != 206:  # a server that does not do ranges, or another file than before
                have, length = 0, response.headers.get("Content-Length")
                total = int(length) if length is not None and length.isdecimal() else None
            etag = response.headers.get("ETag", "")
            validator = etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified")
            check_space(part.parent, (total or have) - have, part.name)
            write_json(note, {"validator": validator, "bytes": total})
            bar.reset(total)
            bar.update(have)
            with open(part, "r+b" if have else "wb") as file:
                file.seek(have)
                file.truncate()
                while data := response.read(PIECE):
                    file.write(data)
                    have += len(data)
                    bar.update(len(data))
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 416 and content_range(error.headers.get("Content-Range"))[1] == have:
                return  # it is whole: the run before was stopped just then
            if error.code == 416:
                part.unlink(missing_ok=True)
                raise Broken("the server's file is shorter than what was fetched of it") from None
            if error.code in (408, 425, 429) or error.code >= 500:
                raise Broken(f"the server answers {error.code} {error.reason}") from None
            raise UserError(f"{url}: the server answers {error.code} {error.reason}") from None
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
        raise Broken(" ".join(str(getattr(error, "reason", None) or error or type(error).__name__).split())) from None
    if total is not None and have > total:
        part.unlink(missing_ok=True)
        raise Broken(f"the server sent {have:,} bytes of a file of {total:,}")
    if total is not None and have < total:
        raise Broken(f"the connection ended after {have:,} of {total:,} bytes")


def fetch(archive: Archive, folder: Path, retries: int, timeout: float, pause: float) -> Path:
    """Downloads an archive into the folder; tries again `retries` times without progress. Raises UserError."""
    whole, part = folder / archive.name, folder / (archive.name + ".part")
    if whole.exists():
        return whole
    failed = 0
    with tqdm(desc=archive.name, unit="B", unit_scale=True, disable=None) as bar:
        while True:
            before = part.stat().st_size if part.exists() else 0
            try:
                fetch_once(archive.url, part, timeout, bar)
                break
            except Broken as error:
                after = part.stat().st_size if part.exists() else 0
                failed = 1 if after > before else failed + 1
                if failed > retries:
                    raise UserError(f"{archive.url}: {error}; tried {failed} times. What was fetched is kept: "
                                    "give the same command again to go on") from None  # fmt: skip
                tqdm.write(f"get_nld_aa: {archive.name}: {error}; trying again", file=sys.stderr)
                time.sleep(min(pause * 2 ** (failed - 1), 60))
    os.replace(part, whole)
    part.with_name(part.name + ".json").unlink(missing_ok=True)
    return whole


# --- unpacking
def check_member(member: zipfile.ZipInfo, archive: str) -> None:
    """Raises UserError for a file that an archive of games has no business holding."""
    kind, name = member.external_attr >> 16, member.orig_filename
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or not name.isprintable():
        raise UserError(f"{archive} is refused: it holds {name!r}, which may lead out of the folder")
    if stat.S_IFMT(kind) not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise UserError(f"{archive} is refused: {name!r} is no plain file (a link or a device)")
    if member.flag_bits & 1:
        raise UserError(f"{archive} is refused: {name!r} is encrypted")


def unpack_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, out: Path, bar: Any) -> None:
    """Writes one file, under its name only once it is whole; one that is there with the same content stays as it is."""
    target = out / member.filename
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.parent.resolve().is_relative_to(out.resolve()) or target.is_symlink():
        raise UserError(f"{target} lies behind a link: remove the link, or choose another --out")
    if target.exists():
        if not target.is_file() or target.stat().st_size != member.file_size or crc_of(target) != member.CRC:
            raise UserError(f"{target} exists with another content: remove it, or choose another --out")
        bar.update(member.file_size)
        return
    part = target.with_name(f".{target.name}.part")
    part.unlink(missing_ok=True)
    try:
        with archive.open(member) as source, open(part, "xb") as file:
            while data := source.read(PIECE):  # compares size and checksum at its end
                file.write(data)
                bar.update(len(data))
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def crc_of(path: Path) -> int:
    crc = 0
    with open(path, "rb") as file:
        while data := file.read(PIECE):
            crc = zlib.crc32(data, crc)
    return crc


def unpack(path: Path, out: Path) -> int:
    """Unpacks an archive into the folder. -> number of files. Raises UserError; a damaged archive is removed."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            for member in members:
                check_member(member, path.name)
            files = [member for member in members if not member.is_dir()]
            new = [member for member in files if not (out / member.filename).exists()]
            check_space(out, sum(member.file_size for member in new), f"unpacking {path.name}")
            with tqdm(total=sum(member.file_size for member in files), desc=f"unpacking {path.name}", unit="B", unit_scale=True,
                      disable=None) as bar:  # fmt: skip
                for member in files:
                    unpack_member(archive, member, out, bar)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        path.unlink()
        raise UserError(f"{path.name} is damaged ({error}) and was removed: give the same command again to fetch it anew") from None
    return len(files)


# --- the command line
def run(args: argparse.Namespace) -> None:
    wanted = archives(args.parts, args.base_url)
    out = Path(args.out).expanduser()
    downloads = out / DOWNLOADS
    try:
        downloads.mkdir(parents=True, exist_ok=True)
        lock = open(out / f"{DONE}.lock", "a")
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another get_nld_aa is at work in {out}") from None
        for archive in wanted:
            done = read_json(out / DONE)
            if archive.name in done:
                print(f"{archive.name}: unpacked before, {done[archive.name]['files']:,} files")
                continue
            path = fetch(archive, downloads, args.retries, args.timeout, args.pause)
            size = path.stat().st_size
            files = unpack(path, out)
            write_json(out / DONE, {**done, archive.name: {"url": archive.url, "bytes": size, "files": files}})
            print(f"{archive.name}: {size / 1e9:.2f} GB fetched, {files:,} files unpacked")
            if not args.keep_zips:
                path.unlink()
    print(f"\nThe games are in {out}. What next:\n"
          f"  python scripts/inspect_data.py {out} --quick\n"
          f"  python custom_nethack_pomdp.py --data_path {out} --character mon-hum-neu")  # fmt: skip


def parse(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder to unpack into; made if need be, added to if it exists")
    parser.add_argument("--parts", default="taster", help="taster, all, or parts such as 1-3,7 (default: %(default)s)")
    parser.add_argument("--base_url", default=BASE_URL, help="where the archives lie, for a mirror (default: %(default)s)")
    parser.add_argument("--keep_zips", action="store_true", help=f"keep the archives, in OUT/{DOWNLOADS}")
    parser.add_argument("--retries", type=int, default=8, help="tries without progress before giving up (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds without a byte that break a connection (default: %(default)s)")
    parser.add_argument("--pause", type=float, default=1.0, help="seconds before the first new try; doubled at each (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: Optional[Sequence[str]] = None) -> int:
    args = parse(argv)
    try:
        if args.retries < 0 or args.timeout <= 0 or args.pause < 0:
            raise UserError("--retries and --pause must not be negative, and --timeout must be above 0")
        run(args)
    except UserError as error:
        print(f"get_nld_aa: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"get_nld_aa: error: {error.filename or args.out}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("get_nld_aa: interrupted; what was fetched is kept: give the same command again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
