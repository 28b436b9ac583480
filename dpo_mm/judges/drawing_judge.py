"""The exact judge of the drawings: it detects which drawings are where in an image by matching templates.

It has no weights. The border gives the background. Then the drawing, position and size that explain most of the rest are
taken: those with the largest drop in squared error when this drawing is laid on the background. What they cover is removed,
and so on until nothing of a drawing's size is left. The search runs at half resolution, the decision among the best kinds at
full resolution. A thing that no drawing explains well has no name, so it never satisfies a prompt. Nor has a blob that two
drawings explain almost equally well, unless little is left unexplained.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dpo_mm.data.image_files import to_rgb
from dpo_mm.worlds import drawing_prompts, drawings
from dpo_mm.worlds.drawing_sprites import BACKGROUNDS, kinds, sprite, usual_colour

SIZE, HALF = drawings.SIZE, drawings.SIZE // 2
SINGLE_SIDES, SEVERAL_SIDES = (20, 22, 24, 26), (13, 14, 15)
"""Edges of a drawing that are searched, in pixels at half resolution, if it is alone and if there are several."""
SURE, UNCLEAR = 0.16, 0.25
"""Fraction of a thing left unexplained up to which it always has a name, and above which it has none."""
DISTINCT, CONTESTED = 0.55, 0.92
"""Gain of the best drawing with another name, as a fraction of the best gain. Up to the first a thing is distinct, so that
`UNCLEAR` is the limit at a quarter of the resolution. Above the second only `SURE` gives a name."""
AMBIGUOUS = 2
"""Largest distance of another background that also counts, as a multiple of the nearest one's."""
MIN_AREA = 26
"""Pixels at half resolution that must differ from the background for there to be another thing."""
MIN_DISTANCE = 34 / 255
"""RGB distance from an even background at which a pixel belongs to a thing."""
BORDER_DISTANCE = 0.22
"""Largest RGB distance of a border pixel that belongs to the background."""
CANDIDATES = 6
"""Kinds of drawings that are compared at full resolution."""
BATCH_SIZE = 32


@dataclass(frozen=True)
class DetectedThing:
    """A detected thing.

    Attributes:
        name, colour: None if no drawing explains it.
        x, y, side: centre and edge, as fractions of the image's edge.
        unexplained: fraction of its difference from the background that the best drawing leaves, 0 for an exact copy.
    """

    name: str | None
    colour: str | None
    x: float
    y: float
    side: float
    unexplained: float


@dataclass(frozen=True)
class DetectedScene:
    """Detected things from left to right, and the background. It has two names or more if its colour is between them."""

    things: tuple[DetectedThing, ...]
    backgrounds: tuple[str, ...]


class Background(NamedTuple):
    """Background of an image.

    Attributes:
        names: its colour, and others that are about as near.
        rgb: median of the border pixels that belong to it, (3,) in [0, 1].
    """

    names: tuple[str, ...]
    rgb: Tensor


@dataclass
class Search:
    """State of the search in one image.

    Attributes:
        full: difference from the background, (3, 64, 64).
        rest: the same at half resolution, without what the detected things cover, (3, 32, 32).
        rgb: background, (3,).
        min_distance: RGB distance at which a pixel belongs to a thing. It is larger on an uneven background.
        unevenness: mean squared difference from the background at the border.
        things: detected things.
        gain: drop in squared error of all of them.
    """

    full: Tensor
    rest: Tensor
    rgb: Tensor
    min_distance: float
    unevenness: float
    things: list[DetectedThing] = field(default_factory=list)
    gain: float = 0.0

    @property
    def is_finished(self) -> bool:
        """Tell if too few pixels are left for another thing."""
        return float((self.rest.norm(dim=0) > self.min_distance).sum()) <= MIN_AREA


