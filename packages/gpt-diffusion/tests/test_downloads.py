"""Downloads from a local server that breaks transfers in the ways that servers do."""

import hashlib
import io
import json
import shutil
import stat
import threading
import time
import zipfile
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from gpt_diffusion import download, downloads, find_checkpoints, find_model, load_config, open_runs, train
from gpt_diffusion.cli import main
from gpt_diffusion.config import DatasetConfig
from gpt_diffusion.downloads import SERVER, dataset_name, model_name
from support.reliability import assert_same_files, run_killed

GOLDEN = Path(__file__).parent / "golden" / "checkpoint_datasets"
MODEL = "/pretrained_models/mnist_loss.pt"
CONTENT = bytes(range(256)) * 1200


class Refuse(int):
    """An answer with this status; a plain number cuts the answer off after so many bytes."""


class Server(ThreadingHTTPServer):
    """Files by path; how the next answers go wrong; and what was asked for."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.asked = {MODEL: CONTENT}, [], []
        self.ranges, self.version = True, '"1"'
        self.piece, self.pause = 2**30, 0.0

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        server, wanted = self.server, self.headers.get("Range")
        server.asked.append(wanted)
        fault = server.faults.pop(0) if server.faults else None
        if isinstance(fault, Refuse):
            return self.send_error(fault)
        if self.path not in server.files:
            return self.send_error(404)
        content = server.files[self.path]
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        if not server.ranges or self.headers.get("If-Range", server.version) != server.version:
            start = 0
        if start >= len(content):
            return self.send_error(416)
        body = content[start:]
        self.send_response(206 if start else 200)
        if server.version:
            self.send_header("ETag", server.version)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if fault != "no length":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        body = body[: fault if isinstance(fault, int) else None]
        for i in range(0, len(body), server.piece):
            try:
                self.wfile.write(body[i : i + server.piece])
            except OSError:  # who asked has been killed
                return None
            time.sleep(server.pause)
        self.close_connection = True


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(downloads, "_WAITS", (0.0, 0.0))
    with Server() as server:
        monkeypatch.setenv("GPT_DIFFUSION_SERVER", server.address)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def get(folder, name="mnist_loss.pt", **options):
    return download(name, folder, **{"progress": False, "waits": (0.0, 0.0)} | options)


def files(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def zipped(entries):
    """A zip file with these (name or ZipInfo, content)."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return out.getvalue()


def dataset_zip(name, prefix):
    source = GOLDEN / name
    paths = [path for path in sorted(source.rglob("*")) if path.is_file()]
    return zipped((prefix + str(path.relative_to(source)), path.read_bytes()) for path in paths)


def test_a_model_is_fetched_once_and_its_sum_recorded(server, tmp_path):
    first = get(tmp_path)
    assert (first.name, first.fetched, first.path.read_bytes()) == ("mnist_loss.pt", True, CONTENT)
    again = get(tmp_path)
    assert (again.fetched, again.sha256) == (False, first.sha256)
    assert server.asked == [None]
    record = json.loads((tmp_path / "checksums.json").read_text())["mnist_loss.pt"]
    assert record["sha256"] == hashlib.sha256(CONTENT).hexdigest() == first.sha256
    assert (record["size"], record["from"]) == (len(CONTENT), server.address + MODEL)
    assert files(tmp_path) == ["checksums.json", "mnist_loss.pt"]


def test_broken_transfers_go_on_where_they_ended(server, tmp_path):
    server.faults = [1000, Refuse(503), 70_000, 5]
    assert get(tmp_path).path.read_bytes() == CONTENT
    assert server.asked == [None, "bytes=1000-", "bytes=1000-", "bytes=71000-", "bytes=71005-"]


def test_a_later_call_goes_on_with_what_has_arrived(server, tmp_path):
    server.faults = [100_000, Refuse(500), Refuse(500), Refuse(500)]
    with pytest.raises(OSError, match=r"cannot be fetched \(500 .*what has arrived is kept"):
        get(tmp_path)
    assert not (tmp_path / "mnist_loss.pt").exists()
    server.asked.clear()
    assert get(tmp_path).path.read_bytes() == CONTENT
    assert server.asked == ["bytes=100000-"]


@pytest.mark.parametrize("version", ['"2"', None])
def test_a_file_that_has_changed_meanwhile_is_not_patched_together(server, tmp_path, version):
    server.faults = [100_000, Refuse(500), Refuse(500), Refuse(500)]
    with pytest.raises(OSError, match="cannot be fetched"):
        get(tmp_path)
    server.files[MODEL], server.version = CONTENT[::-1] + b"more", version
    assert get(tmp_path).path.read_bytes() == CONTENT[::-1] + b"more"


