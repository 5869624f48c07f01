"""Data source of image folders: files are read in a fixed order, decoded once into the cache, bad files listed."""

import os
import re
import stat
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import PIL
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import Field

from pvae.data.rows import cache, prepare, rows
from pvae.data.rows.files import candidate, held, require_room, version_of
from pvae.data.sources.base import FileData
from pvae.errors import DataError, printable, refuse
from pvae.util import digest, pretty

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
SUFFIXES = frozenset(".png .jpg .jpeg .bmp .gif .ppm .pgm .pbm .tif .tiff .webp".split())
MAX_PIXELS = 2**26
"""Largest number of pixels of an image, 8192 x 8192."""
PLAIN_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX")
"""Pillow's modes that become luminance or colour without a choice of colour profile."""
IMAGES_AT_ONCE = 8
DECODING_THREADS = 4
SKIPPED_LISTED = 5


Side = Annotated[int, Field(gt=0, le=2**13)]
"""Number of pixels along one side of an image."""


class Images(FileData):
    """Images (PNG, JPEG, BMP, GIF, PPM, TIFF, WebP) of a folder and its sub-folders, in the order of their names.

    Images are decoded once into the cache. A file that cannot be read is skipped and listed in `Dataset.notes`, which
    also counts images of which something is not read: transparency, further pages or frames, other colour spaces. If
    every image is in a sub-folder, the names of the top sub-folders are the labels. Paths in the folder are the ids.
    """

    source: Literal["images"] = "images"
    size: Annotated[tuple[Side, Side], Field(strict=False)] | None = None
    """`[height, width]` to which images are resized (bilinear, antialiased); None requires images of equal size."""
    mode: Literal["L", "RGB"] = "RGB"
    """Channels: one of luminance (`L`), or three of colour (`RGB`)."""
    mask: str | None = None
    """Folder of masks, images of the same names and size (after `size`), white where a pixel is missing and black
    elsewhere; None for none. New rows have none."""
    background: Literal["white", "black"] = "white"
    """Background on which transparent pixels are composited; `Dataset.notes` says how many images have some."""
    scale: prepare.Scale = "unit"
    """Scaling of the pixels; `unit` divides by 255."""

    def read(self, data_dir: Path | None, seed: int) -> rows.Rows:
        """Return rows (n, channels, height, width), uint8.

        Raises:
            DataError: the folder does not exist, contains no readable image, or images differ in size and no `size` is
                declared; or the masks are of other images.
        """
        kept, root = self._kept(data_dir)
        y = kept.arrays["y"][:] if "y" in kept.arrays else None
        x, names = held(kept.arrays["x"], self.stream, str(root)), tuple(kept.notes["label_names"]) or None
        more: dict[str, Any] = {"notes": tuple(kept.notes["told"]), "ids": kept.texts("id"), "label_names": names}
        if self.mask is not None:
            masks, where = self.model_copy(update={"path": self.mask, "mode": "L"})._kept(data_dir)
            other = set(more["ids"]) ^ set(masks.texts("id"))
            refuse(other, f"{where}: expected a mask for each image; got {min(other, default='')} without its other.")
            x = prepare.Holed(x, held(masks.arrays["x"], self.stream, str(where)), str(where), 255)
        return self.to_rows(x, y, "images", **more)

    def _kept(self, data_dir: Path | None) -> tuple[Any, Path]:
        """Return the decoded images in the cache, and their folder."""
        refuse((root := candidate(self.path, data_dir, Path.is_dir)).is_file(), "data.sources.packed_images", root=root)
        refuse(not root.is_dir(), "data.sources.no_images", root=root)
        files, skipped = found(root)
        refuse(not files, f"{root}: expected images ({', '.join(FORMATS)}); got none.{_listed(skipped)}")
        listing = digest(pretty({"files": files}).encode())
        entry = {"source": "images", "path": str(root.resolve()), "files": listing, "skipped": skipped}
        options = {"size": self.size, "mode": self.mode, "background": self.background, "pillow": PIL.__version__}
        return cache.decoded({**entry, **options}, lambda writer: _decode(writer, root, files, skipped, self)), root


ImageFile = tuple[str, *tuple[int, ...]]
"""Candidate image file: its path inside the folder (with slashes), and its version, from `version_of`."""


