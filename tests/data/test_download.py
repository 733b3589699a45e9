"""Downloads from faulty servers on the loopback address."""

import contextlib
import functools
import hashlib
import http.server
import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time

import numpy as np
import pytest

from cifar_fast import InputError, load_dataset
from cifar_fast.data.download import download
from cifar_fast.data.sources import MIRRORS
from cifar_fast.train import main
from cifar_fast.utils.files import locked
from cifar_fast.utils.progress import lines_to
from tests.helpers import KINDS

module = sys.modules[download.__module__]
TINY = "--widths 4 8 8 8 16 32 32 32 --epochs 1 --batch-size 32 --device cpu --dtype float32 --backend eager"
DATA = np.random.RandomState(0).bytes(400_000)


class Server(http.server.ThreadingHTTPServer):
    """Serves ``data``, with ranges. The other arguments are faults."""

    daemon_threads = True

    def __init__(
        self,
        data,
        *,
        rate=None,
        cut=None,
        stall=0,
        status=None,
        content_type="application/gzip",
        ranges=True,
        moved=None,
        endless=False,
    ):
        super().__init__(("127.0.0.1", 0), Handler)
        self.data, self.rate, self.cut, self.stall, self.status = data, rate, cut, stall, status
        self.content_type, self.ranges, self.moved, self.asked = content_type, ranges, moved, []
        self.endless = endless
        self.url = f"http://127.0.0.1:{self.server_port}/archive"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, asked = self.server, self.headers.get("Range")
        server.asked.append(asked)
        if server.moved and self.path == "/archive":
            self.send_response(302)
            self.send_header("Location", server.moved)
            self.end_headers()
            return
        if server.status:
            self.send_error(server.status)
            return
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and server.ranges else 0
        if start and start >= len(server.data):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        body = server.data[start:]
        if not server.endless:
            self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", server.content_type)
        self.end_headers()
        body = body[: server.cut]
        with contextlib.suppress(OSError):  # the client may disconnect
            for i in range(0, len(body), 4000):
                self.wfile.write(body[i : i + 4000])
                if server.rate:
                    time.sleep(4000 / server.rate)
            while server.endless:
                self.wfile.write(body)
        time.sleep(server.stall)

    def log_message(self, *args):
        pass


