import errno
import os
import stat

import pytest
import torch
from safetensors import SafetensorError
from support.reliability import flip_every_bit, truncate
from zoo_common import atomic_write, files
from zoo_common.files import TensorFile, sha256, visible_files, write_json, write_tensors

TENSORS = {
    "weights": torch.randn(3, 2, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "steps": torch.tensor(7),
    "none": torch.empty(0, 2),
    "mask": torch.tensor([True, False]),
}


def test_content_appears_whole_and_only_at_the_end(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with atomic_write(path) as temporary:
        temporary.write_text("new")
        assert temporary.suffix == ".txt" and temporary.parent == tmp_path
        assert path.read_text() == "old"
        assert visible_files(tmp_path, ".txt") == [path]
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_failed_write_leaves_nothing_behind(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="stop"), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError("stop")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no-such does not exist"), atomic_write(tmp_path / "no-such" / "a"):
        pass


def test_tensors_and_metadata_come_back_bitwise(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, "kind", TENSORS, {"list": [1, None, "x"], "nested": {"a": 0.1}})
    file = TensorFile(path, "kind")
    assert file.metadata == {"list": [1, None, "x"], "nested": {"a": 0.1}}
    assert list(file.load()) == list(TENSORS)
    for name, tensor in file.load().items():
        torch.testing.assert_close(tensor, TENSORS[name], rtol=0, atol=0)


def test_mapped_tensors_share_memory_and_never_write_to_the_file(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, "kind", {"w": torch.zeros(4)}, {})
    file = TensorFile(path, "kind")
    assert file.tensor("w").data_ptr() == file.tensor("w").data_ptr()
    file.tensor("w")[0] = 5
    assert TensorFile(path, "kind").load()["w"].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    "message",
    [
        "Error while serializing: I/O error: No space left on device (os error 28)",
        'IoError(Os { code: 28, kind: StorageFull, message: "No space left on device" })',
    ],
)
def test_a_full_disk_is_an_os_error_and_leaves_nothing_behind(tmp_path, monkeypatch, message):
    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise SafetensorError(message)

    monkeypatch.setattr(files, "save_file", fail)
    with pytest.raises(OSError, match=r"No space left.*a\.safetensors") as caught:
        write_tensors(tmp_path / "a.safetensors", "kind", TENSORS, {})
    assert caught.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_files_have_the_permissions_of_ordinary_ones(tmp_path, umask):
    before = os.umask(umask)
    try:
        (tmp_path / "ordinary").touch()
        write_tensors(tmp_path / "a.safetensors", "kind", TENSORS, {})
        write_json(tmp_path / "a.json", {})
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o666 & ~umask}


def test_an_error_without_a_file_name_gets_that_of_the_file(tmp_path):
    with pytest.raises(OSError, match="No space") as caught, atomic_write(tmp_path / "a"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(tmp_path / "a")


def test_sha256_is_that_of_the_bytes():
    # printf '\x01\x02' | sha256sum
    assert sha256(torch.tensor([1, 2], dtype=torch.uint8)).startswith("a12871fee210fb86")


def test_every_flipped_bit_is_found(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, "kind", TENSORS, {"config": {"lr": 0.1}})
    for _ in flip_every_bit(path):
        with pytest.raises(ValueError, match=r"a\.safetensors"):
            TensorFile(path, "kind").load()
    TensorFile(path, "kind").load()


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_file_is_named(tmp_path, keep):
    path = tmp_path / "a.safetensors"
    write_tensors(path, "kind", TENSORS, {})
    truncate(path, keep)
    with pytest.raises(ValueError, match=r"a\.safetensors is truncated or damaged"):
        TensorFile(path, "kind")


def test_a_file_of_another_kind_is_named(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, "kind", TENSORS, {})
    with pytest.raises(ValueError, match=r"a\.safetensors is a kind file, expected a shard"):
        TensorFile(path, "shard")
