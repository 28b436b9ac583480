"""Public preference sets, and the forms that others have: a small converter each.

A converter is a function from raw rows to canonical ones (`dpo_mm.data.schema`), and yields `LeftOut` where a row has none.
To add a set: write its converter in the file of its kind and name it in SOURCES; docs/reference/datasets.md has the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from dpo_mm.sources import image_pair_sets as pairs
from dpo_mm.sources import rankings
from dpo_mm.sources import response_pair_sets as responses
from dpo_mm.sources import row_formats as forms
from dpo_mm.sources.parquet_writer import Item, Row

Converter = Callable[[Iterable[Row], str | None], Iterator[Item]]


class Source(NamedTuple):
    """A set, or a form. kind: images or responses (pairs of them). hub: where it is unless told. axes: the first is the
    default; files: annotation files by axis ("" for all), each the first of its names that is there; whole: on the hub
    it is a folder of files and no table. grouped: rows are paired among each other. uncertain: it has ties, votes,
    scores or margins that a copy should still have. keeps_ids: rows have ids that stay.
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


SOURCES: dict[str, Source] = {
    "pickapic": Source(
        pairs.pickapic,
        "images",
        "yuvalkirstain/pickapic_v1",
        notes="v1; the page of v2 is gone. Ties (about 12 %) stay ties; addresses in it are dead and not used. Its card "
        "names no licence.",
        uncertain=True,
    ),
    "open-image-preferences": Source(
        pairs.open_image_binarized,
        "images",
        "data-is-better-together/open-image-preferences-v1-binarized",
        "apache-2.0",
        notes="FLUX.1-dev against SD3.5-L in every pair: the model is a shortcut. Ties and votes are in the results.",
    ),
    "open-image-preferences-results": Source(
        pairs.open_image_results,
        "images",
        "",
        "apache-2.0",
        notes="Every vote. Give a folder with the results' Parquet and the pictures of open-image-preferences-v1 "
        "(image_quality_dev/ and so on): rows hold addresses, and none is fetched.",
        uncertain=True,
    ),
    "hpdv2": Source(
        rankings.hpdv2,
        "images",
        "ymhao/HPDv2",
        "apache-2.0",
        notes="A script repository: its files are read. train.json is pairs, test.json ranks of nine with raw votes.",
        files={"": ("{split}.json",)},
        whole=True,
    ),
    "hpdv3": Source(
        pairs.hpdv3,
        "images",
        "MizzenAI/HPDv3",
        "mit",
        notes="images.tar.gz.00 and so on are read as one. choice_dist becomes votes; confidence is not kept.",
        files={"": ("{split}.json",)},
        whole=True,
        uncertain=True,
    ),
    "hpdv3-plusplus": Source(
        pairs.hpdv3_plusplus,
        "images",
        "Junjun2333/HPDv3-PlusPlus",
        "apache-2.0",
        ("aesthetic", "faithfulness"),
        "The two axes stand in two files; without --axis both are read, each row with its axis.",
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
        "Grouped by prompt_id; the smaller rank wins, equal ranks are ties, numbers are skipped.",
        {"": ("metadata-{split}.parquet",)},
        whole=True,
        grouped=True,
        uncertain=True,
    ),
    "rapidata": Source(
        pairs.rapidata,
        "images",
        "Rapidata/700k_Human_Preference_Dataset_FLUX_SD3_MJ_DALLE3",
        axes=("overall", "coherence", "faithfulness"),
        notes="Any Rapidata set of votes on two images; say with --axis what it asked, and --license what its card says. "
        "Its split train is train_0001, train_0002 and so on.",
        uncertain=True,
    ),
    "vision-reward-db": Source(
        rankings.vision_reward_db,
        "images",
        "zai-org/VisionRewardDB-Image",
        "apache-2.0",
        ("overall", *rankings.ASPECTS),
        "One picture a row; pairs within a prompt.",
        grouped=True,
        uncertain=True,
    ),
    "rlhf-v": Source(
        responses.rlhf_v,
        "responses",
        "openbmb/RLHF-V-Dataset",
        "cc-by-nc-4.0",
        ("faithfulness",),
        "Non-commercial. text is a JSON string.",
    ),
    "rlaif-v": Source(
        responses.rlaif_v, "responses", "openbmb/RLAIF-V-Dataset", "cc-by-nc-4.0", ("faithfulness",), "Non-commercial."
    ),
    "vl-feedback": Source(
        responses.vl_feedback,
        "responses",
        "MMInstruction/VLFeedback",
        None,
        ("overall", *responses.ASPECTS),
        "Four answers a question; all pairs that are rated apart, the gap as margin. Its card names no licence.",
        uncertain=True,
    ),
    "mmpr": Source(
        responses.mmpr,
        "responses",
        "OpenGVLab/MMPR",
        "mit",
        notes="Rows with no image and with several. annotations.zip and images.zip are read where they lie.",
        files={"": ("annotations.zip", "annotations/*.jsonl", "*.jsonl")},
        whole=True,
    ),
    "povid": Source(
        responses.povid,
        "responses",
        "YiyangAiLab/POVID_preference_data_for_VLLMs",
        "cc-by-4.0",
        ("faithfulness",),
        "The pictures are COCO's train2014: give a folder with them beside the JSON.",
        whole=True,
    ),
    "llama-factory": Source(
        forms.llama_factory, "responses", notes="ShareGPT or OpenAI turns with ranking: true.", keeps_ids=True
    ),
    "trl": Source(forms.trl, "responses", notes="Preference rows, with or without an explicit prompt.", keeps_ids=True),
    "custom-images": Source(
        forms.custom_images, "images", notes="CSV, JSON lines, JSON or Parquet of your own pairs.", keeps_ids=True
    ),
    "custom-responses": Source(
        forms.custom_responses,
        "responses",
        notes="CSV, JSON lines, JSON or Parquet of your own responses.",
        keeps_ids=True,
    ),
}
