"""Find the images of a benchmark, which its authors publish apart from the questions."""

from __future__ import annotations

import os
from pathlib import Path


class ImageFolders:
    """Folders in which the images of a benchmark may be: that of its file, and each folder in it.

    Args:
        file: the file with the questions.
    """

    def __init__(self, file: Path) -> None:
        self.file, self.folder = file, file.parent
        self.folders = [self.folder, *sorted(each for each in self.folder.iterdir() if each.is_dir())]

    def find(self, name: str) -> str:
        """Return the path of an image relative to the file's folder.

        Raises:
            ValueError: if no folder has it. It names the image and where it belongs.
        """
        path = next((folder / str(name) for folder in self.folders if (folder / str(name)).is_file()), None)
        if path is None:
            raise ValueError(
                f"{self.file}: image {name} is not in {self.folder} and not in a folder in it. Copy the images of the benchmark there"
            )
        return os.path.relpath(path, self.folder)