@pytest.fixture
def serve():
    servers = []

    def start(*args, **how):
        servers.append(Server(*args, **how))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Shorten the times: a source is slow below 200 kB/s over 0.3 s."""
    monkeypatch.setattr(module, "RATE_WINDOW", 0.3)
    monkeypatch.setattr(module, "TIMEOUT", 0.5)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def download_from(tmp_path, *urls, data=DATA):
    """Download from ``urls``, check that only the file is left, and return the log lines."""
    lines = []
    with lines_to(lines.append):
        download(urls, tmp_path / "archive", hashlib.md5(data).hexdigest(), len(data))
    assert (tmp_path / "archive").read_bytes() == data
    assert sorted(os.listdir(tmp_path)) == ["archive"]
    return lines


def train(tmp_path, flags):
    assert main(f"--output {tmp_path}/out {TINY} {flags}".split()) == 0
    return json.loads((tmp_path / "out/summary.json").read_text())


@pytest.mark.slow  # whole trainings
@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("cifar10", "mirror"),
        ("cifar100", "torchvision's"),
        ("cifar100", "--data-url"),
        ("cifar10", "$CIFAR_FAST_DATA_URL"),
    ],
)
def test_command_downloads_and_trains(request, tmp_path, serve, monkeypatch, capsys, name, source):
    archive = request.getfixturevalue(name) / KINDS[name].filename
    url = serve(archive.read_bytes()).url
    flags = ""
    if source == "mirror":
        monkeypatch.setitem(MIRRORS, name, url)
    elif source == "torchvision's":
        monkeypatch.setattr(KINDS[name], "url", url)
    elif source == "--data-url":
        flags = f"--data-url {url}"
    else:
        monkeypatch.setenv("CIFAR_FAST_DATA_URL", url)
    summary = train(tmp_path, f"--dataset {name} --data-dir {tmp_path}/data {flags}")
    assert summary["dataset"]["name"] == name
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "MD5 sum is correct" in line]
    assert line.startswith(f"{archive.name} from {url} in ")
    again = load_dataset(name, tmp_path / "data", data_url="http://127.0.0.1:9/none", log=None)
    assert again.digest == summary["dataset"]["digest"], "an existing data set is not downloaded again"


def test_unpacked_folder_trains_under_any_name(cifar100, tmp_path):
    with tarfile.open(cifar100 / KINDS["cifar100"].filename) as archive:
        archive.extractall(tmp_path, filter="data")
    (tmp_path / KINDS["cifar100"].base_folder).rename(tmp_path / "unpacked")
    summary = train(tmp_path, f"--dataset cifar100 --data-dir {tmp_path}/unpacked")
    assert summary["dataset"]["digest"] == load_dataset("cifar100", cifar100, log=None).digest


def test_damaged_file_in_unpacked_folder_is_reported_without_download(cifar10, tmp_path, serve):
    server = serve((cifar10 / KINDS["cifar10"].filename).read_bytes())
    whole = load_dataset("cifar10", cifar10, log=None)
    folder = cifar10 / "cifar-10-batches-py"
    assert load_dataset("cifar10", folder, log=None).digest == whole.digest
    (folder / "data_batch_2").write_bytes(b"x")
    with pytest.raises(InputError, match="batches-py: a file of CIFAR10 is missing or damaged there; unpack cifar-10"):
        load_dataset("cifar10", folder, data_url=server.url, log=None)
    assert not server.asked and len(os.listdir(folder)) == 7


def test_unwritable_unpack_folder_is_reported(cifar10):
    (cifar10 / "cifar-10-batches-py").touch()
    with pytest.raises(InputError, match=r"cifar10: cannot be written to \("):
        load_dataset("cifar10", cifar10, log=None)


def test_command_without_network_fails_fast_with_one_line(tmp_path, capsys):
    start = time.monotonic()
    assert main(f"--dataset cifar100 --data-dir {tmp_path}/a/b --output {tmp_path}/out {TINY}".split()) == 2
    assert time.monotonic() - start < 5
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "CIFAR100 is not in" in error and "Connection refused" in error
    assert not list(tmp_path.iterdir())


def test_corrupt_archive_is_downloaded_again(cifar10, serve):
    archive = cifar10 / KINDS["cifar10"].filename
    whole = archive.read_bytes()
    archive.write_bytes(whole[:-100])
    dataset = load_dataset("cifar10", cifar10, data_url=serve(whole).url, log=None)
    assert len(dataset.train_images) == 100 and archive.read_bytes() == whole


@pytest.mark.parametrize("edited", ["data_batch_2", "test_batch", "batches.meta"])
@pytest.mark.parametrize("has_archive", [True, False])
def test_edited_files_are_never_overwritten(cifar10, serve, edited, has_archive):
    archive = cifar10 / KINDS["cifar10"].filename
    server = serve(archive.read_bytes())
    load_dataset("cifar10", cifar10, log=None)
    file = cifar10 / "cifar-10-batches-py" / edited
    content = pickle.loads(file.read_bytes(), encoding="latin1")
    content |= (
        {"label_names": content["label_names"][::-1]} if "meta" in edited else {"labels": content["labels"][::-1]}
    )
    file.write_bytes(pickle.dumps(content))
    before = file.read_bytes()
    (file.parent / "data_batch_3").unlink()  # others may be missing
    if not has_archive:
        archive.unlink()
    with pytest.raises(InputError, match=f"py/{edited}: differs from the published file, and is not overwritten; move"):
        load_dataset("cifar10", cifar10, data_url=server.url, log=None)
    assert file.read_bytes() == before and not server.asked and archive.exists() == has_archive
    file.rename(cifar10 / "mine")
    assert len(load_dataset("cifar10", cifar10, data_url=server.url, log=None).train_images) == 100
    assert sorted(os.listdir(cifar10)) == ["cifar-10-batches-py", archive.name, "mine"]


def test_edited_archive_is_never_overwritten(cifar10, serve):
    archive = cifar10 / KINDS["cifar10"].filename
    server = serve(archive.read_bytes())
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(__file__, "cifar-10-batches-py/data_batch_1")
    before = archive.read_bytes()
    with pytest.raises(InputError, match=r"python\.tar\.gz: differs from the published file, and is not overwritten"):
        load_dataset("cifar10", cifar10, data_url=server.url, log=None)
    assert archive.read_bytes() == before and not server.asked and os.listdir(cifar10) == [archive.name]


def test_unpacking_that_was_killed_is_repeated(cifar10, tmp_path):
    archive = cifar10 / KINDS["cifar10"].filename
    code = (
        "import os, sys; from cifar_fast.data import sources; from pathlib import Path; number = [0]\n"
        "def replace(*paths):\n"
        "    number[0] += 1\n"
        "    number[0] < 4 or os._exit(9)\n"
        "    rename(*paths)\n"
        "rename, os.replace = os.replace, replace\n"
        "sources._unpack(*map(Path, sys.argv[1:3]), sys.argv[3:])"
    )
    with tarfile.open(archive) as tar:
        names = [name for name in tar.getnames() if "/" in name]
    done = subprocess.run(
        [sys.executable, "-c", code, archive, cifar10, *names], env=os.environ | {"PYTHONPATH": os.getcwd()}
    )
    assert done.returncode == 9 and len(os.listdir(cifar10 / "cifar-10-batches-py")) == 3
    assert len(load_dataset("cifar10", cifar10, log=None).train_images) == 100
    assert sorted(os.listdir(cifar10)) == ["cifar-10-batches-py", archive.name]


def test_next_source_resumes_after_a_slow_one(tmp_path, serve):
    slow, quick = serve(DATA, rate=100_000), serve(DATA)
    lines = download_from(tmp_path, slow.url, quick.url)
    assert slow.asked == [None]
    assert 10_000 < int(quick.asked[0].removeprefix("bytes=").removesuffix("-")) < 200_000
    assert any(line.startswith(f"{slow.url}: ") and "kB/s, trying the next source" in line for line in lines)


@pytest.mark.slow
def test_fastest_of_slow_sources_finishes(tmp_path, serve):
    slow, slower = serve(DATA, rate=150_000), serve(DATA, rate=50_000)
    lines = download_from(tmp_path, slower.url, slow.url)
    assert lines[-1].startswith(f"archive from {slow.url} in ")
    assert len(slower.asked) == 1 and len(slow.asked) == 2


def test_only_source_may_be_slow_and_progress_is_logged(tmp_path, serve):
    server = serve(DATA[:100_000], rate=100_000, ranges=False)
    lines = download_from(tmp_path, server.url, data=DATA[:100_000])
    assert server.asked == [None]
    assert re.fullmatch(r"0\.\d MB downloaded, 0\.\d\d MB/s, \d s left", lines[1])


def test_next_source_resumes_after_a_stalled_one(tmp_path, serve):
    stalling, good = serve(DATA, cut=150_000, stall=1), serve(DATA)
    lines = download_from(tmp_path, stalling.url, good.url)
    assert stalling.asked == [None] and good.asked == ["bytes=150000-"]
    assert f"{stalling.url}: timed out, trying the next source" in lines


def test_source_that_was_cut_off_is_resumed(tmp_path, serve):
    server = serve(DATA, cut=150_000)
    download_from(tmp_path, server.url)
    assert server.asked == [None, "bytes=150000-", "bytes=300000-"]


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (dict(status=404), "404"),
        (dict(data=b"x" * 1000), "not the published file"),
        (dict(data=b"<html>", content_type="text/html; charset=utf-8"), "a web page, not the file"),
        (dict(cut=0), "cut off after 0 of 400,000 bytes"),
    ],
)
def test_next_source_replaces_a_wrong_one(tmp_path, serve, wrong, reason):
    bad, good = serve(**{"data": DATA} | wrong), serve(DATA)
    lines = download_from(tmp_path, bad.url, good.url)
    assert any(line.startswith(f"{bad.url}: ") and reason in line for line in lines)
    assert len(bad.asked) == 1 and good.asked == [None]


@pytest.mark.parametrize("form", [str, lambda path: path.as_uri()])
def test_source_may_be_a_file(tmp_path, form):
    (tmp_path / "source").write_bytes(DATA)
    (tmp_path / "archive.part").write_bytes(DATA[:1000])
    download([form(tmp_path / "source")], tmp_path / "archive", hashlib.md5(DATA).hexdigest(), len(DATA))
    assert (tmp_path / "archive").read_bytes() == DATA


def test_redirect_is_followed(tmp_path, serve):
    (tmp_path / "archive.part").write_bytes(DATA[:1000])
    moved_to = serve(DATA)
    download_from(tmp_path, serve(DATA, moved=moved_to.url).url)
    assert moved_to.asked == ["bytes=1000-"]


def test_next_source_replaces_one_that_never_answers(tmp_path, serve):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        lines = download_from(tmp_path, f"http://127.0.0.1:{silent.getsockname()[1]}/archive", serve(DATA).url)
    assert "timed out" in lines[0]


def test_source_without_ranges_starts_over(tmp_path, serve):
    (tmp_path / "archive.part").write_bytes(DATA[:1000])
    server = serve(DATA, ranges=False)
    download_from(tmp_path, server.url)
    assert server.asked == ["bytes=1000-"]


@pytest.mark.parametrize("size", [1000, len(DATA), len(DATA) + 10])
def test_wrong_partial_file_is_discarded_and_source_retried(tmp_path, serve, size):
    (tmp_path / "archive.part").write_bytes(b"x" * size)
    server = serve(DATA)
    download_from(tmp_path, server.url)
    assert server.asked == [f"bytes={size}-", None]


def test_all_failed_sources_are_named_and_no_file_is_left(tmp_path, serve):
    missing, wrong = serve(DATA, status=404), serve(b"x" * 1000)
    with pytest.raises(OSError, match=f"{missing.url}: .*404.*{wrong.url}: not the published file"):
        download_from(tmp_path, missing.url, wrong.url)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rate", [None, 200_000])  # slow bytes come in small pieces, which a buffered file would keep
def test_full_disk_is_reported_in_one_line(tmp_path, serve, rate):
    (tmp_path / "archive.part").symlink_to("/dev/full")
    with pytest.raises(InputError, match=r"archive\.part: cannot be written to \(No space left on device\)"):
        download_from(tmp_path, serve(DATA, rate=rate).url)


DOWNLOAD = """
import sys
from pathlib import Path
from cifar_fast.data.download import download
from cifar_fast.utils.files import locked
folder, url, md5 = sys.argv[1:]
path = Path(folder, "archive")
with locked(path.parent, lambda: print("busy")):
    if not path.exists():
        download([url], path, md5, 1 << 20)
