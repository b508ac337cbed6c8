"""The image data of the built-in tasks: scikit-learn's digits, MNIST, Fashion-MNIST and CIFAR-10.

Digits need no file. The others are read from a folder that holds, directly or in a sub-folder of the usual name,

* idx files as distributed (``train-images-idx3-ubyte``, plain or ``.gz``), for MNIST and Fashion-MNIST,
* the CIFAR-10 python archive (``cifar-10-batches-py`` or ``cifar-10-python.tar.gz``), read without running its pickles,
* or an ``.npz`` file with ``train_images``, ``train_labels``, ``test_images``, ``test_labels`` (Fashion-MNIST: the test
  arrays alone are cut into images 0..7999 for training and 8000..9999 for test; CIFAR-10: JPEG scans with one header).

Shapes: ``n`` images, ``c`` channels of ``h`` rows and ``w`` columns.
"""

import gzip
import io
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from zoo_common.inert import DAMAGE, Budget, Stream, load_pickles

#: Training / validation / test images of the digits (1,797 in all).
DIGITS_SPLIT = (1000, 400, 397)
#: Fashion-MNIST from its test images alone: the first so many are for training.
FASHION_TRAIN = 8000


class Part(NamedTuple):
    """Images and labels of one part of a data set."""

    images: Tensor  # (n, c, h, w) float32, normalised
    labels: Tensor  # (n,) int64


class Splits(NamedTuple):
    """The three parts of a data set. Without a validation part of its own, ``validation`` is ``test``."""

    train: Part
    validation: Part
    test: Part