def test_a_server_without_ranges_sends_all_of_it_again(server, tmp_path):
    server.ranges = False
    server.faults = [100_000]
    assert get(tmp_path).path.read_bytes() == CONTENT
    server.faults = [100, 100, 100, 100]
    (tmp_path / "mnist_loss.pt").unlink()
    with pytest.raises(OSError, match="the connection ended early"):
        get(tmp_path)


def test_a_size_that_is_not_announced_is_taken_as_it_comes(server, tmp_path):
    server.faults = ["no length"]
    assert get(tmp_path).path.read_bytes() == CONTENT


def test_another_file_than_at_first_use_is_refused(server, tmp_path):
    get(tmp_path)
    (tmp_path / "mnist_loss.pt").write_bytes(CONTENT[:-1])
    with pytest.raises(ValueError, match=r"mnist_loss.pt is not the file that was used first .* remove it"):
        get(tmp_path)
    (tmp_path / "mnist_loss.pt").unlink()
    server.files[MODEL] = b"other"
    with pytest.raises(ValueError, match=r"http.*mnist_loss.pt is not the file that was used first .* another server"):
        get(tmp_path)
    assert files(tmp_path) == ["checksums.json"]
    server.files[MODEL] = CONTENT
    assert get(tmp_path).fetched


def test_what_the_server_does_not_have_is_named_at_once(server, tmp_path):
    for name, path in (
        ("cartpole.pt", "pretrained_models/cartpole.pt"),
        ("cartpole", "checkpoint_datasets/cartpole.zip"),
    ):
        with pytest.raises(FileNotFoundError, match=rf"/{path} answers 404 .* --server"):
            get(tmp_path, name)
    assert len(server.asked) == 2


def test_a_server_that_is_down_is_named(server, tmp_path):
    with pytest.raises(
        OSError, match=r"http://127.0.0.1:1/pretrained_models/mnist_loss.pt cannot be fetched \(.*refused"
    ):
        get(tmp_path, server="http://127.0.0.1:1/")
    with pytest.raises(ValueError, match="must start with http"):
        get(tmp_path, server="file:///etc")


def test_offline_uses_what_is_there(server, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"mnist_loss.pt is not there: repeat without --offline"):
        get(tmp_path / "new", offline=True)
    assert not (tmp_path / "new").exists()
    get(tmp_path)
    server.asked.clear()
    assert not get(tmp_path, offline=True).fetched
    assert server.asked == []


def test_too_little_disk_is_told_before_the_transfer(server, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**6, 10**6, 5)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"0.00 GB left, 0.00 GB are needed: make room"):
        get(tmp_path)
    assert files(tmp_path) == []


def test_what_a_killed_process_leaves_is_used_or_removed(server, tmp_path):
    archive = dataset_zip("mnist", "mnist/")
    server.files["/checkpoint_datasets/mnist.zip"] = archive
    get(tmp_path, "mnist")
    (tmp_path / "mnist.zip").write_bytes(archive)  # killed before it was removed
    (tmp_path / ".mnist.unpacked").mkdir()
    assert not get(tmp_path, "mnist").fetched
    assert "mnist.zip" not in files(tmp_path)
    shutil.rmtree(tmp_path / "mnist")  # killed while it was unpacked
    (tmp_path / "mnist.zip").write_bytes(archive)
    server.asked.clear()
    assert get(tmp_path, "mnist").path.is_dir() and server.asked == []
    assert files(tmp_path) == ["checksums.json", "mnist"]


@pytest.mark.parametrize("prefix", ["mnist/", ""])
def test_a_data_set_is_unpacked_beside_its_path(server, tmp_path, prefix):
    server.files["/checkpoint_datasets/mnist.zip"] = dataset_zip("mnist", prefix)
    server.faults = [5000]
    got = get(tmp_path, "mnist")
    assert got.fetched and sorted(path.name for path in got.path.iterdir()) == ["000000", "000001", "000002"]
    assert files(tmp_path) == ["checksums.json", "mnist"]
    assert (got.path / "000001" / "data.mdb").read_bytes() == (GOLDEN / "mnist" / "000001" / "data.mdb").read_bytes()
    server.asked.clear()
    assert not get(tmp_path, "mnist").fetched
    assert server.asked == []


def test_training_fetches_the_data_set_that_its_path_names(server, tmp_path):
    server.files["/checkpoint_datasets/mnist.zip"] = dataset_zip("mnist", "mnist/")
    path = tmp_path / "data" / "MNIST_mine"
    with pytest.raises(FileNotFoundError):
        open_runs(DatasetConfig(name="mnist_loss", path=str(path), download=False))
    small = ["transformer.n_embd=8", "transformer.n_layer=1", "transformer.n_head=2", "train.max_steps=2"]
    small += ["train.mb_size=2", "test.mb_size=2", "dataset.target_epoch_size=4", "dataset.num_test_runs=1"]
    assert train(
        load_config("mnist_loss", [*small, f"dataset.path={path}", f"out_dir={tmp_path}"]), quiet=True
    ).finished
    assert (path / "000000" / "data.mdb").exists()
    assert find_checkpoints(tmp_path) == tmp_path  # a local folder wins, whatever its name
    with pytest.raises(FileNotFoundError, match="not named after one of mnist, cifar10, cartpole"):
        find_checkpoints(tmp_path / "zoo")


