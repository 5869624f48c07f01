"""The image collections: their published checksums, finding, downloading and caching their files."""

import hashlib
import http.server
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock

from pvae.data import MNIST, FashionMNIST, Patches, load
from pvae.data.rows import cache
from pvae.data.sources.collections import FASHION_MNIST, Collection, IdxFile, read_collection, read_known
from pvae.errors import BusyError, OutputError
from tests.data.writers import gzipped, idx_bytes, place, refused, small_arrays, small_collection, zipped_files

ARRAY = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
WHOLE = idx_bytes(ARRAY)
FILE = IdxFile("images", (2, 3, 4), hashlib.sha256(WHOLE).hexdigest())


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"\0\0\x08\x01" + WHOLE[4:], "expected the IDX magic 00 00 08 03; got 00 00 08 01"),
        (b"<html><body>Log in</body></html>", r"got 3c 68 74 6d \(a web page\?\)"),
        (WHOLE[:4] + b"\xff" * 12 + WHOLE[16:], r"expected sizes \[2, 3, 4\]; got \[4294967295, 4294967295"),
        (WHOLE[:-1] + b"\0", "expected the bytes of images with SHA-256"),
        (gzipped(WHOLE[:-1] + b"\0"), "expected the bytes of images with SHA-256"),
    ],
)
def test_idx_files_of_another_collection(content: bytes, match: str, tmp_path: Path):
    """FAULTS 26."""
    (tmp_path / "images").write_bytes(WHOLE)
    assert np.array_equal(read_known(tmp_path / "images", FILE), ARRAY)
    (tmp_path / "images").write_bytes(content)
    refused(match, read_known, tmp_path / "images", FILE)


def test_user_s_folder_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    small = small_collection(system=tmp_path / "system")
    place(tmp_path / "mine" / "mnist", small)
    place(tmp_path / "env", small)
    assert read_collection(small, tmp_path / "mine").x.shape == (16, 1, 3, 3)
    monkeypatch.setenv("PVAE_DATA_DIR", str(tmp_path / "env"))
    assert read_collection(small, None).x.shape == (16, 1, 3, 3)
    monkeypatch.delenv("PVAE_DATA_DIR")
    place(tmp_path / "system", small)
    assert read_collection(small, None).x.shape == (16, 1, 3, 3)


def test_a_data_folder_that_is_not_there(tmp_path: Path):
    refused("expected a folder; got .*absent", load, FashionMNIST(), data_dir=tmp_path / "absent")


def test_mnist_archive_with_other_pixels(small_mnist: Collection, tmp_path: Path):
    arrays = small_arrays()
    arrays["x_test"][0, 0, 0] ^= 1
    np.savez(tmp_path / "mnist.npz", **arrays)  # type: ignore[arg-type]
    refused("expected the bytes of t10k-images-idx3-ubyte with SHA-256", load, MNIST(), data_dir=tmp_path)
    arrays["x_test"] = arrays["x_test"].astype(np.int64)
    np.savez(tmp_path / "mnist.npz", **arrays)  # type: ignore[arg-type]
    refused(r"expected \(4, 3, 3\) unsigned bytes, as in t10k-images.*; got .* int64", load, MNIST(), data_dir=tmp_path)


def test_another_collection_s_files_are_refused(tmp_path: Path):
    place(tmp_path, FASHION_MNIST)
    refused(r"expected sizes \[60000, 28, 28\]; got \[12, 3, 3\]", load, FashionMNIST(), data_dir=tmp_path)


def test_offline_fails_at_once_and_says_what_to_do(monkeypatch: pytest.MonkeyPatch):
    """FAULTS 31."""
    monkeypatch.setenv("PVAE_OFFLINE", "1")
    start = time.monotonic()
    refused(r"PVAE_OFFLINE is set. Get train-images.*mnist.npz.*PVAE_DATA_DIR=DIR", load, MNIST())
    assert time.monotonic() - start < 1


@dataclass
class Site:
    url: str
    answers: dict[str, bytes]
    status: int = 200
    missing_bytes: int = 0
    served: int = 0


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    found = Site("", {})

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found.served += 1
            body = found.answers.get(self.path[1:], b"<html>Please log in</html>")
            self.send_response(found.status)
            self.send_header("Content-Length", str(len(body) + found.missing_bytes))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        found.url = f"http://127.0.0.1:{server.server_port}/"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield found
        server.shutdown()
        thread.join()


def remote(site: Site) -> Collection:
    small = small_collection(mirrors=(site.url,))
    site.answers |= zipped_files(small)
    return small


def cached(collection: Collection) -> list[str]:
    return sorted(path.name for path in (cache.cache_folder() / collection.slug).glob("*"))