@torch.no_grad()
def detect_scenes(images: Sequence[Image.Image]) -> list[DetectedScene]:
    """Detect the things and the background in 64x64 images.

    Raises:
        ValueError: if an image has another size.
    """
    scenes: list[DetectedScene] = []
    for start in range(0, len(images), BATCH_SIZE):
        pixels = torch.from_numpy(np.stack([_pixels(image) for image in images[start : start + BATCH_SIZE]]))
        backgrounds = [_background(one) for one in pixels]
        single = _searches(pixels, backgrounds)
        _detect(single, SINGLE_SIDES, turns=1)
        named = [bool(one.things) and one.things[0].name is not None for one in single]
        _detect([one for one, is_named in zip(single, named, strict=True) if is_named], SEVERAL_SIDES, turns=3)
        several = _searches(pixels, backgrounds)
        unclear = [n for n, one in enumerate(single) if not named[n] or len(one.things) > 1]
        _detect([several[n] for n in unclear], SEVERAL_SIDES, turns=4)
        for one, other, background in zip(single, several, backgrounds, strict=True):
            best = other if other.things and other.gain > one.gain else one
            scenes.append(DetectedScene(tuple(sorted(best.things, key=lambda thing: thing.x)), background.names))
    return scenes


def _pixels(image: Image.Image) -> np.ndarray:
    """Pixels of an image, (3, 64, 64) in [0, 1]."""
    if image.size != (SIZE, SIZE):
        raise ValueError(
            f"image is {image.size[0]}x{image.size[1]}, but the judge of drawings only scores {SIZE}x{SIZE}"
        )
    return np.asarray(to_rgb(image), dtype=np.float32).transpose(2, 0, 1) / 255


def _border(pixels: Tensor, width: int) -> Tensor:
    """Pixels at the four edges, (..., c, n) from (..., c, h, w). Those in the corners come twice."""
    edges = (pixels[..., :width, :], pixels[..., -width:, :], pixels[..., :width], pixels[..., -width:])
    return torch.cat([edge.flatten(-2) for edge in edges], -1)


def _background(pixels: Tensor) -> Background:
    """Background that most border pixels are nearest to, with its RGB in this image."""
    border, palette = _border(pixels, 2), torch.tensor(list(BACKGROUNDS.values())) / 255
    distances = (border[:, None] - palette.T[:, :, None]).norm(dim=0)
    number = int(distances.argmin(0).bincount(minlength=len(palette)).argmax())
    near = distances[number] < BORDER_DISTANCE
    rgb = border[:, near].median(1).values if near.any() else palette[number]
    distance = (palette - rgb).norm(dim=1)
    names = [name for n, name in enumerate(BACKGROUNDS) if distance[n] <= max(AMBIGUOUS * distance[number], 1e-6)]
    return Background(tuple(names), rgb)


def _searches(pixels: Tensor, backgrounds: Sequence[Background]) -> list[Search]:
    """Start a search in each image."""
    searches = []
    for image, background in zip(pixels, backgrounds, strict=True):
        full = image - background.rgb[:, None, None]
        rest = F.avg_pool2d(full[None], 2)[0]
        distance = _border(rest.norm(dim=0)[None], 1)[0]
        distance = distance[distance <= 0.3]
        uneven = 1.7 * float(distance.quantile(0.9)) if len(distance) else 0.0
        square = _border((full**2).sum(0)[None], 2)[0]
        square = square[square <= 0.09]
        unevenness = float(square.mean()) if len(square) else 0.0
        searches.append(Search(full, rest, background.rgb, max(uneven, MIN_DISTANCE), unevenness))
    return searches


def _detect(searches: Sequence[Search], sides: Sequence[int], *, turns: int) -> None:
    """Detect one thing after another in each image, at most `turns`."""
    for _ in range(turns):
        active = [search for search in searches if not search.is_finished]
        if not active:
            return
        rest, rgb = (torch.stack([getattr(search, name) for search in active]) for name in ("rest", "rgb"))
        best = [_gains(rest, rgb, side).flatten(2).max(2) for side in sides]
        gains, places = (torch.stack([getattr(one, name) for one in best], 1) for name in ("values", "indices"))
        for search, gain, place in zip(active, gains, places, strict=True):
            _decide(search, gain, place, sides)


@functools.cache
def _templates(side: int) -> Tensor:
    """All kinds of drawings at half resolution, light and coverage, (kinds, 4, side, side) in [0, 1]."""
    return torch.stack([_template(kind, side) for kind in range(len(kinds()))])


