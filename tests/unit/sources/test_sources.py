"""Every source is tested on rows of its public schema with real images, and on its special cases."""

from __future__ import annotations

import base64
import csv
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dpo_mm.data.image_files import decode_image
from dpo_mm.data.lazy_images import source_cells
from dpo_mm.data.schema import load_pairs, load_responses
from dpo_mm.sources import SOURCES
from dpo_mm.sources.importing import ImportResult, import_set

CELL = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def file_of(seed: int, kind: str = "JPEG") -> bytes:
    """Bytes of a real image file. The seed is its grey value."""
    import io

    buffer = io.BytesIO()
    Image.fromarray(np.full((16, 16, 3), seed, np.uint8)).save(
        buffer, kind, **({"quality": 95} if kind == "JPEG" else {})
    )
    return buffer.getvalue()


def grey(cell: dict[str, Any]) -> int:
    data = cell["bytes"]
    return int(np.asarray(decode_image(data))[0, 0, 0])


def cell(seed: int, kind: str = "JPEG") -> dict[str, Any]:
    return {"bytes": file_of(seed, kind), "path": f"{seed}.jpg"}


def parquet(path: Path, rows: list[dict[str, Any]], **types: pa.DataType) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {name: pa.array([row.get(name) for row in rows], types.get(name)) for name in rows[0]}
    pq.write_table(pa.table(columns), path)
    return path


