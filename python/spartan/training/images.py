"""Fashion-MNIST from wherever this machine has it, else a smaller data set that comes with scikit-learn."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import math
import os
import shutil
import struct
import subprocess
import tempfile
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
PUBLISHER_ADDRESSES = (
    "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion",
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
)
DOWNLOAD_TIMEOUT_SECONDS = 20
PACKAGE_TIMEOUT_SECONDS = 180
_IDX_UNSIGNED_BYTE = 0x08


@dataclass(frozen=True)
class IdxFile:
    """One file of the data set: name, array shape, SHA-256 of its uncompressed bytes."""

    name: str
    shape: tuple[int, ...]
    sha256: str


FILES = (
    IdxFile(
        "train-images-idx3-ubyte",
        (60_000, 28, 28),
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    ),
    IdxFile(
        "train-labels-idx1-ubyte",
        (60_000,),
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    ),
    IdxFile(
        "t10k-images-idx3-ubyte",
        (10_000, 28, 28),
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    ),
    IdxFile(
        "t10k-labels-idx1-ubyte",
        (10_000,),
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    ),
)


@dataclass(frozen=True)
class ImageData:
    """Labels `[n]` int64 and images `[n, 1, side, side]` float32, standardised by the training images."""

    name: str
    source: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @property
    def side(self) -> int:
        """Height and width of an image in pixels."""
        return self.train_images.shape[-1]

    @property
    def classes(self) -> int:
        """Number of classes."""
        return int(self.train_labels.max()) + 1

    def order(self, seed: int, epoch: int) -> Tensor:
        """The order of the training images in an epoch; it depends on seed and epoch alone."""
        generator = torch.Generator().manual_seed(seed * 10_007 + epoch)
        return torch.randperm(len(self.train_labels), generator=generator, device=generator.device)

    def first(self, count: int | None = None, test_count: int | None = None) -> ImageData:
        """Keep only the first `count` training and `test_count` test images; None keeps all."""
        name = self.name
        if count is not None and count < len(self.train_labels):
            name = f"{name}, first {count:,} training images"
        train, test = slice(count), slice(test_count)
        return ImageData(
            name,
            self.source,
            self.train_images[train],
            self.train_labels[train],
            self.test_images[test],
            self.test_labels[test],
        )


def read_idx(path: Path) -> tuple[Tensor, str]:
    """Read an idx file of unsigned bytes, gzip-compressed where its name ends in .gz.

    The format: two zero bytes, a type byte, the number of dimensions, each as a big-endian uint32, the data.

    Returns:
        The array as uint8 and the SHA-256 of the uncompressed file.

    Raises:
        ValueError: the file, which is named, cannot be read, is not idx, or is not as long as it says.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != _IDX_UNSIGNED_BYTE or content[3] == 0:
        raise ValueError(
            f"{path}: is not an idx file of unsigned bytes (it starts with {content[:4].hex() or 'nothing'})"
        )
    header = 4 + 4 * content[3]
    if len(content) < header:
        raise ValueError(f"{path}: ends within its header of {header} bytes")
    shape = struct.unpack(f">{content[3]}I", content[4:header])
    if len(content) - header != math.prod(shape):
        raise ValueError(
            f"{path}: shape {shape} needs {math.prod(shape)} bytes of data, it has {len(content) - header}"
        )
    array = torch.frombuffer(bytearray(content), dtype=torch.uint8)[header:].view(shape)
    return array, hashlib.sha256(content).hexdigest()


def _existing(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / f"{name}.gz", folder / name) if path.is_file()), None)


def load_folder(folder: Path, *, verified: bool) -> ImageData:
    """Read the four idx files of `folder`; with `verified`, only Fashion-MNIST itself is accepted.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: a file is damaged, does not fit the others, or is not Fashion-MNIST's though `verified`.
    """
    arrays, genuine = [], True
    for file in FILES:
        path = _existing(folder, file.name)
        if path is None:
            raise FileNotFoundError(f"{folder}: has no {file.name}.gz (nor {file.name})")
        array, digest = read_idx(path)
        if verified and digest != file.sha256:
            raise ValueError(f"{path}: SHA-256 {digest} is not Fashion-MNIST's {file.sha256}")
        if array.ndim != len(file.shape):
            raise ValueError(f"{path}: has {array.ndim} dimensions, {len(file.shape)} are expected")
        genuine &= digest == file.sha256
        arrays.append(array)
    for images, labels in (arrays[:2], arrays[2:]):
        if len(images) != len(labels) or len(images) == 0 or images.shape[1] != images.shape[2]:
            raise ValueError(f"{folder}: images {tuple(images.shape)} and labels {tuple(labels.shape)} do not match")
    if arrays[0].shape[1:] != arrays[2].shape[1:]:
        raise ValueError(f"{folder}: training images {tuple(arrays[0].shape)}, test images {tuple(arrays[2].shape)}")
    return _standardised("Fashion-MNIST" if genuine else f"images of {folder}", str(folder), *arrays)