def found(root: Path) -> tuple[list[ImageFile], list[str]]:
    """Return the candidate image files, sorted by path, and descriptions of the skipped files with the reason.

    Hidden files and folders are ignored; links that lead out of the folder, links to folders, devices and pipes are
    skipped.
    """
    files: list[ImageFile] = []
    skipped: list[str] = []
    inside = root.resolve()

    def unreadable(error: OSError) -> None:
        skipped.append(f"{printable(str(error.filename))} ({error.strerror})")

    for folder, folders, names in os.walk(root, onerror=unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        linked = [path for name in folders if (path := Path(folder, name)).is_symlink()]
        for path in [*linked, *(Path(folder, name) for name in names if not name.startswith("."))]:
            local = path.relative_to(root).as_posix()
            if problem := "a link to a folder" if path in linked else _problem(path, inside):
                skipped.append(f"{printable(local)} ({problem})")
            else:
                files.append((local, *version_of(path)))
    return sorted(files), sorted(skipped)


def _problem(path: Path, root: Path) -> str:
    try:
        if path.is_symlink() and not path.resolve(strict=True).is_relative_to(root):
            return "a link out of the folder"
        if not stat.S_ISREG(path.stat().st_mode):
            return "no plain file"
    except (OSError, RuntimeError):  # a loop of links
        return "a link to nothing"
    return "" if path.suffix.lower() in SUFFIXES else "no image by its name"


def _decode(writer: cache.Writer, root: Path, files: list[ImageFile], skipped: list[str], declared: Images) -> None:
    """Write decoded images `x` (n, C, H, W) uint8, labels `y` (n,) if any, and notes into a cache entry."""
    shape, good, bad, changed = None, list[str](), list(skipped), Counter[str]()
    with warnings.catch_warnings(), ThreadPoolExecutor(DECODING_THREADS) as pool:
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for start in range(0, len(files), IMAGES_AT_ONCE):
            names = [name for name, *_ in files[start : start + IMAGES_AT_ONCE]]
            images = pool.map(lambda name: image(root / name, declared), names)
            for name, found in zip(names, images, strict=True):
                if isinstance(found, str):
                    bad.append(f"{printable(name)} ({found})")
                    continue
                pixels, remarks = found
                changed.update(remarks)
                if shape is None and not declared.stream:
                    require_room((len(files), *pixels.shape), pixels.dtype, str(root))
                shape = shape or pixels.shape
                if pixels.shape != shape:
                    both = printable(good[0]), printable(name)
                    raise DataError.of("data.sources.sizes", root=root, names=both, one=shape, other=pixels.shape)
                writer.append("x", pixels[None])
                good.append(name)
    refuse(not good, f"{root}: expected images that can be read; got none.{_listed(bad)}")
    writer.append_texts("id", np.array(good), None)
    labels = [name.split("/", 1)[0] for name in good] if all("/" in name for name in good) else []
    if known := sorted(set(labels), key=rows.natural):
        number = {name: code for code, name in enumerate(known)}
        writer.append("y", np.array([number[name] for name in labels]))
    told = [f"{root}:{_listed(bad)}"] if bad else []
    told += [f"{root}: {count} of {len(good)} images {remark}" for remark, count in changed.items()]
    writer.notes |= {"told": told, "label_names": known}


def image(path: Path, declared: Images) -> tuple[np.ndarray, list[str]] | str:
    """Return an image (C, H, W) uint8, rotated as its EXIF tag says, and remarks on it; or why it cannot be read."""
    try:
        with Image.open(path, formats=FORMATS) as file:  # its header alone; nothing is decoded yet
            width, height = file.size
            if width * height > MAX_PIXELS:
                return f"{width} x {height} pixels, more than {MAX_PIXELS}"
            if file.mode[0] in "IF" or _is_deep(file):
                return f"more than 8 bits a channel, mode {file.mode}"
            file.verify()  # checksums, where the format has them
        with Image.open(path, formats=FORMATS) as file:
            frames = getattr(file, "n_frames", 1)
            remarks = ["have more than one page or frame: the first is read"] if frames > 1 else []
            if file.mode not in PLAIN_MODES:
                remarks.append(f"are in {file.mode}: converted to {declared.mode} without a colour profile")
            upright = ImageOps.exif_transpose(file)
            if upright.has_transparency_data:
                upright, seen = _composited(upright, declared.background)
                remarks += [f"have transparent pixels: composited on {declared.background} (data.background)"] * seen
            upright = upright.convert(declared.mode)
            if declared.size is not None and upright.size != declared.size[::-1]:
                upright = upright.resize(declared.size[::-1], Image.Resampling.BILINEAR)
            pixels = np.asarray(upright, np.uint8)
    except UnidentifiedImageError:
        return "no image by its content"
    except Exception as error:  # decoders of foreign bytes may raise anything
        return printable(str(error)) or type(error).__name__
    return pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1), remarks


def _is_deep(file: Image.Image) -> bool:
    """Return True if samples of more than 8 bits would be cut to 8, which Pillow does without a word in colour."""
    tiles = [tile[3] for tile in getattr(file, "tile", ())]
    named = [word for args in tiles for word in (args if isinstance(args, tuple) else (args,))]
    deep = re.compile(r"(?!BGR).*;16")  # BGR;16 has 5 or 6 bits a channel
    is_wide = file.format == "PPM" and any(isinstance(word, int) and word > 255 for word in named)
    return is_wide or any(isinstance(word, str) and deep.match(word) for word in named)


def _composited(picture: Image.Image, background: str) -> tuple[Image.Image, bool]:
    """Return a picture over an opaque background, and True if some of its pixels are transparent."""
    layered = picture.convert("RGBA")
    seen = int(np.asarray(layered)[..., 3].min()) < 255
    return Image.alpha_composite(Image.new("RGBA", layered.size, background), layered), seen


def _listed(skipped: list[str]) -> str:
    if not skipped:
        return ""
    more = f" and {len(skipped) - SKIPPED_LISTED} more" if len(skipped) > SKIPPED_LISTED else ""
    return f" {len(skipped)} skipped: {', '.join(skipped[:SKIPPED_LISTED])}{more}."
