"""Whole commands, from an empty folder to a report."""


def beside_bars(stderr: str) -> list[str]:
    """Lines of a command's stderr besides its progress bars: none on the happy path, not even warnings of other libraries."""
    return [line for line in stderr.replace("\r", "\n").splitlines() if line.strip() and "\u2501" not in line]
