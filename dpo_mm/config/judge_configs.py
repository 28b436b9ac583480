"""Settings of the commands that score rows with judges."""

from __future__ import annotations

from dataclasses import dataclass

from dpo_mm.config.setting_limits import Settings


@dataclass(frozen=True)
class JudgeConfig(Settings):
    """Settings for scoring images with one judge."""

    judge: str
    """Name of a judge, or module:function."""
    images: str
    """Folder of images, or a preference dataset."""
    output: str
    """Parquet file to write."""
    prompts: str | None = None
    """Text file with one prompt per line, in the order of the images' names. null: metadata.jsonl in the folder, or one
    text file per image."""
    shard_size: int = 256
    """Images per shard. An interrupted run resumes after the last complete shard."""
    overwrite: bool = False
    """Replace an earlier result. Only a file that dpo-mm wrote and that is unchanged is replaced."""


@dataclass(frozen=True)
class RelabelConfig(Settings):
    """Settings for relabelling image pairs with judges. The old labels stay in the rows."""

    pairs: str
    """Preference pairs, in any form that train takes."""
    judges: tuple[str, ...]
    """Names of judges, or module:function. They score single images or compare pairs."""
    output: str
    """Parquet file to write."""
    columns: dict[str, str] | None = None
    """New names of columns of pairs in another format: caption=prompt, or {caption: prompt} in a file. null: their names stay."""
    media_dir: str | None = None
    """Folder of the images that pairs in another format name. null: the folder of the dataset."""
    scale: str = "spread"
    """spread | labels. Score difference that counts as one unit of log-odds: the root mean square of the judge's
    differences on this dataset, or the value that makes the dataset's own labels most likely."""
    scales: tuple[float, ...] = ()
    """The same unit for each judge, in the judge's own scores. It replaces `scale`."""
    trust: float | None = None
    """Assumed probability that a label of the dataset is right, in [0.5, 1). The labels then count as one more judge with
    independent errors. null: they do not count."""
    agreement: float = 0.5
    """Least fraction of judges that prefer the same image, in [0.5, 1]. A tie counts half for each image. Other pairs are
    dropped. 1: all judges agree."""
    tie: float = 0.0
    """Pairs whose probability differs from 1/2 by at most this become ties, in [0, 0.5)."""
    undecodable_images: str = "raise"
    """raise | drop. What happens to pairs with an image that does not decode."""
    shard_size: int = 256
    """Pairs per shard. An interrupted run resumes after the last complete shard."""
    overwrite: bool = False
    """Replace an earlier result. Only a file that dpo-mm wrote and that is unchanged is replaced."""
