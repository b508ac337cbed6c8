import gzip
import io
import pickle
import tarfile

import numpy as np
import pytest
import torch
from zoo_common.datasets import _load, load_dataset

SIZES = {"train": 12, "t10k": 10}


@pytest.fixture(autouse=True)
def fresh_cache():
    _load.cache_clear()


def arrays(size=(28, 28), n_train=12, n_test=10):
    rng = np.random.default_rng(0)
    images = {s: rng.integers(0, 256, (n, *size), dtype=np.uint8) for s, n in (("train", n_train), ("test", n_test))}
    labels = {s: (np.arange(n) % 10).astype(np.uint8) for s, n in (("train", n_train), ("test", n_test))}
    return {f"{s}_images": images[s] for s in images} | {f"{s}_labels": labels[s] for s in labels}


def idx_bytes(array):
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">u4").tobytes() + array.tobytes()


def write_idx(folder, data, suffix=""):
    folder.mkdir(parents=True, exist_ok=True)
    for split, stem in (("train", "train"), ("test", "t10k")):
        for kind, name in (("images", "images-idx3"), ("labels", "labels-idx1")):
            content = idx_bytes(data[f"{split}_{kind}"])
            path = folder / f"{stem}-{name}-ubyte{suffix}"
            path.write_bytes(gzip.compress(content) if suffix else content)


def cifar_batches(protocol=2, n=4):
    rng = np.random.default_rng(1)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    data = {name: rng.integers(0, 256, (n, 3072), dtype=np.uint8) for name in names}
    batches = {
        name: {b"data": data[name], b"labels": [i % 10 for i in range(n)], b"batch_label": b"x"} for name in names
    }
    return data, {name: pickle.dumps(batch, protocol=protocol) for name, batch in batches.items()}


def write_cifar(folder, files):
    (folder / "cifar-10-batches-py").mkdir(parents=True)
    for name, content in files.items():
        (folder / "cifar-10-batches-py" / name).write_bytes(content)


def expect_mnist(splits, data, mean=0.1307, std=0.3081):
    for part, name in ((splits.train, "train"), (splits.test, "test"), (splits.validation, "test")):
        expected = (data[f"{name}_images"].astype(np.float64)[:, None] / 255 - mean) / std
        np.testing.assert_allclose(part.images.numpy(), expected, atol=1e-5)
        assert part.images.dtype == torch.float32
        assert torch.equal(part.labels, torch.from_numpy(data[f"{name}_labels"].astype(np.int64)))


def test_digits_are_split_once_and_normalised_by_the_training_part():
    splits = load_dataset("digits")
    assert [tuple(p.images.shape) for p in splits] == [(1000, 1, 8, 8), (400, 1, 8, 8), (397, 1, 8, 8)]
    assert splits.train.images.mean().item() == pytest.approx(0, abs=1e-5)
    assert splits.train.images.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    together = torch.cat([p.images for p in splits]).flatten(1).double()
    scaled = (together - together.min()) / (together.max() - together.min()) * 16
    key = np.lexsort(np.c_[scaled.round().numpy(), torch.cat([p.labels for p in splits]).numpy()].T)
    other = np.lexsort(np.c_[pixels, labels].T)
    np.testing.assert_array_equal(scaled.round().numpy()[key], pixels[other])  # every image once
    np.testing.assert_array_equal(torch.cat([p.labels for p in splits]).numpy()[key], labels[other])
    assert splits.train.labels[:8].tolist() == [2, 8, 2, 6, 6, 7, 1, 9]  # the permutation is fixed


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("sub", ["", "mnist", "MNIST/raw"])
def test_mnist_from_idx_files(tmp_path, suffix, sub):
    data = arrays()
    write_idx(tmp_path / sub, data, suffix)
    expect_mnist(load_dataset("mnist", tmp_path), data)


def test_mnist_from_npz(tmp_path):
    data = arrays()
    np.savez_compressed(tmp_path / "mnist.npz", **data)
    expect_mnist(load_dataset("mnist", tmp_path), data)


def test_fashion_mnist_from_its_test_images_alone(tmp_path):
    data = arrays(n_test=10_000)
    test = {k: v for k, v in data.items() if k.startswith("test")}
    np.savez(tmp_path / "fashion_mnist_t10k.npz", **test)
    splits = load_dataset("fashion_mnist", tmp_path)
    cut = {f"train_{k}": test[f"test_{k}"][:8000] for k in ("images", "labels")}
    cut |= {f"test_{k}": test[f"test_{k}"][8000:] for k in ("images", "labels")}
    expect_mnist(splits, cut, 0.2860, 0.3530)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("protocol", [2, 4])
