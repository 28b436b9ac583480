"""Make data/drawings/drawings.npz: drawings of things that people recognise, from the 3D set of Fluent emoji (MIT).

    npm pack @lobehub/fluent-emoji-3d@1.1.0 @iconify-json/fluent-emoji-flat@1.2.6
    python data/make_drawings.py --drawings lobehub-fluent-emoji-3d-1.1.0.tgz --names iconify-json-fluent-emoji-flat-1.2.6.tgz

The second package has the names and code points of the set, the first one the images. Each drawing is cropped to its outline,
centred on a square and reduced to 96 pixels with its transparency.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from PIL import Image

SIDE = 96


class Drawing(NamedTuple):
    """A drawing of the set.

    Attributes:
        file: its name in the set.
        colour: its one plain colour, or "".
        paintable: whether it can be painted in other colours.
    """

    file: str
    colour: str = ""
    paintable: bool = False


DRAWINGS: dict[str, dict[str, Drawing]] = {
    "animal": {
        "cat": Drawing("cat-face", "orange", True), "dog": Drawing("dog-face"), "bear": Drawing("bear"),
        "rabbit": Drawing("rabbit"), "pig": Drawing("pig-face", "pink", False), "cow": Drawing("cow-face"),
        "horse": Drawing("horse"), "elephant": Drawing("elephant"), "giraffe": Drawing("giraffe"),
        "zebra": Drawing("zebra"), "lion": Drawing("lion"), "tiger": Drawing("tiger-face"),
        "monkey": Drawing("monkey"), "panda": Drawing("panda"), "fox": Drawing("fox"), "penguin": Drawing("penguin"),
        "duck": Drawing("duck"), "owl": Drawing("owl"), "parrot": Drawing("parrot"), "flamingo": Drawing("flamingo"),
        "peacock": Drawing("peacock"), "frog": Drawing("frog", "green"), "crocodile": Drawing("crocodile"),
        "turtle": Drawing("turtle"), "snake": Drawing("snake"), "fish": Drawing("fish", "blue", True),
        "shark": Drawing("shark"), "whale": Drawing("spouting-whale", "blue", False),
        "octopus": Drawing("octopus", "orange", True), "crab": Drawing("crab", "red", True),
        "snail": Drawing("snail"), "butterfly": Drawing("butterfly", "orange", True), "bee": Drawing("honeybee"),
        "ladybug": Drawing("lady-beetle"), "camel": Drawing("camel"), "unicorn": Drawing("unicorn"),
        "dinosaur": Drawing("t-rex", "green", True), "chick": Drawing("baby-chick"),
    },
    "plant": {
        "cactus": Drawing("cactus"), "sunflower": Drawing("sunflower"), "tulip": Drawing("tulip", "pink", True),
        "rose": Drawing("rose", "red", True), "mushroom": Drawing("mushroom", "red", True),
        "tree": Drawing("deciduous-tree"), "pine tree": Drawing("evergreen-tree"), "palm tree": Drawing("palm-tree"),
    },
    "food": {
        "apple": Drawing("red-apple", "red", True), "pear": Drawing("pear", "green", True),
        "banana": Drawing("banana"), "watermelon": Drawing("watermelon"), "strawberry": Drawing("strawberry"),
        "pineapple": Drawing("pineapple"), "lemon": Drawing("lemon", "yellow", False), "avocado": Drawing("avocado"),
        "tomato": Drawing("tomato", "red", False), "carrot": Drawing("carrot"), "eggplant": Drawing("eggplant"),
        "croissant": Drawing("croissant"), "pretzel": Drawing("pretzel"), "burger": Drawing("hamburger"),
        "hot dog": Drawing("hot-dog"), "pizza": Drawing("pizza"), "donut": Drawing("doughnut"),
        "cookie": Drawing("cookie"), "cake": Drawing("birthday-cake"), "cupcake": Drawing("cupcake"),
        "lollipop": Drawing("lollipop"), "teapot": Drawing("teapot", "red", True),
    },
    "vehicle": {
        "car": Drawing("automobile", "red", True), "bus": Drawing("bus"), "fire truck": Drawing("fire-engine"),
        "truck": Drawing("delivery-truck"), "tractor": Drawing("tractor", "green", True),
        "bicycle": Drawing("bicycle"), "train": Drawing("locomotive"), "plane": Drawing("airplane"),
        "helicopter": Drawing("helicopter"), "rocket": Drawing("rocket"), "boat": Drawing("sailboat"),
    },
    "place": {
        "house": Drawing("house"), "castle": Drawing("castle"), "tent": Drawing("tent", "green", True),
        "volcano": Drawing("volcano"), "sun": Drawing("sun"), "moon": Drawing("crescent-moon"),
        "star": Drawing("star", "yellow", True), "rainbow": Drawing("rainbow"), "snowman": Drawing("snowman"),
    },
    "thing": {
        "umbrella": Drawing("umbrella", "purple", True), "balloon": Drawing("balloon", "red", True),
        "kite": Drawing("kite"), "football": Drawing("soccer-ball"), "basketball": Drawing("basketball"),
        "guitar": Drawing("guitar"), "drum": Drawing("drum"), "book": Drawing("closed-book", "red", True),
        "key": Drawing("key"), "bell": Drawing("bell"), "clock": Drawing("alarm-clock"),
        "light bulb": Drawing("light-bulb"), "camera": Drawing("camera"), "television": Drawing("television"),
        "telephone": Drawing("telephone", "red", True), "pencil": Drawing("pencil"),
        "backpack": Drawing("backpack", "red", True), "crown": Drawing("crown"), "hat": Drawing("top-hat"),
        "shirt": Drawing("t-shirt", "green", True), "dress": Drawing("dress", "blue", True),
        "diamond": Drawing("gem-stone", "blue", True), "trophy": Drawing("trophy"), "gift": Drawing("wrapped-gift"),
        "teddy bear": Drawing("teddy-bear"), "pumpkin": Drawing("jack-o-lantern"), "anchor": Drawing("anchor"),
        "bucket": Drawing("bucket", "blue", True), "robot": Drawing("robot"), "ghost": Drawing("ghost"),
        "chair": Drawing("chair"),
    },
}  # fmt: skip
"""Drawings by category and by their word in prompts."""
PLURALS = {
    "fish": "fish", "octopus": "octopuses", "butterfly": "butterflies", "cactus": "cacti",
    "strawberry": "strawberries", "tomato": "tomatoes", "bus": "buses", "volcano": "volcanoes", "trophy": "trophies",
    "dress": "dresses", "fox": "foxes",
}  # fmt: skip
"""Plurals that do not end in s alone."""


def crop(image: Image.Image) -> np.ndarray:
    """Crop a drawing to its outline and centre it on a transparent square, (SIDE, SIDE, 4) uint8."""
    image = image.convert("RGBA")
    image = image.crop(image.getchannel("A").point(lambda alpha: 255 * (alpha > 12)).getbbox())
    side = max(image.size)
    square = Image.new("RGBA", (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    pixels = np.array(square.convert("RGBa").resize((SIDE, SIDE), Image.Resampling.LANCZOS).convert("RGBA"))
    pixels[pixels[..., 3] < 6] = 0
    return pixels


def open_member(archive: tarfile.TarFile, name: str) -> IO[bytes]:
    file = archive.extractfile(name)
    assert file is not None
    return file


def code_points(names: Path) -> dict[str, list[str]]:
    """Code points of each name of the set."""
    with tarfile.open(names) as archive:
        name_by_code = json.load(open_member(archive, "package/chars.json"))
    codes: dict[str, list[str]] = {}
    for code, name in name_by_code.items():
        codes.setdefault(name, []).append(code)
    return codes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drawings", type=Path, required=True)
    parser.add_argument("--names", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "drawings" / "drawings.npz")
    options = parser.parse_args()
    codes = code_points(options.names)
    sprites, rows = [], []
    with tarfile.open(options.drawings) as archive:
        members = set(archive.getnames())
        for category, drawings in DRAWINGS.items():
            for word, drawing in drawings.items():
                files = [f"package/assets/{code}{end}.webp" for code in codes[drawing.file] for end in ("", "-fe0f")]
                file = next((name for name in files if name in members), None)
                if file is None:
                    raise SystemExit(f"{options.drawings} has no drawing of {drawing.file}, only other files")
                sprites.append(crop(Image.open(io.BytesIO(open_member(archive, file).read()))))
                rows.append((word, PLURALS.get(word, f"{word}s"), category, drawing.colour, drawing.paintable))
    names, plurals, categories, colours, paintable = (np.array(column) for column in zip(*rows, strict=True))
    np.savez_compressed(
        options.out,
        sprites=np.stack(sprites),
        names=names,
        plurals=plurals,
        categories=categories,
        colours=colours,
        paintable=paintable,
    )


if __name__ == "__main__":
    main()