def link(name, target):
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info, target


def damaged(content):
    place = content.index(b"\x50\x4b\x01\x02") // 2
    return content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (zipped([("../evil", b"x")]), r"'../evil', which points out of it"),
        (zipped([("mnist/a", b"x"), ("/evil", b"x")]), "'/evil', which points out of it"),
        (zipped([("c:/evil", b"x")]), "'c:/evil', which points out of it"),
        (zipped([link("mnist/a", "../..")]), "'mnist/a', a link or encrypted"),
        (b"no archive", "is damaged .*remove it and repeat"),
        (damaged(zipped([("mnist/a", bytes(range(256)) * 50)])), "is damaged .*remove it and repeat"),
    ],
    ids=["up", "root", "drive", "link", "other", "damaged"],
)
def test_harmful_archives_are_refused(server, tmp_path, content, message):
    server.files["/checkpoint_datasets/mnist.zip"] = content
    folder = tmp_path / "in"
    folder.mkdir()
    with pytest.raises(ValueError, match=message):
        get(folder, "mnist")
    assert files(folder) == ["checksums.json", "mnist.zip"]  # no part of it
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    if "repeat" in message:
        (folder / "mnist.zip").unlink()
        server.files["/checkpoint_datasets/mnist.zip"] = dataset_zip("mnist", "mnist/")
        assert get(folder, "mnist").fetched  # the sum of the damaged one does not stand in the way


def test_an_archive_that_grows_beyond_the_disk_is_refused(server, tmp_path, monkeypatch):
    bomb = zipped([("mnist/a", bytes(10**7))])
    server.files["/checkpoint_datasets/mnist.zip"] = bomb
    usage = namedtuple("usage", "total used free")(10**9, 0, len(bomb) + 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"0.01 GB are needed: make room"):
        get(tmp_path, "mnist")
    assert files(tmp_path) == ["checksums.json", "mnist.zip"]


@pytest.mark.reliability
def test_killed_downloads_end_with_the_same_files(server, tmp_path):
    archive = dataset_zip("cartpole", "cartpole/")
    server.files["/checkpoint_datasets/cartpole.zip"] = archive
    server.piece, server.pause = len(archive) // 20, 0.02
    command = ["gpt-diffusion", "download", "cartpole", "--dir", str(tmp_path), "--json"]
    assert run_killed(command, watch=tmp_path, seed=3, kills=6) >= 3
    assert_same_files(tmp_path / "cartpole", GOLDEN / "cartpole")
    assert files(tmp_path) == ["cartpole", "checksums.json"]
    assert any(wanted for wanted in server.asked)  # at least once it went on


def test_names_and_their_aliases(server, tmp_path, monkeypatch):
    assert SERVER.startswith("http://learn2learn.eecs.berkeley.edu")
    assert [model_name(n) for n in ("cifar_loss.pt", "mnist-error", "cartpole.pt", "best.pt", "mnist")] == [
        "cifar10_loss.pt",
        "mnist_error.pt",
        "cartpole.pt",
        None,
        None,
    ]
    assert [dataset_name(n) for n in ("a/mnist", "CIFAR10_small", "my_mnist", "zoo")] == [
        "mnist",
        "cifar10",
        None,
        None,
    ]
    monkeypatch.chdir(tmp_path)
    server.files["/pretrained_models/cifar10_loss.pt"] = b"weights"
    assert find_model("cifar_loss.pt", progress=False) == Path("pretrained_models/cifar10_loss.pt")
    with pytest.raises(ValueError, match=r"no released model 'best.pt'; there are mnist_loss.pt"):
        find_model("best.pt")
    with pytest.raises(ValueError, match=r"unknown download 'mnst': there are mnist_loss.pt.*cartpole"):
        get(tmp_path, "mnst")


def test_the_command(server, tmp_path, capsys):
    assert main(["download", "mnist_loss.pt", "--dir", str(tmp_path), "--server", server.address, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["path"] == str(tmp_path / "mnist_loss.pt")
    assert main(["download", "mnist_error.pt", "--dir", str(tmp_path), "--offline"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "--offline" in err


def test_who_comes_second_waits_and_finds_it_there(server, tmp_path):
    with ThreadPoolExecutor(2) as pool:
        got = [future.result() for future in [pool.submit(get, tmp_path) for _ in range(2)]]
    assert sorted(entry.fetched for entry in got) == [False, True]
    assert server.asked == [None]
