"""Read a dataset's images by the path in its rows: loose files, and members of its tar and zip archives.

Zip and plain tar are read in place, in one file or in parts. A compressed tar is unpacked into the import's folder. An
archive is refused if a member is called `..`, has an absolute path, or is a link or a device. No URL is fetched.
"""

from __future__ import annotations

import gzip
import io
import lzma
import os
import re
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from dpo_mm.data.row_paths import is_regular, read_regular_file
from dpo_mm.files.resumable import explain_unwritten, temporary_path

ARCHIVE = re.compile(
    r"(?P<name>.+\.(?P<kind>tar\.gz|tgz|tar|zip))(?:\.?(?:part|z)?[-_.]?[0-9a-z]{1,5})?$", re.IGNORECASE
)
"""Name of an archive or of one part of it: images.zip, images.tar.gz.00, images.tar.part-aa."""
BROKEN = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, gzip.BadGzipFile, EOFError, struct.error,
          RuntimeError, OverflowError, UnicodeError)  # fmt: skip
"""What the libraries raise for archives that are damaged, encrypted or packed in an unknown way."""
MAX_RATIO, FREE_BYTES = 20, 2**30
"""A compressed tar may unpack to this number of bytes, plus MAX_RATIO times its size. Images hardly compress."""
MAX_BYTES = 2**28
"""Largest size of one member. Image files are smaller, and a decompression bomb is larger."""


class ImageLocation(NamedTuple):
    """Location of an image: a file, a byte range of an archive (offset and size), or a member of a zip."""

    file: Any
    offset: int = -1
    size: int = -1
    member: str = ""


class JoinedParts(io.RawIOBase):
    """Parts of a split file as one seekable file."""

    def __init__(self, parts: list[Path]) -> None:
        self._files = [part.open("rb") for part in parts]
        self._sizes = [part.stat().st_size for part in parts]
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: sum(self._sizes)}[whence]
        if self._position < 0:
            raise EOFError("an offset in it is before its begin")
        return self._position

    def readinto(self, buffer: Any) -> int:
        start = 0
        for file, size in zip(self._files, self._sizes, strict=True):
            if self._position < start + size:
                file.seek(self._position - start)
                count = file.readinto(memoryview(buffer)[: start + size - self._position])
                self._position += count
                return count
            start += size
        return 0

    def close(self) -> None:
        for file in self._files:
            file.close()
        super().close()


class ImageFiles:
    """Images in a dataset's folder.

    Args:
        folder: folder with the loose files and archives.
        scratch: folder for unpacked compressed tars. It is created when it is needed.
    """

    def __init__(self, folder: Path, scratch: Path) -> None:
        self.folder, self.scratch = folder, scratch
        self._locations: dict[str, list[tuple[str, ImageLocation]]] | None = None

    def read(self, path: str) -> bytes:
        """Return the bytes of an image file.

        Args:
            path: path as the dataset's rows have it.

        Raises:
            FileNotFoundError: if the image is missing, damaged, a URL, or outside the folder. The message is the reason.
            ValueError: if an archive is damaged or unsafe.
        """
        if "://" in path:
            raise FileNotFoundError("an image is a URL, and URLs are not fetched")
        relative = PurePosixPath(path.replace("\\", "/"))
        if ".." in relative.parts:
            raise FileNotFoundError("the path of an image leads out of its folder")
        direct = self.folder / str(relative).lstrip("/")
        if is_regular(direct, self.folder):
            return read_regular_file(direct)
        if os.path.lexists(direct):
            raise FileNotFoundError("the path of an image leads to no regular file of the dataset's folder")
        location = self._find(relative)
        if location is None:
            raise FileNotFoundError("an image is missing")
        return _read_location(location)

    def _find(self, path: PurePosixPath) -> ImageLocation | None:
        """Find the image of that name whose folders agree best, counted from the end.

        Returns None if there is no such image, or if two agree equally well.
        """
        if self._locations is None:
            self._locations = self._index_by_name()
        candidates = sorted(
            (
                (_matching_parts(path, PurePosixPath(name)), location)
                for name, location in self._locations.get(path.name, ())
            ),
            key=lambda candidate: candidate[0],
            reverse=True,
        )
        if not candidates or (len(candidates) > 1 and candidates[0][0] == candidates[1][0]):
            return None
        return candidates[0][1]

    def _index_by_name(self) -> dict[str, list[tuple[str, ImageLocation]]]:
        index: dict[str, list[tuple[str, ImageLocation]]] = {}
        for name, location in self._locate_all():
            index.setdefault(PurePosixPath(name).name, []).append((name, location))
        return index

    def _locate_all(self) -> Iterator[tuple[str, ImageLocation]]:
        archives: dict[Path, list[Path]] = {}
        for file in _files_below(self.folder):
            match = ARCHIVE.match(file.name)
            if match:
                archives.setdefault(file.with_name(match["name"]), []).append(file)
            else:
                yield file.relative_to(self.folder).as_posix(), ImageLocation(file)
        for archive_path, parts in sorted(archives.items()):
            yield from _members(archive_path, sorted(parts), self.scratch)