def test_download_once(site: Site):
    small = remote(site)
    rows = read_collection(small, None)
    assert isinstance(rows.x, np.ndarray)
    assert np.array_equal(rows.x[:12, 0], small_arrays()["x_train"])
    assert cached(small) == sorted(site.answers)
    read_collection(small, None)
    assert site.served == 4


def test_a_damaged_cache_entry_is_made_again(site: Site):
    """FAULTS 32."""
    small = remote(site)
    read_collection(small, None)
    entry = cache.cache_folder() / small.slug / f"{small.files['x_test'].name}.gz"
    entry.write_bytes(entry.read_bytes()[:-9])
    read_collection(small, None)
    assert site.served == 5
    assert entry.read_bytes() == site.answers[entry.name]


def test_two_writers_make_one_download(site: Site):
    """FAULTS 32."""
    small = remote(site)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: read_collection(small, None), range(4)))
    assert site.served == 4
    assert cached(small) == sorted(site.answers)


WRONG_PIXELS = gzipped(idx_bytes(small_arrays()["x_train"] ^ 1))


@pytest.mark.parametrize(
    ("fault", "match"),
    [
        (lambda site: site.answers.clear(), r"got 3c 68 74 6d \(a web page\?\)"),
        (lambda site: site.answers.update({"train-images-idx3-ubyte.gz": WRONG_PIXELS}), "SHA-256"),
        (lambda site: setattr(site, "status", 403), "download failed: 403"),
        (lambda site: setattr(site, "missing_bytes", 50), "download failed"),
    ],
)
def test_failed_downloads_leave_nothing(fault: Callable[[Site], Any], match: str, site: Site):
    """FAULTS 31."""
    small = remote(site)
    fault(site)
    refused(f"from a mirror; got: {site.url}.*{match}.*pass --data-dir DIR", read_collection, small, None)
    assert cached(small) == []


def test_the_next_mirror_is_tried(site: Site):
    """FAULTS 31."""
    small = replace(remote(site), mirrors=("http://127.0.0.1:9/", site.url))
    assert read_collection(small, None).x.shape[0] == 16


def test_a_cache_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """FAULTS 42."""
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    refused("Expected a cache folder", read_collection, small_collection(), None, error=OutputError)


def test_a_cache_that_another_process_holds(monkeypatch: pytest.MonkeyPatch):
    """FAULTS 32."""
    small = small_collection()
    monkeypatch.setattr(cache, "LOCK_SECONDS", 0.05)
    folder = cache.cache_folder()
    folder.mkdir(parents=True)
    with FileLock(folder / f"{small.slug}.lock"), pytest.raises(BusyError, match="another process holds it"):
        read_collection(small, None)


def test_published_binarisation_of_fashion_mnist():
    """Exemplar VAE (Norouzi, Fleet, Norouzi, 2020): 2 248 637 ones in the test set of the package's files."""
    state = np.random.get_state()[1].copy()  # type: ignore[index]
    data = load(FashionMNIST(binarize="dynamic"))
    assert int(data.test.x.sum(dtype=torch.float64)) == 2_248_637
    packed = np.packbits(data.test.x.numpy().astype(np.uint8)).tobytes()
    assert hashlib.sha256(packed).hexdigest()[:16] == "25f0d69b40ae46a7"
    assert np.array_equal(state, np.random.get_state()[1])  # type: ignore[index]
    assert isinstance(data.train.raw, torch.Tensor)
    assert float(data.train.raw.mean()) == pytest.approx(float(data.train.x.mean()), abs=2e-3)
    assert data.label_names is not None
    assert data.label_names[9] == "Ankle boot"


def test_patches_of_two_splits_share_no_pixel(monkeypatch: pytest.MonkeyPatch):
    number = np.arange(2 * 150 * 220).reshape(2, 150, 220, 1)  # every pixel of the two photographs by its number
    numbered = (number // [65536, 256, 1] % 256).astype(np.uint8)
    monkeypatch.setattr("sklearn.datasets.load_sample_images", lambda: SimpleNamespace(images=list(numbered)))
    data = load(Patches(size=16, scale="raw"))
    assert tuple(len(split.x) for split in data.splits) == (40 * 81, 4 * 81, 4 * 81)
    seen = []
    for split in data.splits:
        found = (split.x.int() * torch.tensor([65536, 256, 1]).view(3, 1, 1)).sum(1)
        assert (found.diff(dim=-1) == 1).all()  # rows of a patch lie side by side
        assert (found.diff(dim=-2) == 220).all()  # under each other
        assert (found[:, 0, 0] // (150 * 220)).tolist() == split.y.tolist()  # type: ignore[union-attr]
        assert len(found[:, 0, 0].unique()) == len(found)
        seen.append(set(found.unique().tolist()))
    assert not any(seen[i] & seen[j] for i, j in ((0, 1), (0, 2), (1, 2)))