class _Raw(NamedTuple):
    """Pixels as stored: (n, h, w) or (n, h, w, c) uint8, and (n,) labels."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


@dataclass(frozen=True)
class _Source:
    """How one data set is found and normalised."""

    title: str
    mean: tuple[float, ...]  # per channel, in units of the stored pixel (0..255)
    std: tuple[float, ...]
    size: tuple[int, int]
    folders: tuple[str, ...]  # looked through in this order, below the data folder
    readers: tuple[Callable[[Path], "_Raw | None"], ...]
    download: str  # class of torchvision.datasets


def load_dataset(name: str, data_dir: Path | str | None = None, *, download: bool = False) -> Splits:
    """Load one data set, normalised with its published input statistics (digits: those of its training part).

    MNIST and CIFAR-10 have no validation part: the published metrics of their checkpoints are measured on the 10,000
    test images, so ``validation`` is ``test`` there.

    Args:
        name: ``digits``, ``mnist``, ``fashion_mnist`` or ``cifar10``.
        data_dir: Folder with the files (see the module); not needed for the digits.
        download: Fetch missing files into ``data_dir`` with torchvision.

    Raises:
        ValueError: Unknown name, or a damaged file (named).
        FileNotFoundError: No such folder, or no files of this data set in it.
        ImportError: The extra ``zoo-common[data]`` is not installed.
    """
    if name != "digits" and name not in _SOURCES:
        raise ValueError(f"unknown data set {name!r}; there are digits, {', '.join(_SOURCES)}")
    return _load(name, None if data_dir is None else Path(data_dir).resolve(), download)


@lru_cache(maxsize=2)
def _load(name: str, data_dir: Path | None, download: bool) -> Splits:
    if name == "digits":
        return _digits()
    source = _SOURCES[name]
    raw = _find(source, data_dir)
    if raw is None and download and data_dir is not None:
        _torchvision_download(source, data_dir)
        raw = _find(source, data_dir)
    if raw is None:
        where = "no data folder given" if data_dir is None else f"not found in {data_dir}"
        if data_dir is not None and not data_dir.is_dir():
            where = f"there is no folder {data_dir}"
        raise FileNotFoundError(
            f"{source.title}: {where}; give the folder that holds its original files or .npz with --data-dir, "
            f"or fetch them there: with --download, where a command has it, or with "
            f"torchvision.datasets.{source.download}(FOLDER, download=True)"
        )
    train = _normalise(raw.train_images, raw.train_labels, source)
    test = _normalise(raw.test_images, raw.test_labels, source)
    return Splits(train, test, test)


def _digits() -> Splits:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits need scikit-learn: pip install 'zoo-common[data]'") from error
    pixels, target = load_digits(return_X_y=True)
    order = np.random.RandomState(0).permutation(len(pixels))
    images = torch.from_numpy(pixels[order].astype(np.float32) / 16).reshape(-1, 1, 8, 8)
    labels = torch.from_numpy(target[order].astype(np.int64))
    train = images[: DIGITS_SPLIT[0]]
    images = (images - train.mean()) / train.std(correction=0)
    parts = zip(images.split(DIGITS_SPLIT), labels.split(DIGITS_SPLIT), strict=True)
    return Splits(*(Part(x, y) for x, y in parts))


def _normalise(images: np.ndarray, labels: np.ndarray, source: _Source) -> Part:
    """uint8 (n, h, w[, c]) -> normalised float32 (n, c, h, w)."""
    channels = len(source.mean)
    shape = (len(labels), *source.size) if channels == 1 else (len(labels), *source.size, channels)
    if images.dtype != np.uint8 or images.shape != shape or labels.min() < 0 or labels.max() > 9:
        raise ValueError(
            f"{source.title}: expected uint8 images {shape} with labels 0..9, got {images.dtype} {images.shape}"
        )
    pixels = torch.from_numpy(images).reshape(len(labels), *source.size, channels).permute(0, 3, 1, 2)
    values = pixels.to(torch.float32, memory_format=torch.contiguous_format)
    values -= torch.tensor(source.mean).view(-1, 1, 1)
    values /= torch.tensor(source.std).view(-1, 1, 1)
    return Part(values, torch.from_numpy(labels.astype(np.int64)))


def _find(source: _Source, data_dir: Path | None) -> _Raw | None:
    """Read the first form of the data set that the folder holds; None if there is none."""
    if data_dir is None:
        return None
    for folder in (data_dir, *(data_dir / name for name in source.folders)):
        for reader in source.readers:
            raw = reader(folder)
            if raw is not None:
                return raw
    return None


def _torchvision_download(source: _Source, data_dir: Path) -> None:
    try:
        from torchvision import datasets
    except ImportError as error:
        raise ImportError("downloading needs torchvision: pip install 'zoo-common[data]'") from error
    try:
        getattr(datasets, source.download)(root=data_dir, download=True)
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(f"{source.title}: download into {data_dir} failed ({error})") from error


# idx files (MNIST, Fashion-MNIST)


def _read_idx_folder(folder: Path) -> _Raw | None:
    files = []
    for stem in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        names = [f"{stem}-ubyte", f"{stem}-ubyte.gz", f"{stem.replace('-idx', '.idx')}-ubyte"]
        found = [folder / name for name in names if (folder / name).is_file()]
        if not found:
            return None
        files.append(found[0])
    return _Raw(*(_read_idx(path) for path in files))


def _read_idx(path: Path) -> np.ndarray:
    """One idx file of unsigned bytes: magic 0 0 8 ndim, big-endian sizes, data."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: damaged gzip file ({error})") from error
    ndim = content[3] if len(content) >= 4 and content[:3] == b"\x00\x00\x08" else 0
    shape = (
        np.frombuffer(content[4 : 4 + 4 * ndim], dtype=">u4").astype(int)
        if ndim and len(content) >= 4 + 4 * ndim
        else ()
    )
    if not len(shape) or len(content) != 4 + 4 * ndim + int(np.prod(shape)):
        raise ValueError(f"{path}: not a complete idx file of bytes ({len(content)} bytes); fetch it again")
    return np.frombuffer(bytearray(content[4 + 4 * ndim :]), dtype=np.uint8).reshape(shape)


# .npz files


def _open_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            return dict(file)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: damaged .npz file ({error}); fetch it again") from error


def _read_npz(filename: str) -> Callable[[Path], _Raw | None]:
    def read(folder: Path) -> _Raw | None:
        path = folder / filename
        if not path.is_file():
            return None
        arrays = _open_npz(path)
        if set(arrays) == {"test_images", "test_labels"}:
            images, labels = arrays["test_images"], arrays["test_labels"]
            n = FASHION_TRAIN
            return _Raw(images[:n], labels[:n], images[n:], labels[n:])
        missing = set(_Raw._fields) - set(arrays)
        if missing:
            raise ValueError(f"{path}: lacks the arrays {sorted(missing)}")
        return _Raw(*(arrays[name] for name in _Raw._fields))

    return read