@functools.lru_cache(maxsize=20_000)
def _template(kind: int, side: int) -> Tensor:
    """One kind of drawing, light and coverage, (4, side, side) in [0, 1]."""
    light, through = sprite(*kinds()[kind], side)
    both = np.concatenate([light / 255, 1 - through / 255], -1).astype(np.float32)
    return torch.from_numpy(both).permute(2, 0, 1).contiguous()


def _gains(rest: Tensor, rgb: Tensor, side: int) -> Tensor:
    """Drop in squared error for each kind at each place.

    With r the rest, b the background, l a drawing's light and c its coverage, the drawing changes the background by
    d = l - c b. The drop is |r|² - |r - d|² = 2 r·d - |d|².

    Args:
        rest: (n, 3, 32, 32).
        rgb: backgrounds, (n, 3).
        side: edge of the drawings.

    Returns:
        (n, kinds, places, places).
    """
    templates = _templates(side)
    light, coverage = templates[:, :3], templates[:, 3:]
    with_background = torch.cat([rest, -(rest * rgb[:, :, None, None]).sum(1, keepdim=True)], 1)
    product = F.conv2d(with_background, templates)
    energy = (
        (light**2).sum((1, 2, 3))[None]
        - 2 * rgb @ (light * coverage).sum((2, 3)).T
        + (rgb**2).sum(1, keepdim=True) * (coverage**2).sum((1, 2, 3))[None]
    )
    return 2 * product - energy[:, :, None, None]


class Placement(NamedTuple):
    """A drawing at a place: drop in squared error, number of the kind, edge, left and top in pixels."""

    gain: float
    kind: int
    side: int
    left: int
    top: int


def _decide(search: Search, gains: Tensor, places: Tensor, sides: Sequence[int]) -> None:
    """Add the best of the candidate kinds to the things of a search, and remove what it covers from the rest.

    Args:
        search: state of the search.
        gains: largest drop in squared error, (sides, kinds).
        places: its flat place at half resolution, (sides, kinds).
        sides: edges at half resolution.
    """
    placements = []
    for kind in gains.amax(0).topk(CANDIDATES).indices.tolist():
        number = int(gains[:, kind].argmax())
        side = sides[number]
        y, x = divmod(int(places[number, kind]), HALF - side + 1)
        placements += _placements_near(search, kind, 2 * x + side, 2 * y + side, 2 * side)
    best = max(placements)
    coverage = _coverage(best)
    near = F.max_pool2d(coverage, 5, 1, 2)
    unexplained, rival = _unexplained(search, best, near, pool=1), _rival(best.kind, gains.amax(0))
    is_clear = unexplained <= (UNCLEAR if rival <= CONTESTED else SURE)
    if rival <= DISTINCT and not is_clear:
        is_clear = _unexplained(search, best, near, pool=4) <= UNCLEAR
    name, colour = kinds()[best.kind] if is_clear else (None, None)
    centre_x, centre_y = (best.left + best.side / 2) / SIZE, (best.top + best.side / 2) / SIZE
    search.things.append(DetectedThing(name, colour, centre_x, centre_y, best.side / SIZE, unexplained))
    search.gain += best.gain
    search.rest = search.rest * (1 - F.max_pool2d(F.max_pool2d(coverage, 2), 3, 1, 1))


def _unexplained(search: Search, placement: Placement, near: Tensor, *, pool: int) -> float:
    """Fraction of a thing's squared difference from the background that its drawing leaves, less what is noise.

    Args:
        search: state of the search.
        placement: the drawing.
        near: 1 at the pixels that belong to the thing, (1, 64, 64).
        pool: edge of the squares of pixels that are averaged first, so that small displacements do not count.
    """
    before, after = search.full * near, (search.full - _change(search, placement)) * near
    energy, rest = (float((F.avg_pool2d(part[None], pool) ** 2).sum()) for part in (before, after))
    noise = search.unevenness * float(near.sum()) / pool**2
    return max(rest - noise, 0.0) / max(energy - noise, 1e-3)


