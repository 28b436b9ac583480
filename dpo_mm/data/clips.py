"""Clips of video models. A clip is one image, with its frames of equal size side by side from left to right.

So rows, stores, hashes, votes and pages hold clips as they hold images, without loss and without a library for video.
"""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

SHOWN = 5
"""Frames that a preview shows, at most."""


def clip_image(frames: Sequence[Image.Image]) -> Image.Image:
    """Join frames of equal size to a clip. One frame is returned unchanged."""
    if len(frames) == 1:
        return frames[0]
    width, height = frames[0].size
    clip = Image.new("RGB", (width * len(frames), height))
    for number, frame in enumerate(frames):
        clip.paste(frame, (number * width, 0))
    return clip


def clip_frames(clip: Image.Image, count: int) -> list[Image.Image]:
    """Split a clip into its frames. A count of 1 returns the image unchanged.

    Raises:
        ValueError: if its width is not a multiple of the count.
    """
    if count == 1:
        return [clip]
    check_clip_width(clip.size, count)
    width = clip.width // count
    return [clip.crop((number * width, 0, (number + 1) * width, clip.height)) for number in range(count)]


def check_clip_width(size: tuple[int, int], count: int) -> None:
    """Raise ValueError unless a clip of this width and height has this number of frames."""
    if size[0] % count:
        raise ValueError(f"its {size[0]}x{size[1]} pixels are not {count} frames of equal width side by side")


def clip_preview(clip: Image.Image, count: int) -> Image.Image:
    """Return the clip with a few of its frames at equal distances in time, the first and the last among them."""
    frames, shown = clip_frames(clip, count), min(count, SHOWN)
    if shown == count:
        return clip
    return clip_image([frames[round(number * (count - 1) / (shown - 1))] for number in range(shown)])