def write_images(folder: Path, *names: str) -> None:
    """Write images whose grey value is the number in their name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(file_of(int("".join(filter(str.isdigit, Path(name).stem)))))


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., tuple[ImportResult, list[dict[str, Any]]]]:
    """Import tmp_path/set, or a subfolder of it, and return the result and the rows that were written."""

    def run(source: str, part: str = "", **options: Any) -> tuple[ImportResult, list[dict[str, Any]]]:
        result = import_set(source, str(tmp_path / "set" / part), str(tmp_path / "out"), **options)
        rows = [row for file in sorted(result.folder.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]
        assert len(rows) == result.rows
        load = load_pairs if SOURCES[source].kind == "images" else load_responses
        assert len(load(str(result.folder))) == result.rows
        return result, rows

    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "set").mkdir()
    return tmp_path / "set"


def pick(number: int, label_0: float, **more: Any) -> dict[str, Any]:
    """A row of Pick-a-Pic v1 with every column of its card."""
    row = {
        "are_different": True,
        "best_image_uid": "x",
        "caption": f"prompt {number // 2}",
        "created_at": None,
        "has_label": True,
        "image_0_uid": f"{number}-0",
        "image_0_url": "https://text-to-image-public.s3.amazonaws.com/images/0.png",
        "image_1_uid": f"{number}-1",
        "image_1_url": "https://text-to-image-public.s3.amazonaws.com/images/1.png",
        "jpg_0": file_of(10 + number),
        "jpg_1": file_of(110 + number),
        "label_0": label_0,
        "label_1": 1 - label_0,
        "model_0": "stabilityai/stable-diffusion-xl",
        "model_1": "dreamlike-art/dreamlike-photoreal-2.0",
        "ranking_id": number,
        "user_id": 7,
        "num_example_per_prompt": 2,
    }
    return {**row, **more}


def test_pickapic_ties_stay_ties_and_unlabelled_rows_are_left_out(folder: Path, run: Any) -> None:
    rows = [pick(0, 1.0), pick(1, 0.0), pick(2, 0.5), pick(3, 1.0, has_label=False), pick(4, 0.5, are_different=False)]
    parquet(folder / "data" / "train-00000-of-00645-b66ac786bf6fb553.parquet", rows)
    parquet(folder / "data" / "validation-00000-of-00001.parquet", [pick(9, 1.0)])
    parquet(folder / "data" / "validation_unique-00000-of-00001.parquet", [pick(9, 1.0)])
    result, got = run("pickapic")
    assert [row["preference"] for row in got] == ["a", "b", "tie"]
    assert [(grey(row["image_a"]), grey(row["image_b"])) for row in got] == [(10, 110), (11, 111), (12, 112)]
    assert [(row["votes_a"], row["votes_b"]) for row in got] == [(1, 0), (0, 1), (None, None)]
    assert got[0]["model_a"] == "stabilityai/stable-diffusion-xl" and got[0]["group_id"] == got[1]["group_id"]
    assert got[0]["group_id"] != got[2]["group_id"] and len({row["id"] for row in got}) == 3
    assert got[0]["source"] == "pickapic" and got[0]["license"] is None
    assert result.left_out == {"it has no label": 1, "its two images are the same": 1}
    assert result.preferences == {"a": 1, "b": 1, "tie": 1}


def test_open_image_preferences_binarized(folder: Path, run: Any) -> None:
    row = {"id": "1", "prompt": "a knight", "chosen": cell(20), "rejected": cell(120), "chosen_model": "dev"}
    row |= {"rejected_model": "sd", "evolution": "quality", "category": "Anime", "sub_category": "x"}
    parquet(folder / "train-00000-of-00001.parquet", [row], chosen=CELL, rejected=CELL)
    _, (got,) = run("open-image-preferences")
    assert (grey(got["image_a"]), grey(got["image_b"]), got["preference"]) == (20, 120, "a")
    assert (got["model_a"], got["model_b"], got["license"]) == ("dev", "sd", "apache-2.0")


def test_open_image_preferences_results_count_votes_and_fetch_no_url(folder: Path, run: Any) -> None:
    base = "https://huggingface.co/datasets/data-is-better-together/open-image-preferences-v1/resolve/main"

    def row(n: int, *votes: str, discarded: int = 0) -> dict[str, Any]:
        states = ["submitted"] * (len(votes) - discarded) + ["discarded"] * discarded
        images = {"image_1": f"{base}/image_quality_dev/{n}.jpg", "image_2": f"{base}/image_quality_sd/{n + 100}.jpg"}
        return {
            "id": str(n),
            "status": "completed",
            "images": images,
            "prompt": "p",
            "model_1": "dev",
            "model_2": "sd",
            "preference.responses": list(votes),
            "preference.responses.status": states,
        }

    rows = [
        row(1, "image_1", "image_1", "image_2"),
        row(2, "image_2", "image_1", discarded=1),
        row(3, "both_good", "both_good", "image_1"),
        row(4, "both_bad", "both_bad", "image_2"),
        row(5, "image_1", "image_2"),
        row(6),
        row(7, "image_1"),
    ]
    parquet(folder / "data" / "train-00000-of-00001.parquet", rows)
    for n in range(1, 7):
        write_images(folder, f"image_quality_dev/{n}.jpg", f"image_quality_sd/{n + 100}.jpg")
    result, got = run("open-image-preferences-results")
    assert [row["preference"] for row in got] == ["a", "b", "tie", "both_bad", "tie"]
    assert [round(row["p_a"], 3) for row in got] == [0.667, 0.0, 0.667, 0.333, 0.5]
    assert (got[0]["votes_a"], got[0]["votes_b"]) == (2, 1) and (got[1]["votes_a"], got[1]["votes_b"]) == (0, 1)
    assert grey(got[0]["image_a"]) == 1 and grey(got[0]["image_b"]) == 101
    assert result.left_out == {"it has no votes": 1, "an image is missing": 1}


def test_rapidata_numbered_splits_and_soft_labels(folder: Path, run: Any) -> None:
    def row(n: int, a: int, b: int) -> dict[str, Any]:
        votes = {"votes_image1": a, "votes_image2": b, "detailed_results": "[]"}
        return {"prompt": "p", "image1": cell(n), "image2": cell(n + 100), "model1": "flux", "model2": "mj", **votes}

    types = {"image1": CELL, "image2": CELL}
    parquet(folder / "data" / "train_0001-00000-of-00001.parquet", [row(1, 20, 6), row(2, 13, 13)], **types)
    parquet(folder / "data" / "train_0002-00000-of-00001.parquet", [row(3, 2, 24), row(4, 0, 0)], **types)
    result, got = run("rapidata", axis="faithfulness", license="cdla-permissive-2.0")
    assert [row["preference"] for row in got] == ["a", "tie", "b"]
    assert [row["p_a"] for row in got] == [20 / 26, 0.5, 2 / 26]
    assert got[0]["axis"] == "faithfulness" and got[0]["license"] == "cdla-permissive-2.0"
    assert result.left_out == {"it has no votes": 1}


def test_hpdv2_pairs_and_ranks(folder: Path, run: Any, tmp_path: Path) -> None:
    train = [{"prompt": "p", "file_path": ["1.jpg", "2.jpg"], "human_preference": [0, 1]}]
    raw = [
        {"rank": [1, 0, 2], "user_hash": "u"},
        {"rank": [0, 1, 2], "user_hash": "v"},
        {"rank": [2, 0, 1], "user_hash": "w"},
    ]
    test = [{"prompt": "q", "image_path": ["3.jpg", "4.jpg", "5.jpg"], "rank": [3, 0, 3], "raw_annotations": raw}]
    (folder / "train.json").write_text(json.dumps(train))
    (folder / "test.json").write_text(json.dumps(test))
    write_images(folder, "train/1.jpg", "train/2.jpg", "test/3.jpg", "test/4.jpg", "test/5.jpg")
    _, (got,) = run("hpdv2")
    assert (got["preference"], grey(got["image_a"]), grey(got["image_b"])) == ("b", 1, 2) and got["votes_a"] is None
    result = import_set("hpdv2", str(folder), str(tmp_path / "test"), split="test")
    rows = pq.read_table(result.folder / "part-00000.parquet").to_pylist()
    assert [(grey(r["image_a"]), grey(r["image_b"]), r["preference"]) for r in rows] == [
        (3, 4, "b"),
        (3, 5, "tie"),
        (4, 5, "a"),
    ]
    assert [(r["votes_a"], r["votes_b"]) for r in rows] == [(1, 2), (2, 1), (3, 0)]
    assert len({r["group_id"] for r in rows}) == 1 and len({r["id"] for r in rows}) == 3


def test_hpdv3_archive_in_parts_is_read_as_one(folder: Path, run: Any) -> None:
    import io
    import tarfile

    rows = [
        {
            "prompt": "p",
            "path1": "images/a/1.jpg",
            "path2": "images/b/2.jpg",
            "confidence": 0.97,
            "choice_dist": [9, 1],
        },
        {"prompt": "p", "path1": "images/b/1.jpg", "path2": "images/a/1.jpg", "confidence": None, "choice_dist": None},
        {"prompt": "q", "path1": "images/a/1.jpg", "path2": "images/gone.jpg", "choice_dist": [0.75, 0.25]},
        {"prompt": "q", "path1": "images/a/1.jpg", "path2": "images/b/2.jpg", "choice_dist": [0.75, 0.25]},
    ]
    rows = [{**row, "model1": "flux", "model2": "kolors"} for row in rows]
    (folder / "train.json").write_text(json.dumps(rows))
    (folder / "all.json").write_text(json.dumps(rows))
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, seed in (("images/a/1.jpg", 1), ("images/b/2.jpg", 2), ("images/b/1.jpg", 3)):
            info = tarfile.TarInfo(name)
            info.size = len(file_of(seed))
            archive.addfile(info, io.BytesIO(file_of(seed)))
    data = buffer.getvalue()
    for n, start in enumerate(range(0, len(data), 100)):
        (folder / f"images.tar.gz.{n:02}").write_bytes(data[start : start + 100])
    assert n > 1
    result, got = run("hpdv3")
    assert [(grey(r["image_a"]), grey(r["image_b"]), r["preference"]) for r in got] == [
        (1, 2, "a"),
        (3, 1, "a"),
        (1, 2, "a"),
    ]
    assert [(r["votes_a"], r["votes_b"], r["p_a"]) for r in got] == [
        (9, 1, 0.9),
        (None, None, None),
        (None, None, 0.75),
    ]
    assert result.left_out == {"an image is missing": 1} and got[0]["license"] == "mit"
    assert sorted(p.name for p in result.folder.iterdir()) == ["import.json", "part-00000.parquet"]


def test_hpdv3_plusplus_rows_have_the_axis_of_their_file(folder: Path, run: Any, tmp_path: Path) -> None:
    for name, better, worse in (("train_aes", 1, 2), ("train_tf", 2, 1), ("test_aes", 3, 3), ("test_tf", 3, 3)):
        paths = {"path1": f"images/qwen_image/prompt_000000/{better}.jpg"}
        paths |= {"path2": f"images/qwen_image/prompt_000000/{worse}.jpg"}
        (folder / f"{name}.json").write_text(json.dumps([{"prompt": "p", **paths}]))
    write_images(folder, *(f"images/qwen_image/prompt_000000/{n}.jpg" for n in (1, 2, 3)))
    _, both = run("hpdv3-plusplus")
    assert [(r["axis"], grey(r["image_a"])) for r in both] == [("aesthetic", 1), ("faithfulness", 2)]
    result = import_set("hpdv3-plusplus", str(folder), str(tmp_path / "one"), axis="faithfulness")
    (one,) = pq.read_table(result.folder / "part-00000.parquet").to_pylist()
    assert one["axis"] == "faithfulness" and grey(one["image_a"]) == 2
    with pytest.raises(ValueError, match=r"hpdv3-plusplus' has no axis 'beauty'\. It has aesthetic, faithfulness"):
        import_set("hpdv3-plusplus", str(folder), str(tmp_path / "two"), axis="beauty")


def reward(n: int, prompt: str, rank: int, overall: int, alignment: int) -> dict[str, Any]:
    return {
        "image_path": f"images/train/train_1/{n}.webp",
        "prompt_id": f"id-{prompt}",
        "prompt": prompt,
        "classification": "People",
        "image_amount_in_total": 3,
        "rank": rank,
        "overall_rating": overall,
        "image_text_alignment_rating": alignment,
        "fidelity_rating": 4,
    }


def test_image_reward_db_pairs_by_rank_within_a_prompt(folder: Path, run: Any, tmp_path: Path) -> None:
    rows = [reward(1, "p", 1, 6, 3), reward(5, "q", 4, 5, 5), reward(2, "p", 3, 4, 5), reward(3, "p", 3, 4, 5)]
    parquet(folder / "metadata-train.parquet", rows)
    parquet(folder / "metadata-test.parquet", rows)
    (folder / "images" / "train").mkdir(parents=True)
    with zipfile.ZipFile(folder / "images" / "train" / "train_1.zip", "w") as archive:
        for n in (1, 2, 3, 5):
            archive.writestr(f"{n}.webp", file_of(n, "WEBP"))
    _, got = run("image-reward-db")
    assert [(r["preference"], r["score_a"], r["score_b"]) for r in got] == [("a", 6, 4), ("a", 6, 4), ("tie", 4, 4)]
    assert {r["group_id"] for r in got} == {"id-p"} and got[0]["image_a"]["bytes"] == file_of(1, "WEBP")
    result = import_set("image-reward-db", str(folder), str(tmp_path / "faith"), axis="faithfulness", min_score_gap=1)
    rows = pq.read_table(result.folder / "part-00000.parquet").to_pylist()
    assert [(r["preference"], r["axis"]) for r in rows] == [("b", "faithfulness"), ("b", "faithfulness")]
    assert result.left_out == {"its score gap is below 1": 1}


def vision(n: int, prompt: str, clarity: int, answers: list[int], mask: list[int]) -> dict[str, Any]:
    from dpo_mm.sources.rankings import ASPECTS

    notes = {name: 0 for name in ASPECTS} | {"unsafe type": 3, "clarity": clarity}
    assert len(notes) == 18
    return {
        "image": cell(n),
        "internal_id": str(n),
        "prompt": prompt,
        "url": "https://example.invalid/x.png",
        "annotation": notes,
        "meta_result": answers,
        "meta_mask": mask,
    }


def test_vision_reward_db_pairs_within_a_prompt(folder: Path, run: Any, tmp_path: Path) -> None:
    rows = [
        vision(1, "p", 2, [1, 0, 0, 1], [1, 1, 1, 0]),
        vision(9, "other", 0, [1, 1, 1, 1], [1, 1, 1, 1]),
        vision(2, "p", -2, [1, 1, 0, 0], [1, 1, 1, 0]),
    ]
    parquet(folder / "data" / "train-00000-of-00001.parquet", rows, image=CELL)
    _, (got,) = run("vision-reward-db")
    assert (grey(got["image_a"]), grey(got["image_b"]), got["preference"]) == (1, 2, "b")
    assert (got["score_a"], got["score_b"]) == (1 / 3, 2 / 3)
    result = import_set("vision-reward-db", str(folder), str(tmp_path / "clear"), axis="clarity")
    (clear,) = pq.read_table(result.folder / "part-00000.parquet").to_pylist()
    assert (clear["preference"], clear["score_a"], clear["score_b"], clear["axis"]) == ("a", 1.0, 0.0, "clarity")


def texts(row: dict[str, Any]) -> tuple[list[tuple[str, str | None]], str, str]:
    prompt = [(part["type"], part["text"]) for message in row["prompt"] for part in message["content"]]
    return prompt, row["chosen"][0]["content"][0]["text"], row["rejected"][0]["content"][0]["text"]


def test_rlhf_v_text_is_parsed_as_json(folder: Path, run: Any) -> None:
    text = json.dumps({"question": "What is it?", "chosen": "A cat.", "rejected": "A dog."})
    rows = [{"ds_name": "d", "image": cell(7), "text": t, "origin_dataset": "o", "idx": 1} for t in (text, "not JSON")]
    parquet(folder / "RLHF-V-Dataset.parquet", rows, image=CELL)
    result, (got,) = run("rlhf-v")
    assert texts(got) == ([("image", None), ("text", "What is it?")], "A cat.", "A dog.")
    assert grey(got["images"][0]) == 7 and got["license"] == "cc-by-nc-4.0"
    assert result.left_out == {"its text is not JSON of question, chosen and rejected": 1}


def test_rlaif_v(folder: Path, run: Any) -> None:
    row = {
        "ds_name": "d",
        "image": cell(8),
        "question": "Q?",
        "chosen": "Yes.",
        "rejected": "No.",
        "origin_dataset": "o",
    }
    row |= {"origin_split": "{}", "idx": "1", "image_path": "/data/somewhere/8.jpg"}
    parquet(folder / "RLAIF-V-Dataset_000.parquet", [row], image=CELL)
    _, (got,) = run("rlaif-v")
    assert texts(got) == ([("image", None), ("text", "Q?")], "Yes.", "No.") and grey(got["images"][0]) == 8


def feedback(name: str, helpful: str, faithful: str, ethical: str) -> dict[str, Any]:
    ratings = {"Helpfulness": helpful, "Visual Faithfulness": faithful, "Ethical Considerations": ethical}
    notes = {aspect: {"Rating": rating, "Rationale": "because"} for aspect, rating in ratings.items()}
    return {"annotations": notes, "model": name, "response": f"says {name}"}


@pytest.mark.parametrize("form", ["structs", "struct of lists"])
def test_vl_feedback_pairs_responses_with_different_ratings(folder: Path, run: Any, tmp_path: Path, form: str) -> None:
    four = [feedback("w", "5", "4", "5"), feedback("x", "2", "N/A", "5"), feedback("y", "N/A", "N/A", "N/A")]
    four.append(feedback("z", "1", "5", "5"))
    completions: Any = four
    if form == "struct of lists":
        completions = {name: [one[name] for one in four] for name in ("annotations", "model", "response")}
    row = {"id": "svit-1", "prompt": "What?", "models": list("wxyz"), "completions": completions, "img_path": "5.jpg"}
    (folder / "vlfeedback_80k.jsonl").write_text(json.dumps(row) + "\n")
    with zipfile.ZipFile(folder / "merged_images.zip", "w") as archive:
        archive.writestr("merged_images/5.jpg", file_of(5))
    result, got = run("vl-feedback")
    assert [(r["chosen_model"], r["rejected_model"], round(r["score_gap"], 3)) for r in got] == [
        ("w", "x", 1.167),
        ("w", "z", 1.0),
        ("z", "x", 0.167),
    ]
    assert result.left_out == {"a response has no rating": 3} and {r["group_id"] for r in got} == {"svit-1"}
    assert texts(got[2])[1:] == ("says z", "says x") and grey(got[0]["images"][0]) == 5
    faithful = import_set("vl-feedback", str(folder), str(tmp_path / "f"), axis="faithfulness")
    (one,) = pq.read_table(faithful.folder / "part-00000.parquet").to_pylist()
    assert (one["chosen_model"], one["score_gap"]) == ("z", 1.0) and faithful.left_out == {
        "a response has no rating": 5
    }


def test_mmpr_rows_with_no_and_several_images(folder: Path, run: Any) -> None:
    rows: list[dict[str, Any]] = [
        {"image": "images/a/1.jpg", "question": "<image>\nOne?"},
        {"image": ["images/a/1.jpg", "images/b/2.jpg"], "question": "Is <image> like\n<image>\n?"},
        {"question": "None?"},
        {"image": ["images/a/1.jpg"], "question": "<image> and <image>?"},
    ]
    lines = "\n".join(json.dumps({**row, "chosen": "yes", "rejected": "no"}) for row in rows)
    with zipfile.ZipFile(folder / "annotations.zip", "w") as archive:
        archive.writestr("annotations/some.jsonl", lines)
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        archive.writestr("images/a/1.jpg", file_of(1))
        archive.writestr("images/b/2.jpg", file_of(2))
    result, got = run("mmpr")
    assert [texts(row)[0] for row in got] == [
        [("image", None), ("text", "One?")],
        [("text", "Is "), ("image", None), ("text", " like"), ("image", None), ("text", "?")],
        [("text", "None?")],
    ]
    assert [[grey(image) for image in row["images"]] for row in got] == [[1], [1, 2], []]
    assert result.left_out == {"its images do not match the image placeholders in the question": 1}


def sharegpt(*turns: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(turns)]


def test_povid_image_placeholder_becomes_a_part_and_prompts_must_agree(folder: Path, run: Any) -> None:
    row = {"id": "COCO_1", "image": "./data/coco/COCO_train2014_000000000004.jpg"}
    same = {"conversations": sharegpt("<image>\nDescribe.", "A horse.")}
    rows = [
        {**row, **same, "rejected_conversations": sharegpt("<image>\nDescribe.", "A cow.")},
        {**row, **same, "rejected_conversations": sharegpt("<image>\nDescribe it.", "A cow.")},
    ]
    (folder / "POVID_preference_data_for_VLLMs.json").write_text(json.dumps(rows))
    write_images(folder, "train2014/COCO_train_4.jpg")
    (folder / "train2014" / "COCO_train_4.jpg").rename(folder / "train2014" / "COCO_train2014_000000000004.jpg")
    result, (got,) = run("povid")
    assert texts(got) == ([("image", None), ("text", "Describe.")], "A horse.", "A cow.")
    assert grey(got["images"][0]) == 4 and result.left_out == {"its two prompts differ": 1}


def test_llama_factory_turns_and_system_message_are_unchanged(folder: Path, run: Any) -> None:
    row = {
        "conversations": sharegpt("<image>What?", "A bird.", "Sure?"),
        "chosen": {"from": "gpt", "value": "Yes."},
        "rejected": {"from": "gpt", "value": "No."},
        "system": "Be kind.",
        "images": ["pics/3.png"],
    }
    (folder / "dpo.json").write_text(json.dumps([row]))
    write_images(folder, "pics/3.png")
    _, (got,) = run("llama-factory")
    assert [m["role"] for m in got["prompt"]] == ["system", "user", "assistant", "user"]
    assert texts(got) == (
        [("text", "Be kind."), ("image", None), ("text", "What?"), ("text", "A bird."), ("text", "Sure?")],
        "Yes.",
        "No.",
    )


def test_trl_with_and_without_a_prompt(folder: Path, run: Any) -> None:
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
    say = lambda text: {"role": "assistant", "content": [{"type": "text", "text": text}]}
    rows = [
        {"prompt": [user], "chosen": [say("A")], "rejected": [say("B")], "images": ["1.png"]},
        {"chosen": [user, say("A")], "rejected": [user, say("B")], "images": ["1.png"]},
        {"prompt": "Text?", "chosen": "A", "rejected": "B"},
        {
            "chosen": [user, say("A")],
            "rejected": [{"role": "user", "content": "Other?"}, say("B")],
            "images": ["1.png"],
        },
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    write_images(folder, "1.png")
    result, got = run("trl")
    asked = [("image", None), ("text", "What?")]
    assert [texts(row) for row in got] == [(asked, "A", "B"), (asked, "A", "B"), ([("text", "Text?")], "A", "B")]
    assert result.left_out == {"its chosen and rejected conversations have no prompt in common": 1}


def test_trl_rows_that_would_lose_content_are_left_out(folder: Path, run: Any) -> None:
    """Mutations that it catches: parts of an unknown type become empty texts, an image at an address is dropped."""
    text = {"type": "text", "text": "What?"}
    user = lambda *parts: [{"role": "user", "content": list(parts)}]
    say = lambda answer, **more: [{"role": "assistant", "content": answer, **more}]
    pair = {"chosen": say("A"), "rejected": say("B")}
    uri = "data:image/png;base64," + base64.b64encode(file_of(9, "PNG")).decode()
    rows = [
        {"prompt": user({"type": "image_url", "image_url": {"url": uri}}, text), **pair},
        {"prompt": user({"type": "image", "image": "1.png"}, text), **pair, "tools": [{"name": "zoom"}]},
        {"prompt": "What?", "chosen": user(text) + say("A"), "rejected": user(text) + say("B")},
        {"prompt": user({"type": "image_url", "image_url": {"url": "data:image/png;base64,%"}}, text), **pair},
        {"prompt": user({"type": "image_url", "image_url": {"url": "https://x.invalid/1.png"}}, text), **pair},
        {"prompt": user({"type": "video", "video": "1.mp4"}, text), **pair},
        {"prompt": user({"type": "input_audio", "input_audio": {}}, text), **pair},
        {"prompt": user(text), "chosen": say(None), "rejected": say("B")},
        {"prompt": user(text), "chosen": say("A", tool_calls=[{"id": "1"}]), "rejected": say("B")},
        {"prompt": user(text), "chosen": say("A") + user(text) + say("C"), "rejected": say("B")},
        {"prompt": user(text), "chosen": say([{"type": "image", "image": "1.png"}]), "rejected": say("B")},
        {"prompt": user(text), **pair, "videos": ["1.mp4"]},
        {"prompt": user({"type": "text", "text": "<image>What?"}), **pair},
        {"prompt": user(text), "chosen": say("A", reasoning_content="so"), "rejected": say("B")},
        {"prompt": user(text), **pair, "system": "Be kind."},
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    write_images(folder, "1.png")
    result, got = run("trl")
    asked = [("image", None), ("text", "What?")]
    assert [texts(row) for row in got] == [
        (asked, "A", "B"),
        (asked, "A", "B"),
        ([("text", "What?")], "A", "B"),
        ([("text", "Be kind."), ("text", "What?")], "A", "B"),
    ]
    assert grey(got[0]["images"][0]) == 9 and grey(got[1]["images"][0]) == 1 and not got[2]["images"]
    assert json.loads(got[1]["tools"]) == [{"name": "zoom"}] and got[0]["tools"] is None
    assert result.left_out == {
        "the data URI of an image does not decode": 1,
        "an image is a URL, and URLs are not fetched": 1,
        "a part of a message has the type 'video'. Only text and image are supported": 1,
        "a part of a message has the type 'input_audio'. Only text and image are supported": 1,
        "a message has no content": 1,
        "a message calls tools": 1,
        "the response has messages of assistant, user, assistant. Expected one of the assistant": 1,
        "the response contains an image. Expected text": 1,
        "it has a video or audio. Only text and image are supported": 1,
        "its images do not match the image placeholders in the question": 1,
        "a message has reasoning_content. Only its content is supported": 1,
    }


def test_custom_images_table(folder: Path, run: Any, tmp_path: Path) -> None:
    names = ("id", "prompt", "image_a", "image_b", "preference", "p_a", "votes_a", "model_a", "license")
    with (folder / "labels.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(names)
        table.writerow(("one", "a cat, asleep", "x/1.png", "x/2.png", "b", "0.25", "1", "mine", "cc0-1.0"))
        table.writerow(("two", "a dog", "x/1.png", "../2.png", "tie", "", "", "", ""))
    write_images(folder, "x/1.png", "x/2.png")
    result, (got,) = run("custom-images")
    assert (got["id"], got["prompt"], got["preference"], got["p_a"], got["votes_a"]) == (
        "one",
        "a cat, asleep",
        "b",
        0.25,
        1,
    )
    assert got["license"] == "cc0-1.0" and got["source"] == "custom-images" and got["score_a"] is None
    assert result.left_out == {"the path of an image leads out of its folder": 1}
    (folder / "labels.csv").write_text("prompt,image_a,image_b,preference\np,x/1.png,x/2.png,left\n")
    with pytest.raises(
        ValueError, match=r"labels\.csv, row 0: preference is 'left'\. Expected one of a, b, tie, both_bad"
    ):
        import_set("custom-images", str(folder), str(tmp_path / "again"))


@pytest.mark.parametrize("several", [False, True])
def test_images_to_edit_are_imported_from_their_paths(several: bool, folder: Path, run: Any) -> None:
    """One path in a CSV file, or a list of paths in JSON lines. A row without an image to edit stays."""
    write_images(folder, "1.png", "2.png", "10.png", "20.png")
    pair = {"prompt": "red", "image_a": "1.png", "image_b": "2.png", "preference": "a"}
    if several:
        rows = [{**pair, "image_source": ["10.png", "20.png"]}, {**pair, "image_source": "20.png"}, pair]
        (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    else:
        lines = ["prompt,image_a,image_b,preference,image_source", "red,1.png,2.png,a,10.png", "red,1.png,2.png,a,"]
        (folder / "pairs.csv").write_text("\n".join(lines) + "\n")
    _, got = run("custom-images")
    assert [[grey(cell) for cell in source_cells(row)] for row in got] == (
        [[10, 20], [20], []] if several else [[10], []]
    )


def test_custom_responses_table(folder: Path, run: Any, tmp_path: Path) -> None:
    row = {"prompt": "What?", "chosen": "A", "rejected": "B", "image": "1.png", "score_gap": 0.5}
    (folder / "mine.jsonl").write_text(
        json.dumps(row) + "\n\n" + json.dumps({**row, "image": "https://x.invalid/1.png"})
    )
    write_images(folder, "1.png")
    result, (got,) = run("custom-responses")
    assert texts(got) == ([("image", None), ("text", "What?")], "A", "B") and got["score_gap"] == 0.5
    assert result.left_out == {"an image is a URL, and URLs are not fetched": 1}
    (folder / "mine.jsonl").write_text(json.dumps({**row, "score_gap": "much"}))
    with pytest.raises(ValueError, match=r"mine\.jsonl, row 0: score_gap is 'much'\. Expected a number"):
        import_set("custom-responses", str(folder), str(tmp_path / "again"))


def test_columns_are_built_once_per_import_and_not_per_row(folder: Path, run: Any, monkeypatch: Any) -> None:
    import datasets

    from dpo_mm.sources import row_formats

    built: list[int] = []
    original = datasets.Features.__init__
    monkeypatch.setattr(
        datasets.Features, "__init__", lambda self, *args, **kwargs: built.append(1) or original(self, *args, **kwargs)
    )
    row_formats._other_columns.cache_clear()
    rows = [{"prompt": f"q{n}", "chosen": f"good {n}", "rejected": f"bad {n}", "score_gap": n} for n in range(600)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    import_set("custom-responses", str(folder), str(folder.parent / "built"))
    assert 0 < len(built) < 50
    _, written = run("custom-responses")
    assert [row["score_gap"] for row in written] == list(range(600))
    assert [row["chosen"][0]["content"][0]["text"] for row in written] == [f"good {n}" for n in range(600)]
    assert pq.ParquetFile(folder.parent / "out/part-00000.parquet").num_row_groups == 1


def test_every_source_has_a_test() -> None:
    text = Path(__file__).read_text() + Path(__file__).with_name("test_one_sided_sources.py").read_text()
    layouts = Path(__file__).with_name("test_local_pairs.py").read_text()
    assert len(SOURCES) == 23
    assert not [name for name in SOURCES if f'run("{name}"' not in text and f'"{name}",' not in layouts]
