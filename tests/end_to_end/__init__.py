"""Whole commands, from an empty folder to a report."""

import re


def beside_bars(stderr: str) -> list[str]:
    """Lines of a command's stderr besides its progress bars and the advice of training, which begins with its step.

    There are none on the happy path, not even warnings of other libraries.
    """
    lines = [line for line in stderr.replace("\r", "\n").splitlines() if line.strip() and "\u2501" not in line]
    return [line for line in lines if not re.match(r"step \d+: ", line)]
