"""Pictures of a set on this disk, by the path that its rows name: loose files, and members of its tar and zip archives.

Zip and plain tar are read where they lie, in parts or whole; a compressed tar can't be, and is unpacked beside the
import. A member called `..` or by an absolute path, a link or a device is refused with its archive. No URL is fetched.
"""

from __future__ import annotations

import gzip
import io
import os
import re
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

ARCHIVE = re.compile(
    r"(?P<whole>.+\.(?P<kind>tar\.gz|tgz|tar|zip))(?:\.?(?:part|z)?[-_.]?[0-9a-z]{1,5})?$", re.IGNORECASE
)
"""An archive or one part of it: images.zip, images.tar.gz.00, images.tar.part-aa."""
MAX_BYTES = 2**28
"""Of one member; a picture file is smaller, a decompression bomb isn't."""


class Place(NamedTuple):
    """Where a picture lies: a file, or bytes within an archive (offset and size), or a zip's member."""

    file: Any
    offset: int = -1
    size: int = -1
    member: str = ""


class Joined(io.RawIOBase):
    """Parts of one file as one file that can be sought in."""

    def __init__(self, parts: list[Path]) -> None:
        self._files = [part.open("rb") for part in parts]
        self._sizes = [part.stat().st_size for part in parts]
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: sum(self._sizes)}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        start = 0
        for file, size in zip(self._files, self._sizes, strict=True):
            if self._at < start + size:
                file.seek(self._at - start)
                count = file.readinto(memoryview(buffer)[: start + size - self._at])
                self._at += count
                return count
            start += size
        return 0

    def close(self) -> None:
        for file in self._files:
            file.close()
        super().close()


class Files:
    """What a set's folder holds. scratch: where compressed tars are unpacked, made at need.

    Raises ValueError where an archive holds what is refused.
    """

    def __init__(self, folder: Path, scratch: Path) -> None:
        self.folder, self.scratch = folder, scratch
        self._places: dict[str, list[tuple[str, Place]]] | None = None

    def read(self, path: str) -> bytes:
        """The bytes of a picture. Raises FileNotFoundError with the reason where there are none to be had."""
        if "://" in path:
            raise FileNotFoundError("a picture is a URL, and nothing is fetched from one")
        wanted = PurePosixPath(path.replace("\\", "/"))
        if ".." in wanted.parts:
            raise FileNotFoundError("a picture's path leads out of its folder")
        direct = self.folder / str(wanted).lstrip("/")
        if direct.is_file():
            return direct.read_bytes()
        place = self._find(wanted)
        if place is None:
            raise FileNotFoundError("a picture is not there")
        return _bytes(place)

    def _find(self, wanted: PurePosixPath) -> Place | None:
        """The one of that name whose folders agree for longest, from the end; None where there is none or two do."""
        if self._places is None:
            self._places = self._index()
        close = sorted(
            ((_agree(wanted, PurePosixPath(name)), place) for name, place in self._places.get(wanted.name, ())),
            key=lambda found: found[0],
            reverse=True,
        )
        if not close or (len(close) > 1 and close[0][0] == close[1][0]):
            return None
        return close[0][1]

    def _index(self) -> dict[str, list[tuple[str, Place]]]:
        found: dict[str, list[tuple[str, Place]]] = {}
        for name, place in self._everything():
            found.setdefault(PurePosixPath(name).name, []).append((name, place))
        return found

    def _everything(self) -> Iterator[tuple[str, Place]]:
        archives: dict[Path, list[Path]] = {}
        for file in _walk(self.folder):
            match = ARCHIVE.match(file.name)
            if match:
                archives.setdefault(file.with_name(match["whole"]), []).append(file)
            else:
                yield file.relative_to(self.folder).as_posix(), Place(file)
        for whole, parts in sorted(archives.items()):
            yield from _members(whole, sorted(parts), self.scratch)


def _walk(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder, followlinks=False):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(place) / name for name in sorted(names) if not name.startswith("."))


def _agree(wanted: PurePosixPath, name: PurePosixPath) -> int:
    both = zip(reversed(wanted.parts), reversed(name.parts), strict=False)
    return next((n for n, (one, other) in enumerate(both) if one != other), min(len(wanted.parts), len(name.parts)))


def _members(whole: Path, parts: list[Path], scratch: Path) -> Iterator[tuple[str, Place]]:
    """The pictures of an archive. Raises ValueError where it is damaged or holds what is refused."""
    stream = Joined(parts)
    try:
        if whole.suffix.lower() == ".zip":
            yield from _zipped(whole, stream)
        elif whole.suffix.lower() == ".tar":
            with tarfile.open(fileobj=io.BufferedReader(Joined(parts)), mode="r:") as archive:
                for member in _tarred(whole, archive):
                    yield member.name, Place(stream, member.offset_data, member.size)
        else:
            unpacked = unpack(whole, stream, scratch / whole.name)
            yield from ((file.relative_to(unpacked).as_posix(), Place(file)) for file in _walk(unpacked))
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{whole}: not readable as an archive ({error}); is a part missing?") from error


def _zipped(whole: Path, stream: Joined) -> Iterator[tuple[str, Place]]:
    archive = zipfile.ZipFile(stream)  # type: ignore[arg-type]
    for info in archive.infolist():
        mode = info.external_attr >> 16
        link = stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR)
        _refuse(whole, info.filename, info.file_size, "a link or a device" if link else "")
        if not info.is_dir():
            yield info.filename, Place(archive, size=info.file_size, member=info.filename)


def _tarred(whole: Path, archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    for member in archive:
        odd = "" if member.isreg() or member.isdir() else "a link or a device"
        _refuse(whole, member.name, member.size, odd)
        archive.members.clear()  # type: ignore[attr-defined]  # it would keep every one
        if member.isreg():
            yield member


def _refuse(whole: Path, name: str, size: int, odd: str) -> None:
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or re.match(r"[A-Za-z]:", name):
        odd = "a path that leads out of the archive"
    elif size > MAX_BYTES:
        odd = f"of {size:,} bytes, more than {MAX_BYTES:,}"
    if odd:
        raise ValueError(f"{whole}: member {name!r} is {odd}; such an archive is refused, nothing was taken from it")


def unpack(whole: Path, stream: Joined, folder: Path) -> Path:
    """A compressed tar's files in a folder, which is made aside and then renamed. Raises ValueError as `Files` does."""
    if folder.is_dir():
        return folder
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        with gzip.open(io.BufferedReader(stream)) as plain, tarfile.open(fileobj=plain, mode="r|") as archive:
            for member in _tarred(whole, archive):
                place = aside / PurePosixPath(member.name)
                place.parent.mkdir(parents=True, exist_ok=True)
                data = archive.extractfile(member)
                assert data is not None
                with place.open("wb") as out:
                    shutil.copyfileobj(data, out)
        aside.mkdir(parents=True, exist_ok=True)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def _bytes(place: Place) -> bytes:
    if place.member:
        with place.file.open(place.member) as member:
            data = member.read(place.size + 1)
        if len(data) != place.size:
            raise FileNotFoundError("a picture in an archive is damaged")
        return data
    if place.offset < 0:
        return place.file.read_bytes()
    place.file.seek(place.offset)
    return _exactly(place)


def _exactly(place: Place) -> bytes:
    data = bytearray()
    while len(data) < place.size:
        part = place.file.read(place.size - len(data))
        if not part:
            raise FileNotFoundError("a picture in an archive is damaged")
        data += part
    return bytes(data)
