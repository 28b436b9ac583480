"""Sources of preference datasets: public datasets and general file formats, with one small converter each.

A converter is a function from raw rows to rows of `dpo_mm.data.schema`. It yields `LeftOut` if a row cannot be converted.
To add a dataset, write its converter in the file of its kind and add it to SOURCES. docs/reference/datasets.md has the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from dpo_mm.sources import (
    fine_tuning_sets,
    image_pair_sets,
    ms_swift,
    pair_folders,
    rankings,
    response_pair_sets,
    row_formats,
)
from dpo_mm.sources.parquet_writer import Item, Row
from dpo_mm.sources.raw_rows import Origin, find_captions

Converter = Callable[[Iterable[Row], str | None], Iterator[Item]]
"""Function from raw rows and the axis (None: the default) to rows or reasons to leave them out."""


class Source(NamedTuple):
    """A public dataset or a file format, and how to import it.

    Args:
        convert: its converter.
        kind: images or responses. Its rows are pairs of them.
        hub: id of the dataset on the hub, "" if there is none.
        license: licence of the dataset, if it has one.
        axes: preference axes. The first is the default.
        notes: remarks for the table in the docs.
        files: annotation files by axis, "" for all. Each has alternative names, of which the first that exists is used.
        whole: True if the dataset on the hub is a folder of files and not a table.
        grouped: True if rows are single images, which are paired with each other.
        uncertain: True if the dataset has ties, votes or scores. The doctor warns about copies without them.
        keeps_ids: True if the rows' ids are used unchanged.
        one_sided: True if a row has one image or response.
        find_images: finds the rows in a folder of images and a split. None: rows are in tables.
    """

    convert: Converter
    kind: str
    hub: str = ""
    license: str | None = None
    axes: tuple[str, ...] = ("overall",)
    notes: str = ""
    files: dict[str, tuple[str, ...]] = {}  # noqa: RUF012 (never changed)
    whole: bool = False
    grouped: bool = False
    uncertain: bool = False
    keeps_ids: bool = False
    one_sided: bool = False
    find_images: Callable[[Path, str], Origin] | None = None


SOURCES: dict[str, Source] = {
    "pickapic": Source(
        image_pair_sets.pickapic,
        "images",
        "yuvalkirstain/pickapic_v1",
        notes="Version 1. The page of v2 is gone. Ties (about 12 %) stay ties. Its URLs are dead and not used. Its card "
        "names no licence.",
        uncertain=True,
    ),
    "open-image-preferences": Source(
        image_pair_sets.open_image_binarized,
        "images",
        "data-is-better-together/open-image-preferences-v1-binarized",
        "apache-2.0",
        notes="FLUX.1-dev against SD3.5-L in every pair, so the model is a shortcut. Ties and votes are in "
        "open-image-preferences-results.",
    ),
    "open-image-preferences-results": Source(
        image_pair_sets.open_image_results,
        "images",
        "",
        "apache-2.0",
        notes="Every vote. Give a folder with the results' Parquet and the images of open-image-preferences-v1 "
        "(image_quality_dev/ and so on). Rows contain URLs, and none is fetched.",
        uncertain=True,
    ),
    "hpdv2": Source(
        rankings.hpdv2,
        "images",
        "ymhao/HPDv2",
        "apache-2.0",
        notes="A script repository, of which the files are read. train.json has pairs, test.json ranks of nine with raw votes.",
        files={"": ("{split}.json",)},
        whole=True,
    ),
    "hpdv3": Source(
        image_pair_sets.hpdv3,
        "images",
        "MizzenAI/HPDv3",
        "mit",
        notes="images.tar.gz.00 and so on are read as one file. choice_dist becomes votes. confidence is not imported.",
        files={"": ("{split}.json",)},
        whole=True,
        uncertain=True,
    ),
    "hpdv3-plusplus": Source(
        image_pair_sets.hpdv3_plusplus,
        "images",
        "Junjun2333/HPDv3-PlusPlus",
        "apache-2.0",
        ("aesthetic", "faithfulness"),
        "The two axes are in two files. Without --axis both are read, each row with its axis.",
        {
            "aesthetic": ("{split}_aes.json",),
            "faithfulness": ("{split}_tf.json",),
        },
        whole=True,
    ),
    "image-reward-db": Source(
        rankings.image_reward_db,
        "images",
        "zai-org/ImageRewardDB",
        "apache-2.0",
        tuple(rankings.RATINGS),
        "Grouped by prompt_id. The smaller rank wins, equal ranks are ties, and ranks may be skipped.",
        {"": ("metadata-{split}.parquet",)},
        whole=True,
        grouped=True,
        uncertain=True,
    ),
    "rapidata": Source(
        image_pair_sets.rapidata,
        "images",
        "Rapidata/700k_Human_Preference_Dataset_FLUX_SD3_MJ_DALLE3",
        axes=("overall", "coherence", "faithfulness"),
        notes="Any Rapidata dataset of votes on two images. Give its question with --axis and its licence with --license. "
        "Its split train is train_0001, train_0002 and so on.",
        uncertain=True,
    ),
    "vision-reward-db": Source(
        rankings.vision_reward_db,
        "images",
        "zai-org/VisionRewardDB-Image",
        "apache-2.0",
        ("overall", *rankings.ASPECTS),
        "One image per row, paired within a prompt.",
        grouped=True,
        uncertain=True,
    ),
    "rlhf-v": Source(
        response_pair_sets.rlhf_v,
        "responses",
        "openbmb/RLHF-V-Dataset",
        "cc-by-nc-4.0",
        ("faithfulness",),
        "Non-commercial. text is a JSON string.",
    ),
    "rlaif-v": Source(
        response_pair_sets.rlaif_v,
        "responses",
        "openbmb/RLAIF-V-Dataset",
        "cc-by-nc-4.0",
        ("faithfulness",),
        "Non-commercial.",
    ),
    "vl-feedback": Source(
        response_pair_sets.vl_feedback,
        "responses",
        "MMInstruction/VLFeedback",
        None,
        ("overall", *response_pair_sets.ASPECTS),
        "Four responses per question. All pairs with different ratings, and the difference as score_gap. Its card names no licence.",
        uncertain=True,
    ),
    "mmpr": Source(
        response_pair_sets.mmpr,
        "responses",
        "OpenGVLab/MMPR",
        "mit",
        notes="Rows with no image and with several. annotations.zip and images.zip are read without unpacking.",
        files={"": ("annotations.zip", "annotations/*.jsonl", "*.jsonl")},
        whole=True,
    ),
    "povid": Source(
        response_pair_sets.povid,
        "responses",
        "YiyangAiLab/POVID_preference_data_for_VLLMs",
        "cc-by-4.0",
        ("faithfulness",),
        "The images are COCO's train2014. Give a folder with them and the JSON.",
        whole=True,
    ),
    "llama-factory": Source(
        row_formats.llama_factory,
        "responses",
        notes="ranking: true. ShareGPT or OpenAI turns, or Alpaca's instruction and input, with chosen and rejected.",
        keeps_ids=True,
    ),
    "ms-swift": Source(
        ms_swift.ms_swift,
        "responses",
        notes="messages with rejected_response or rejected_messages, and images.",
        keeps_ids=True,
    ),
    "trl": Source(
        row_formats.trl,
        "responses",
        notes="Preference rows, with or without an explicit prompt. Rows of prompt and completion, with label (KTO) or "
        "without (SFT).",
        keeps_ids=True,
    ),
    "custom-images": Source(
        row_formats.custom_images,
        "images",
        notes="CSV, JSON lines, JSON or Parquet of your own pairs, or of one image per row (image), liked or not (liked).",
        keeps_ids=True,
    ),
    "custom-responses": Source(
        row_formats.custom_responses,
        "responses",
        notes="CSV, JSON lines, JSON or Parquet of your own responses, or of one per row (completion), liked or not (liked).",
        keeps_ids=True,
    ),
    "two-folders": Source(
        pair_folders.image_pairs,
        "images",
        notes="better/ and worse/ (or chosen/ and rejected/) with the same file names. Prompts are in name.txt next to the images, "
        "or in metadata.jsonl, .csv or .parquet (file_name, text).",
        keeps_ids=True,
        find_images=pair_folders.find_two_folders,
    ),
    "kohya-folders": Source(
        pair_folders.image_pairs,
        "images",
        notes="The layout of kohya's sd-scripts for preferences: w/ and l/, or 10_name/w/ and 10_name/l/, with the same file names and "
        "captions in name.caption or name.txt. Repeats (10) are not used.",
        keeps_ids=True,
        find_images=pair_folders.find_kohya_folders,
    ),
    "captioned-images": Source(
        fine_tuning_sets.captioned_images,
        "images",
        notes="A folder of images with captions: name.png and name.txt, or metadata.jsonl, .csv or .parquet (file_name, text) as "
        "in Hugging Face's imagefolder.",
        keeps_ids=True,
        one_sided=True,
        find_images=find_captions,
    ),
    "chat": Source(
        row_formats.chat,
        "responses",
        notes="messages (or ShareGPT's conversations) with images. The last turn of the assistant is the chosen response.",
        keeps_ids=True,
        one_sided=True,
    ),
}