def test_cifar_from_the_python_archive(tmp_path, packed, protocol):
    data, files = cifar_batches(protocol)
    if packed:
        with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as archive:
            for name, content in files.items():
                info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    else:
        write_cifar(tmp_path, files)
    splits = load_dataset("cifar10", tmp_path)
    mean, std = np.array([125.3, 123.0, 113.9]), np.array([63.0, 62.1, 66.7])
    stored = np.concatenate([data[f"data_batch_{i}"] for i in range(1, 6)]).reshape(-1, 3, 32, 32).astype(np.float64)
    np.testing.assert_allclose(splits.train.images, (stored - mean[:, None, None]) / std[:, None, None], atol=1e-5)
    assert splits.test.labels.tolist() == [0, 1, 2, 3]


def test_cifar_from_jpeg_scans(tmp_path):
    from PIL import Image

    def jpeg(value):
        stream = io.BytesIO()
        Image.new("RGB", (32, 32), (value, 100, 50)).save(stream, "jpeg", quality=75)
        return stream.getvalue()

    files = [jpeg(40 * i) for i in range(6)]
    common = next(i for i in range(len(files[0])) if len({f[: i + 1] for f in files}) > 1)
    bodies = [f[common:-2] for f in files]
    content = {"header": np.frombuffer(files[0][:common], np.uint8)}
    for split, part in (("train", bodies[:4]), ("test", bodies[4:])):
        content[f"{split}_scans"] = np.frombuffer(b"".join(part), np.uint8)
        content[f"{split}_offsets"] = np.cumsum([0, *map(len, part)]).astype(np.int32)
        content[f"{split}_labels"] = np.arange(len(part), dtype=np.uint8)
    np.savez(tmp_path / "cifar10_jpeg.npz", **content)
    splits = load_dataset("cifar10", tmp_path)
    red = splits.train.images[:, 0].mean((1, 2)) * 63.0 + 125.3
    np.testing.assert_allclose(red, [0, 40, 80, 120], atol=2)
    assert splits.test.images.shape == (2, 3, 32, 32)
    cut = content | {"header": content["header"][:50]}
    np.savez(tmp_path / "cifar10_jpeg.npz", **cut)
    _load.cache_clear()
    with pytest.raises(ValueError, match="cannot be decoded"):
        load_dataset("cifar10", tmp_path)


class Evil:
    def __reduce__(self):
        return (print, ("code ran",))


def test_a_pickle_with_code_is_refused(tmp_path, capsys):
    _, files = cifar_batches()
    files["data_batch_2"] = pickle.dumps({b"data": Evil()})
    write_cifar(tmp_path, files)
    with pytest.raises(ValueError, match=r"data_batch_2: not a CIFAR-10 batch \(asks for builtins.print"):
        load_dataset("cifar10", tmp_path)
    assert capsys.readouterr().out == ""


def test_a_truncated_batch_is_named(tmp_path):
    _, files = cifar_batches()
    files["test_batch"] = files["test_batch"][:-500]
    write_cifar(tmp_path, files)
    with pytest.raises(ValueError, match="test_batch: not a CIFAR-10 batch"):
        load_dataset("cifar10", tmp_path)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_truncated_idx_file_is_named(tmp_path, suffix):
    write_idx(tmp_path, arrays(), suffix)
    path = tmp_path / f"train-images-idx3-ubyte{suffix}"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=path.name):
        load_dataset("mnist", tmp_path)


def test_a_damaged_npz_is_named(tmp_path):
    np.savez(tmp_path / "mnist.npz", **arrays())
    content = (tmp_path / "mnist.npz").read_bytes()
    (tmp_path / "mnist.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"mnist\.npz: damaged"):
        load_dataset("mnist", tmp_path)
    np.savez(tmp_path / "mnist.npz", train_images=arrays()["train_images"])
    with pytest.raises(ValueError, match=r"mnist\.npz: lacks the arrays \['test_images'"):
        load_dataset("mnist", tmp_path)


def test_wrong_pixels_are_named(tmp_path):
    np.savez(tmp_path / "mnist.npz", **arrays(size=(20, 20)))
    with pytest.raises(ValueError, match="MNIST: expected uint8 images"):
        load_dataset("mnist", tmp_path)


def test_missing_data_say_how_to_get_them(tmp_path):
    for folder, where in ((None, "no data folder given"), (tmp_path, f"not found in {tmp_path}")):
        with pytest.raises(FileNotFoundError, match=rf"CIFAR-10: {where}.*--data-dir.*--download"):
            load_dataset("cifar10", folder)
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*--data-dir.*--download"):
        load_dataset("mnist", tmp_path / "absent")
    with pytest.raises(ValueError, match="unknown data set 'svhn'"):
        load_dataset("svhn", tmp_path)


def test_download_fills_the_folder_through_torchvision(tmp_path, monkeypatch):
    import torchvision.datasets

    data = arrays()
    monkeypatch.setattr(torchvision.datasets, "MNIST", lambda root, download: write_idx(root / "MNIST/raw", data))
    for folder in (tmp_path, tmp_path / "new"):
        expect_mnist(load_dataset("mnist", folder, download=True), data)

    def offline(root, download):
        raise RuntimeError("Error downloading")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", offline)
    with pytest.raises(FileNotFoundError, match=r"CIFAR-10: download into .* failed"):
        load_dataset("cifar10", tmp_path, download=True)