"""


def start_process(tmp_path, url):
    arguments = [sys.executable, "-c", DOWNLOAD, str(tmp_path), url, hashlib.md5(DATA).hexdigest()]
    return subprocess.Popen(arguments, env=os.environ | {"PYTHONPATH": os.getcwd()})


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_killed_download_is_resumed(tmp_path, serve):
    server = serve(DATA, rate=300_000)
    part = tmp_path / "archive.part"
    with start_process(tmp_path, server.url) as process:
        wait_for(lambda: part.exists() and part.stat().st_size > 100_000)
        process.send_signal(signal.SIGKILL)
    kept = part.stat().st_size
    server.rate = None
    download_from(tmp_path, server.url)
    assert server.asked == [None, f"bytes={kept}-"]


def test_two_processes_share_one_download(cifar10, tmp_path, serve):
    server = serve((cifar10 / KINDS["cifar10"].filename).read_bytes(), rate=20_000)

    def load(output):
        with open(output, "w", buffering=1) as file:
            log = functools.partial(print, file=file)
            log(load_dataset("cifar10", tmp_path / "data", data_url=server.url, log=log).digest)

    outputs = [tmp_path / "first", tmp_path / "second"]
    processes = [multiprocessing.get_context("fork").Process(target=load, args=(path,)) for path in outputs]
    for path, process in zip(outputs, processes):
        path.touch()
        process.start()
    wait_for(lambda: any("waiting for it" in path.read_text() for path in outputs))
    server.rate = None
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert server.asked == [None]
    assert {path.read_text().split()[-1] for path in outputs} == {load_dataset("cifar10", cifar10, log=None).digest}


def test_waiting_process_uses_what_the_other_unpacked(cifar10, tmp_path):
    expected = load_dataset("cifar10", cifar10, log=None).digest
    (tmp_path / "data").mkdir()

    def other_process(line):  # finishes when this one waits; there is no archive and no source to download it from
        assert "waiting for it" in line
        shutil.copytree(cifar10 / "cifar-10-batches-py", tmp_path / "data/cifar-10-batches-py")
        lock.close()

    lock = contextlib.ExitStack()
    lock.enter_context(locked(tmp_path / "data", lambda: pytest.fail("busy")))
    assert load_dataset("cifar10", tmp_path / "data", log=other_process).digest == expected


def test_lock_is_released(tmp_path):
    for _ in range(2):
        with locked(tmp_path, lambda: pytest.fail("busy")):
            pass


def test_next_source_replaces_one_that_never_ends(tmp_path, serve):
    endless, good = serve(DATA, endless=True), serve(DATA)
    lines = download_from(tmp_path, endless.url, good.url)
    assert f"{endless.url}: sends more than the 400,000 bytes of the published file, trying the next source" in lines
    assert good.asked == [None]


def test_no_line_and_no_error_shows_the_token_of_a_url(tmp_path, serve):
    good, bad = serve(DATA), serve(DATA, status=403)
    tokens = "?sig=s3cret&other=s3cret#s3cret"
    with_user = good.url.replace("://", "://me:s3cret@") + tokens  # urllib sends no password in a URL
    lines = download_from(tmp_path, with_user, bad.url + tokens, f"{good.url} x{tokens}", good.url + tokens)
    assert "s3cret" not in "\n".join(lines) and f"{good.url}?..." in lines[-1]
    (tmp_path / "archive").unlink()
    with pytest.raises(OSError, match=r"archive\?\.\.\.: HTTP Error 403") as error:
        download_from(tmp_path, bad.url + tokens, with_user)
    assert "s3cret" not in str(error.value)


def test_a_pipe_as_a_source_is_refused(cifar10, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe: not a file"):
        load_dataset("cifar10", tmp_path / "none", data_url=f"{tmp_path}/pipe", log=None)
