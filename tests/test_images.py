"""The demonstration's data: idx files, the order of sources, refusals."""

from __future__ import annotations

import gzip
import hashlib
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spartan.training import images as image_data
from spartan.training.images import FILES, IdxFile, load_data, load_folder, read_idx


def idx_bytes(array: torch.Tensor) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.numpy().tobytes()


def write_set(folder: Path, train: int = 40, test: int = 20, side: int = 8) -> list[IdxFile]:
    """A small data set under the file names of the real one, and its checksums."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    files = []
    for file, count in zip(FILES, (train, train, test, test), strict=True):
        shape = (count,) if len(file.shape) == 1 else (count, side, side)
        high = 10 if len(shape) == 1 else 256
        array = torch.randint(0, high, shape, generator=generator, dtype=torch.uint8)
        content = idx_bytes(array)
        (folder / f"{file.name}.gz").write_bytes(gzip.compress(content))
        files.append(IdxFile(file.name, shape, hashlib.sha256(content).hexdigest()))
    return files


@pytest.fixture
def no_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with an empty cache, no Debian package and no network; the cache's folder."""

    def fail(*args: object) -> None:
        raise OSError("unreachable")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(image_data, "DEBIAN_FOLDER", tmp_path / "not-installed")
    monkeypatch.setattr(image_data, "fetch_debian_package", fail)
    monkeypatch.setattr(image_data, "fetch_address", fail)
    return image_data.cache_folder()


@given(
    shape=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    compressed=st.booleans(),
    seed=st.integers(0, 9),
)
def test_idx_round_trip(
    tmp_path_factory: pytest.TempPathFactory, shape: list[int], compressed: bool, seed: int
) -> None:
    array = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    content = idx_bytes(array)
    path = tmp_path_factory.mktemp("idx") / ("data.gz" if compressed else "data")
    path.write_bytes(gzip.compress(content) if compressed else content)
    read, digest = read_idx(path)
    assert torch.equal(read, array)
    assert digest == hashlib.sha256(content).hexdigest()


GOOD = idx_bytes(torch.arange(12, dtype=torch.uint8).view(3, 4))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not an idx file"),
        (b"\x1f\x8b\x08\x00", "not an idx file"),
        (b"\0\0\x0d" + GOOD[3:], "not an idx file of unsigned bytes"),
        (GOOD[:7], "ends within its header"),
        (GOOD[:-1], r"shape \(3, 4\) needs 12 bytes of data, it has 11"),
        (GOOD + b"\0", "needs 12 bytes of data, it has 13"),
    ],
)
def test_damaged_idx_is_refused_by_name(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"train-images-idx3-ubyte: .*{reason}"):
        read_idx(path)


@pytest.mark.parametrize("cut", [5, 20, -4])
def test_damaged_gzip_is_refused_by_name(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(GOOD)[:cut])
    with pytest.raises(ValueError, match=r"t10k-labels-idx1-ubyte\.gz: cannot be read"):
        read_idx(path)


def test_folder_is_standardised_and_named_for_what_it_is(tmp_path: Path) -> None:
    write_set(tmp_path)
    data = load_folder(tmp_path, verified=False)
    assert data.name == f"images of {tmp_path}"
    assert data.train_images.shape == (40, 1, 8, 8) and data.test_labels.shape == (20,)
    deviation, mean = torch.std_mean(data.train_images)
    assert abs(mean) < 1e-5 and abs(deviation - 1) < 1e-5
    assert len(data.first(7).train_labels) == 7 and "first 7" in data.first(7).name


def test_unverified_folder_needs_all_files_that_fit(tmp_path: Path) -> None:
    write_set(tmp_path)
    (tmp_path / f"{FILES[3].name}.gz").unlink()
    with pytest.raises(FileNotFoundError, match=FILES[3].name):
        load_folder(tmp_path, verified=False)
    (tmp_path / FILES[3].name).write_bytes(idx_bytes(torch.zeros(19, dtype=torch.uint8)))
    with pytest.raises(ValueError, match="do not match"):
        load_folder(tmp_path, verified=False)
    (tmp_path / FILES[3].name).write_bytes(GOOD)
    with pytest.raises(ValueError, match=f"{FILES[3].name}: has 2 dimensions"):
        load_folder(tmp_path, verified=False)


def test_data_of_another_checksum_is_refused_by_name(tmp_path: Path) -> None:
    write_set(tmp_path)
    with pytest.raises(ValueError, match=rf"{FILES[0].name}\.gz: SHA-256 .* is not Fashion-MNIST's"):
        load_folder(tmp_path, verified=True)


def test_data_argument_is_the_only_place_looked_at(tmp_path: Path, no_sources: Path) -> None:
    with pytest.raises(FileNotFoundError, match="train-images"):
        load_data(tmp_path)


def test_sources_in_order(tmp_path: Path, no_sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The installed package serves, before it the cache; a damaged file is named and passed over."""
    installed = tmp_path / "installed"
    monkeypatch.setattr(image_data, "DEBIAN_FOLDER", installed)
    monkeypatch.setattr(image_data, "FILES", tuple(write_set(installed)))
    assert load_data().source == str(installed)
    write_set(no_sources)
    data = load_data()
    assert (data.name, data.source) == ("Fashion-MNIST", str(no_sources))
    (no_sources / f"{FILES[2].name}.gz").write_bytes(b"damaged")
    notices: list[str] = []
    assert load_data(notice=notices.append).source == str(installed)
    assert len(notices) == 1 and FILES[2].name in notices[0]


def test_address_is_verified_before_it_reaches_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published, cache = tmp_path / "published", tmp_path / "cache"
    files = write_set(published)
    monkeypatch.setattr(image_data, "FILES", tuple(files))
    image_data.fetch_address(published.as_uri(), cache)
    assert load_folder(cache, verified=True).name == "Fashion-MNIST"
    (published / f"{FILES[1].name}.gz").write_bytes(gzip.compress(GOOD))
    with pytest.raises(ValueError, match=FILES[1].name):
        image_data.fetch_address(published.as_uri(), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_debian_package_is_unpacked_into_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for the two tools: what they are asked to do, and where the files end."""
    files = write_set(tmp_path / "published")
    monkeypatch.setattr(image_data, "FILES", tuple(files))
    monkeypatch.setattr(image_data.shutil, "which", lambda tool: f"/usr/bin/{tool}")
    commands = []

    def run(command: list[str], cwd: Path | None = None, **options: object) -> None:
        commands.append(command[:2])
        if command[0] == "apt-get":
            assert cwd is not None
            (cwd / "dataset.deb").touch()
        else:
            write_set(Path(command[-1]) / "usr/share/datasets/fashion-mnist")

    monkeypatch.setattr(subprocess, "run", run)
    image_data.fetch_debian_package(tmp_path / "cache")
    assert commands == [["apt-get", "download"], ["dpkg-deb", "-x"]]
    assert load_folder(tmp_path / "cache", verified=True).name == "Fashion-MNIST"


def test_digits_are_the_last_resort(no_sources: Path) -> None:
    pytest.importorskip("sklearn")
    data = load_data()
    assert data.source == "scikit-learn" and "digits" in data.name
    assert data.side == 8 and data.classes == 10 and len(data.train_labels) + len(data.test_labels) == 1797


def test_without_any_source_the_message_says_what_to_do(no_sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise ImportError("No module named 'sklearn'")

    monkeypatch.setattr(image_data, "load_digits", missing)
    with pytest.raises(RuntimeError, match="--data"):
        load_data()