def _standardised(
    name: str, source: str, train: Tensor, train_labels: Tensor, test: Tensor, labels: Tensor
) -> ImageData:
    train_images, test_images = train.float().unsqueeze(1), test.float().unsqueeze(1)
    deviation, mean = torch.std_mean(train_images)
    train_images.sub_(mean).div_(deviation)
    test_images.sub_(mean).div_(deviation)
    return ImageData(name, source, train_images, train_labels.long(), test_images, labels.long())


def cache_folder() -> Path:
    """Where fetched data is kept: spartan-kernels/fashion-mnist in $XDG_CACHE_HOME, or in ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "spartan-kernels" / "fashion-mnist"


def _install(fetched: Path, folder: Path) -> None:
    """Move verified files into the cache, one rename each, so that no reader sees half a file."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in FILES:
        os.replace(fetched / f"{file.name}.gz", folder / f"{file.name}.gz")


def fetch_debian_package(folder: Path) -> None:
    """Fetch Debian's package and unpack it into `folder`; needs apt-get and dpkg-deb, but no root.

    Raises:
        OSError, subprocess.SubprocessError: a tool is missing or failed.
        ValueError: the files are not the data set.
    """
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise FileNotFoundError(f"{tool} is not installed")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        work = Path(name)
        command = ["apt-get", "download", "-q", DEBIAN_PACKAGE]
        subprocess.run(command, cwd=work, check=True, capture_output=True, timeout=PACKAGE_TIMEOUT_SECONDS)
        (package,) = work.glob("*.deb")
        command = ["dpkg-deb", "-x", str(package), str(work)]
        subprocess.run(command, check=True, capture_output=True, timeout=PACKAGE_TIMEOUT_SECONDS)
        unpacked = work / DEBIAN_FOLDER.relative_to("/")
        load_folder(unpacked, verified=True)
        _install(unpacked, folder)


def fetch_address(address: str, folder: Path) -> None:
    """Fetch the four files from one of the publishers' addresses into `folder`.

    Raises:
        OSError, http.client.HTTPException: the address does not answer, or stops answering.
        ValueError: what it sent is not the data set.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        work = Path(name)
        for file in FILES:
            with urllib.request.urlopen(f"{address}/{file.name}.gz", timeout=DOWNLOAD_TIMEOUT_SECONDS) as answer:
                (work / f"{file.name}.gz").write_bytes(answer.read())
        load_folder(work, verified=True)
        _install(work, folder)


def load_digits() -> ImageData:
    """scikit-learn's digits: 1,797 images of 8 x 8 pixels, the first 1,500 for training.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    from sklearn.datasets import load_digits as load

    digits = load()
    images, labels = torch.from_numpy(digits.images), torch.from_numpy(digits.target)
    return _standardised(
        "scikit-learn's digits", "scikit-learn", images[:1500], labels[:1500], images[1500:], labels[1500:]
    )


def _sources(cache: Path) -> Iterator[tuple[str, Callable[[], None], Path]]:
    """Name, what to do first, and the folder to read then, in the order tried."""

    def nothing() -> None:
        return None

    yield "the cache", nothing, cache
    yield "the installed Debian package", nothing, DEBIAN_FOLDER
    yield f"Debian's package {DEBIAN_PACKAGE}", lambda: fetch_debian_package(cache), cache
    for address in PUBLISHER_ADDRESSES:
        yield address, lambda address=address: fetch_address(address, cache), cache  # type: ignore[misc]


def load_data(data: Path | None = None, notice: Callable[[str], None] = lambda message: None) -> ImageData:
    """Fashion-MNIST from `data` if given, else from the first source that has it, else scikit-learn's digits.

    Args:
        data: folder with the four idx files; nothing else is tried when it is given.
        notice: called with one line for each source that failed for another reason than not being there.

    Raises:
        FileNotFoundError, ValueError: `data` lacks a file or a file in it is damaged.
        RuntimeError: no source works, scikit-learn included.
    """
    if data is not None:
        return load_folder(Path(data), verified=False)
    for name, prepare, folder in _sources(cache_folder()):
        try:
            prepare()
            return load_folder(folder, verified=True)
        except ValueError as error:
            notice(f"{name} is refused: {error}")
        except (OSError, subprocess.SubprocessError, http.client.HTTPException):
            continue  # not there, or no network: the next source
    try:
        return load_digits()
    except ImportError as error:
        raise RuntimeError(
            "Fashion-MNIST is in no place looked at, and scikit-learn is not installed for its digits: "
            "give a folder with --data, or install scikit-learn"
        ) from error
