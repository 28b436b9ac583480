"""The width of a line is that of its font."""

from __future__ import annotations

import numpy as np
import pytest

from dpo_mm.worlds import documents, faces


@pytest.mark.parametrize("face", faces.FACES)
def test_width_of_a_line_is_that_of_its_font(face: str) -> None:
    """Mutation that it catches: the sum of the characters without kerning."""
    font, rng = faces.font_of(face, 9 * faces.OVERSAMPLE), np.random.default_rng(0)
    lines = [
        "",
        "AVAWA To. f, Index ....... 41",
        *("".join(rng.choice(list(documents.CHARACTERS), 30)) for _ in range(50)),
    ]
    expected = [font.getlength(line) / faces.OVERSAMPLE for line in lines]
    assert [faces.measure(line, face, 9) for line in lines] == expected