def _files_below(folder: Path) -> Iterator[Path]:
    """List the regular files below a folder, without links that lead out of it."""
    for parent, folders, names in os.walk(folder, followlinks=False):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for file in (Path(parent) / name for name in sorted(names) if not name.startswith(".")):
            mode = file.lstat().st_mode
            if stat.S_ISREG(mode) or (stat.S_ISLNK(mode) and is_regular(file, folder)):
                yield file


def _matching_parts(path: PurePosixPath, name: PurePosixPath) -> int:
    """Number of equal parts of two paths, counted from the end."""
    both = zip(reversed(path.parts), reversed(name.parts), strict=False)
    return next((n for n, (x, y) in enumerate(both) if x != y), min(len(path.parts), len(name.parts)))


def _members(archive_path: Path, parts: list[Path], scratch: Path) -> Iterator[tuple[str, ImageLocation]]:
    """Yield name and location of each file in an archive. Raises ValueError if it is damaged or unsafe."""
    stream = JoinedParts(parts)
    try:
        if archive_path.suffix.lower() == ".zip":
            yield from _zip_members(archive_path, stream)
        elif archive_path.suffix.lower() == ".tar":
            with tarfile.open(fileobj=io.BufferedReader(JoinedParts(parts)), mode="r:") as archive:
                for member in _safe_members(archive_path, archive):
                    yield member.name, ImageLocation(stream, member.offset_data, member.size)
        else:
            unpacked = unpack_tar(archive_path, stream, scratch / archive_path.name)
            yield from ((file.relative_to(unpacked).as_posix(), ImageLocation(file)) for file in _files_below(unpacked))
    except BROKEN as error:
        raise ValueError(f"{archive_path}: not readable as an archive ({error}). Is a part missing?") from error


def _zip_members(archive_path: Path, stream: JoinedParts) -> Iterator[tuple[str, ImageLocation]]:
    archive = zipfile.ZipFile(stream)  # type: ignore[arg-type]
    for info in archive.infolist():
        mode = info.external_attr >> 16
        link = stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR)
        _refuse_unsafe(archive_path, info.filename, info.file_size, "a link or a device" if link else "")
        if not info.is_dir():
            yield info.filename, ImageLocation(archive, size=info.file_size, member=info.filename)


def _safe_members(archive_path: Path, archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    for member in archive:
        problem = "" if member.isreg() or member.isdir() else "a link or a device"
        _refuse_unsafe(archive_path, member.name, member.size, problem)
        archive.members.clear()  # type: ignore[attr-defined]  # tarfile stores every member
        if member.isreg():
            yield member


def _refuse_unsafe(archive_path: Path, name: str, size: int, problem: str) -> None:
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or re.match(r"[A-Za-z]:", name):
        problem = "a path that leads out of the archive"
    elif size > MAX_BYTES:
        problem = f"of {size:,} bytes, more than {MAX_BYTES:,}"
    if problem:
        raise ValueError(
            f"{archive_path}: member {name!r} is {problem}. Such an archive is refused, and nothing was read from it"
        )


def unpack_tar(archive_path: Path, stream: JoinedParts, folder: Path) -> Path:
    """Unpack a compressed tar into a folder, completely or not at all.

    Args:
        archive_path: name of the archive, for errors.
        stream: its bytes.
        folder: folder to create. If it exists, nothing is unpacked.

    Raises:
        ValueError: if a member is unsafe.
    """
    if folder.is_dir():
        return folder
    temporary = temporary_path(folder)
    left = FREE_BYTES + MAX_RATIO * stream.seek(0, io.SEEK_END)
    stream.seek(0)
    try:
        with gzip.open(io.BufferedReader(stream)) as plain, tarfile.open(fileobj=plain, mode="r|") as archive:
            for member in _safe_members(archive_path, archive):
                left -= member.size
                if left < 0:
                    raise ValueError(
                        f"{archive_path}: unpacks to more than {MAX_RATIO} times its size, which images do not. Such an "
                        "archive is refused. If it is right, unpack it yourself"
                    )
                path = temporary / PurePosixPath(member.name)
                data = archive.extractfile(member)
                assert data is not None
                with explain_unwritten(path):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with path.open("wb") as out:
                        shutil.copyfileobj(data, out)
        temporary.mkdir(parents=True, exist_ok=True)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _read_location(location: ImageLocation) -> bytes:
    if location.member:
        try:
            with location.file.open(location.member) as member:
                data = member.read(location.size + 1)
        except BROKEN as error:
            raise FileNotFoundError("an image in an archive is damaged or encrypted") from error
        if len(data) != location.size:
            raise FileNotFoundError("an image in an archive is damaged")
        return data
    if location.offset < 0:
        return location.file.read_bytes()
    location.file.seek(location.offset)
    return _read_exactly(location)


def _read_exactly(location: ImageLocation) -> bytes:
    data = bytearray()
    while len(data) < location.size:
        part = location.file.read(location.size - len(data))
        if not part:
            raise FileNotFoundError("an image in an archive is damaged")
        data += part
    return bytes(data)