@functools.cache
def _has_name(name: str) -> Tensor:
    """Tell which kinds have a name, (kinds,)."""
    return torch.tensor([other == name for other, _ in kinds()])


def _rival(kind: int, gains: Tensor) -> float:
    """Largest gain of a drawing with another name, as a fraction of this kind's. gains: of each kind, (kinds,)."""
    others = gains.masked_fill(_has_name(kinds()[kind][0]), 0.0)
    return float(others.max() / gains[kind].clamp(min=1e-6))


def _placements_near(search: Search, kind: int, x: int, y: int, side: int) -> list[Placement]:
    """Best placements of a kind at full resolution, one per edge, within two pixels of a centre."""
    placements = []
    for edge in (side - 1, side, side + 1):
        template = _template(kind, edge)
        change = template[:3] - template[3:] * search.rgb[:, None, None]
        left, top = max(round(x - edge / 2) - 2, -4), max(round(y - edge / 2) - 2, -4)
        padded = F.pad(search.full, (4, 4, 4, 4))
        room = padded[:, top + 4 : top + 8 + edge, left + 4 : left + 8 + edge]
        if min(room.shape[1:]) < edge:
            continue
        gains = (2 * F.conv2d(room[None], change[None]) - (change**2).sum())[0, 0]
        row, column = divmod(int(gains.argmax()), gains.shape[1])
        placements.append(Placement(float(gains.max()), kind, edge, left + column, top + row))
    return placements


def _placed(placement: Placement) -> Tensor:
    """Light and coverage of a drawing at its place, (4, 64, 64) in [0, 1]."""
    _, kind, side, left, top = placement
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + side, SIZE), min(top + side, SIZE)
    placed = torch.zeros(4, SIZE, SIZE)
    placed[:, y0:y1, x0:x1] = _template(kind, side)[:, y0 - top : y1 - top, x0 - left : x1 - left]
    return placed


def _coverage(placement: Placement) -> Tensor:
    """Fraction of each pixel that a placed drawing covers, (1, 64, 64)."""
    return _placed(placement)[3:]


def _change(search: Search, placement: Placement) -> Tensor:
    """Change of the background's RGB by a placed drawing, (3, 64, 64)."""
    placed = _placed(placement)
    return placed[:3] - placed[3:] * search.rgb[:, None, None]


def drawings_faithfulness(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    """Scores of the images: 1.0 if an image shows exactly what its prompt describes, else 0.0."""
    requests = [drawing_prompts.parse(prompt) for prompt in prompts]
    scenes = detect_scenes(images)
    return [float(drawings.satisfies(scene, request)) for scene, request in zip(scenes, requests, strict=True)]


def drawings_agreement(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    """Scores of the images: the fraction of what its prompt describes that an image shows, in [0, 1]."""
    requests = [drawing_prompts.parse(prompt) for prompt in prompts]
    return [agreement(scene, request) for scene, request in zip(detect_scenes(images), requests, strict=True)]


def agreement(scene: DetectedScene, request: drawings.SceneRequest) -> float:
    """Fraction of a request that a scene satisfies.

    The parts are each requested thing, each requested colour, position and background, and that nothing else is there.
    """
    requested, satisfied = 1, 0.0
    unmatched = list(scene.things)
    firsts: list[DetectedThing] = []
    for wanted in request.things:
        colour = wanted.colour or usual_colour(wanted.name)
        same_name = [thing for thing in unmatched if thing.name == wanted.name]
        fitting = sorted(same_name, key=lambda thing: thing.colour != colour)[: wanted.count]
        unmatched = [thing for thing in unmatched if not any(thing is match for match in fitting)]
        firsts += fitting[:1]
        requested += wanted.count
        satisfied += len(fitting)
        if wanted.colour:
            requested += 1
            satisfied += sum(thing.colour == colour for thing in fitting) / wanted.count
    satisfied += 1 / (1 + len(unmatched)) if scene.things else 0
    if request.relation:
        requested += 1
        satisfied += len(firsts) == 2 and drawings.holds(request.relation, *firsts)
    if request.background:
        requested += 1
        satisfied += request.background in scene.backgrounds
    return satisfied / requested