def _read_jpeg_npz(folder: Path) -> _Raw | None:
    """CIFAR-10 as JPEG: image k is header + scans[offsets[k]:offsets[k + 1]] + FF D9."""
    path = folder / "cifar10_jpeg.npz"
    if not path.is_file():
        return None
    arrays = _open_npz(path)
    try:
        decoded = [
            part
            for split in ("train", "test")
            for part in (
                _decode(arrays["header"], arrays[f"{split}_scans"], arrays[f"{split}_offsets"], path),
                arrays[f"{split}_labels"],
            )
        ]
    except KeyError as error:
        raise ValueError(f"{path}: lacks the array {error}") from error
    return _Raw(*decoded)


def _decode(header: np.ndarray, scans: np.ndarray, offsets: np.ndarray, path: Path) -> np.ndarray:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise ImportError("JPEG images need Pillow: pip install 'zoo-common[data]'") from error
    start, body = header.tobytes(), scans.tobytes()

    def decode(k: int) -> np.ndarray:
        with Image.open(io.BytesIO(start + body[offsets[k] : offsets[k + 1]] + b"\xff\xd9")) as image:
            return np.asarray(image.convert("RGB"))

    try:
        with ThreadPoolExecutor() as pool:  # Pillow decodes outside the interpreter lock
            return np.stack(list(pool.map(decode, range(len(offsets) - 1), chunksize=256)))
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"{path}: an image cannot be decoded ({error})") from error


# The CIFAR-10 python archive


_CIFAR_BATCHES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
_LARGEST_BATCH = 2**28  # bytes in memory; one of the archive needs 31 MB


def _read_cifar_archive(folder: Path) -> _Raw | None:
    unpacked, packed = folder / "cifar-10-batches-py", folder / "cifar-10-python.tar.gz"
    if (folder / "data_batch_1").is_file():
        unpacked = folder
    if unpacked.is_dir():
        batches = [_read_cifar_batch(content, unpacked / name) for name, content in _folder_batches(unpacked)]
    elif packed.is_file():
        batches = [_read_cifar_batch(content, packed / name) for name, content in _tar_batches(packed)]
    else:
        return None
    images, labels = zip(*batches, strict=True)
    return _Raw(np.concatenate(images[:-1]), np.concatenate(labels[:-1]), images[-1], labels[-1])


def _folder_batches(folder: Path) -> Iterator[tuple[str, bytes]]:
    for name in _CIFAR_BATCHES:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing; unpack the archive again")
        yield name, (folder / name).read_bytes()


def _tar_batches(path: Path) -> Iterator[tuple[str, bytes]]:
    try:
        with tarfile.open(path) as archive:
            for name in _CIFAR_BATCHES:
                member = archive.extractfile(f"cifar-10-batches-py/{name}")
                if member is None:
                    raise KeyError(name)
                yield name, member.read()
    except (tarfile.TarError, OSError, EOFError, KeyError, zlib.error) as error:
        raise ValueError(f"{path}: damaged archive ({error}); fetch it again") from error


def _read_cifar_batch(content: bytes, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """One batch: b"data" (n, 3072) uint8 in the order channel, row, column, and b"labels"."""
    try:
        batch = load_pickles(Stream(io.BytesIO(content), len(content), Budget(_LARGEST_BATCH)))
        batch = {key.decode() if isinstance(key, bytes) else key: value for key, value in batch.items()}
        data, labels = np.asarray(batch["data"]), np.asarray(batch["labels"])
        return data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels
    except DAMAGE as error:
        raise ValueError(f"{path}: not a CIFAR-10 batch ({error})") from error


_SOURCES: dict[str, _Source] = {
    "mnist": _Source(
        title="MNIST",
        mean=(0.1307 * 255,),
        std=(0.3081 * 255,),
        size=(28, 28),
        folders=("mnist", "MNIST", "MNIST/raw"),
        readers=(_read_idx_folder, _read_npz("mnist.npz")),
        download="MNIST",
    ),
    "fashion_mnist": _Source(
        title="Fashion-MNIST",
        mean=(0.2860 * 255,),
        std=(0.3530 * 255,),
        size=(28, 28),
        folders=("fashion_mnist", "fashion-mnist", "FashionMNIST", "FashionMNIST/raw"),
        readers=(_read_idx_folder, _read_npz("fashion_mnist.npz"), _read_npz("fashion_mnist_t10k.npz")),
        download="FashionMNIST",
    ),
    "cifar10": _Source(
        title="CIFAR-10",
        mean=(125.3, 123.0, 113.9),
        std=(63.0, 62.1, 66.7),
        size=(32, 32),
        folders=("cifar10", "CIFAR10"),
        readers=(_read_cifar_archive, _read_jpeg_npz),
        download="CIFAR10",
    ),
}
