"""Steps that all imports share: streaming, resuming, archives, the hub, and a result that trains."""

from __future__ import annotations

import io
import json
import re
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from dpo_mm.config import TrainConfig
from dpo_mm.doctor.loading import load_dataset
from dpo_mm.sources import input_files, parquet_writer
from dpo_mm.sources import raw_rows as raw_rows_module
from dpo_mm.sources.archives import ImageFiles, JoinedParts
from dpo_mm.sources.importing import import_set
from dpo_mm.sources.local_pairs import load_image_pairs, local_pairs
from dpo_mm.sources.raw_rows import Origin, raw_rows
from tests.unit.sources.test_sources import CELL, cell, file_of, parquet, pick, write_images


def tar(path: Path, *members: tuple[tarfile.TarInfo, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for info, data in members:
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


UNSAFE = {
    "out of it": member("../evil.jpg"),
    "deep out of it": member("a/../../evil.jpg"),
    "absolute": member("/evil.jpg"),
    "symbolic link": member("evil.jpg", tarfile.SYMTYPE, "/etc/passwd"),
    "hard link": member("evil.jpg", tarfile.LNKTYPE, "../../etc/passwd"),
    "device": member("evil.jpg", tarfile.CHRTYPE),
    "pipe": member("evil.jpg", tarfile.FIFOTYPE),
}


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("name", UNSAFE)
def test_image_files_unsafe_tar_is_refused(name: str, mode: str, tmp_path: Path) -> None:
    inside = tmp_path / "set"
    inside.mkdir()
    good = (member("good.jpg"), file_of(1))
    tar(inside / ("a.tar" if mode == "w" else "a.tar.gz"), good, (UNSAFE[name], b""), mode=mode)
    with pytest.raises(ValueError, match=r"a\.tar.*: member '.*evil\.jpg' is .*\. Such an archive is refused"):
        ImageFiles(inside, tmp_path / "scratch").read("good.jpg")
    assert not [path for path in tmp_path.rglob("*") if path.name in ("evil.jpg", "good.jpg")]


def test_image_files_unsafe_zip_is_refused(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("link.jpg")
    link.external_attr = 0o120777 << 16
    for n, info in enumerate((zipfile.ZipInfo("../evil.jpg"), zipfile.ZipInfo("C:/evil.jpg"), link)):
        inside = tmp_path / str(n)
        inside.mkdir()
        with zipfile.ZipFile(inside / "a.zip", "w") as archive:
            archive.writestr(info, "/etc/passwd")
        with pytest.raises(ValueError, match=r"a\.zip: member .* Such an archive is refused"):
            ImageFiles(inside, tmp_path / "scratch").read("good.jpg")


def test_image_files_too_large_member_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpo_mm.sources.archives.MAX_BYTES", 1000)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("big.jpg", b"0" * 1001)
    with pytest.raises(ValueError, match=r"'big\.jpg' is of 1,001 bytes, more than 1,000"):
        ImageFiles(tmp_path, tmp_path / "scratch").read("big.jpg")


def test_image_files_damaged_archive_is_named_in_the_error(tmp_path: Path) -> None:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as archive:
        for n in range(5):
            info = member(f"{n}.jpg")
            info.size = len(file_of(n))
            archive.addfile(info, io.BytesIO(file_of(n)))
    (tmp_path / "a.tar.gz.00").write_bytes(data.getvalue()[:200])
    with pytest.raises(ValueError, match=r"a\.tar\.gz: not readable as an archive .* Is a part missing\?"):
        ImageFiles(tmp_path, tmp_path / "scratch").read("1.jpg")
    assert not (tmp_path / "scratch").exists() or not list((tmp_path / "scratch").iterdir())


def test_image_files_plain_tar_in_parts_is_read_without_unpacking(tmp_path: Path) -> None:
    inside = tmp_path / "set"
    inside.mkdir()
    whole = tar(tmp_path / "w.tar", *((member(f"images/{n}/same.jpg"), file_of(n)) for n in range(6))).read_bytes()
    for n, start in enumerate(range(0, len(whole), 700)):
        (inside / f"images.tar.part{n:03}").write_bytes(whole[start : start + 700])
    files = ImageFiles(inside, tmp_path / "scratch")
    assert [files.read(f"images/{n}/same.jpg") for n in (5, 0, 3)] == [file_of(5), file_of(0), file_of(3)]
    assert not (tmp_path / "scratch").exists()
    with pytest.raises(FileNotFoundError, match="an image is missing"):
        files.read("other/same.jpg")  # six candidates match equally well


def test_joined_parts_read_like_the_whole_file(tmp_path: Path) -> None:
    data = bytes(range(200))
    parts = [tmp_path / str(n) for n in range(4)]
    for n, part in enumerate(parts):
        part.write_bytes(data[n * 50 : n * 50 + 50])
    file = io.BufferedReader(JoinedParts(parts))
    assert file.read() == data and file.seek(-3, io.SEEK_END) == 197 and file.read() == data[-3:]
    assert file.seek(48) == 48 and file.read(5) == data[48:53]


def test_image_files_path_outside_the_folder_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    files = ImageFiles(tmp_path / "set", tmp_path / "scratch")
    for path in ("../secret.jpg", str(tmp_path / "secret.jpg"), "a/../../secret.jpg", "file:///etc/passwd"):
        with pytest.raises(FileNotFoundError):
            files.read(path)


@pytest.mark.parametrize("format", ["list", "lines"])
def test_raw_rows_json_is_read_one_row_at_a_time(format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raw_rows_module, "CHUNK", 7)
    rows: list[dict[str, Any]] = [{"n": n, "text": 'a ] , "[{ \\ ü\n' * n, "none": None} for n in range(20)]
    text = json.dumps(rows, indent=1) if format == "list" else "\n".join(json.dumps(row) for row in rows) + "\n\n"
    file = tmp_path / "rows.json"
    file.write_text("﻿ " + text, encoding="utf-8")
    rows_read = list(raw_rows(Origin(tmp_path, (file,)), start=3))
    assert [{k: v for k, v in row.items() if k[0] != "_"} for row in rows_read] == rows[3:]
    assert [row["_number"] for row in rows_read] == list(range(3, 20))
    file.write_text(text.rstrip()[: -len(text) // 2])
    with pytest.raises(ValueError, match=r"rows\.json, row \d+: not JSON"):
        list(raw_rows(Origin(tmp_path, (file,))))


def test_raw_rows_parquet_resumes_without_reading_earlier_row_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow as pa

    files = []
    for f in range(3):
        files.append(tmp_path / f"{f}.parquet")
        pq.write_table(pa.table({"n": list(range(f * 50, f * 50 + 50))}), files[-1], row_group_size=8)
    read: list[Any] = []
    batches = pq.ParquetFile.iter_batches
    monkeypatch.setattr(
        pq.ParquetFile, "iter_batches", lambda *a, **k: read.extend(k["row_groups"]) or batches(*a, **k)
    )
    rows_read = [(row["n"], row["_number"], row["_file"]) for row in raw_rows(Origin(tmp_path, tuple(files)), start=67)]
    assert [row[0] for row in rows_read] == list(range(67, 150)) == [row[1] for row in rows_read] and rows_read[0][
        2
    ] == "1.parquet"
    assert read == [2, 3, 4, 5, 6, 0, 1, 2, 3, 4, 5, 6]


class Interruption(Exception):
    """It replaces a kill."""


@pytest.mark.parametrize("source", ["pickapic", "vision-reward-db"])
def test_import_set_interrupted_import_resumes_with_equal_files(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.unit.sources.test_sources import vision

    monkeypatch.setattr(parquet_writer, "SHARD_ROWS", 4)
    if source == "pickapic":
        rows = [pick(n, (1.0, 0.0, 0.5)[n % 3], has_label=n % 5 != 4) for n in range(20)]
        parquet(tmp_path / "set" / "train.parquet", rows)
    else:
        rows = [vision(n, f"p{n % 4}", n % 3 - 1, [n % 2], [1]) for n in range(16)]
        parquet(tmp_path / "set" / "train.parquet", rows, image=CELL)
    whole = import_set(source, str(tmp_path / "set"), str(tmp_path / "whole"))
    calls = 0
    end = parquet_writer._Shard.end_unit

    def interrupt(shard: Any) -> None:
        nonlocal calls
        calls += 1
        if calls in (7, 12):
            raise Interruption
        end(shard)

    monkeypatch.setattr(parquet_writer._Shard, "end_unit", interrupt)
    for _ in range(2):
        with pytest.raises(Interruption):
            import_set(source, str(tmp_path / "set"), str(tmp_path / "interrupted"))
        assert not [path for path in (tmp_path / "interrupted").iterdir() if path.name.startswith(".")]
    again = import_set(source, str(tmp_path / "set"), str(tmp_path / "interrupted"))
    assert (again.rows, again.left_out, again.preferences) == (whole.rows, whole.left_out, whole.preferences)
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert len(names) > 3 and names == sorted(path.name for path in (tmp_path / "interrupted").iterdir())
    for name in names[1:]:
        assert pq.read_table(tmp_path / "whole" / name).equals(pq.read_table(tmp_path / "interrupted" / name))
    before = calls
    import_set(source, str(tmp_path / "set"), str(tmp_path / "interrupted"))
    assert calls == before  # it was complete


def test_import_set_other_import_in_the_folder_is_refused(tmp_path: Path) -> None:
    parquet(tmp_path / "set" / "train.parquet", [pick(0, 1.0), pick(1, 1.0)])
    import_set("pickapic", str(tmp_path / "set"), str(tmp_path / "out"), limit=1)
    with pytest.raises(ValueError, match=r"contains an import with limit 1, not None\. Choose another folder"):
        import_set("pickapic", str(tmp_path / "set"), str(tmp_path / "out"))
    with pytest.raises(ValueError, match="exists and is not an import folder"):
        import_set("pickapic", str(tmp_path / "set"), str(tmp_path / "set"))


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("what", ["", "labels.csv"])
def test_import_set_changed_input_is_refused_by_name(
    what: str, finished: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a folder or a single table, finished or interrupted. Another file next to a single table does not matter."""
    write_images(tmp_path / "set", "1.png", "2.png", "3.png")
    table = tmp_path / "set" / "labels.csv"
    table.write_text("prompt,image_a,image_b,preference\np,1.png,2.png,a\np,2.png,3.png,a\n")
    do = lambda: import_set("custom-images", str(tmp_path / "set" / what), str(tmp_path / "out"))
    if finished:
        assert do() == do()
    else:
        with monkeypatch.context() as killed:
            killed.setattr(parquet_writer, "SHARD_ROWS", 1)
            killed.setattr("dpo_mm.sources.importing.score_gap_of", lambda row: 1 / (row["id"] == "0"))
            with pytest.raises(ValueError, match="row 1: division by zero"):
                do()
    if what:
        (tmp_path / "set" / "other.txt").write_text("new")
        assert do().rows == 2
    (tmp_path / "set" / "3.png").write_bytes(file_of(4, "PNG"))
    changed = re.escape(f"contains an import of {tmp_path / 'set' / what} before its files changed. Choose another")
    with pytest.raises(ValueError, match=changed):
        do()


def test_import_set_images_that_are_missing_or_empty_are_named(tmp_path: Path) -> None:
    """The number of a row counts within its file. The first path that was looked for is in the error."""
    write_images(tmp_path / "set", "1.png", "2.png")
    (tmp_path / "set" / "3.png").touch()
    header = "prompt,image_a,image_b,preference\n"
    (tmp_path / "set" / "one.csv").write_text(header + "p,1.png,2.png,a\n" * 10)
    (tmp_path / "set" / "two.csv").write_text(header + "p,1.png,2.png,a\np,1.png,3.png,a\np,x/9.png,2.png,b\n")
    result = import_set("custom-images", str(tmp_path / "set"), str(tmp_path / "out"))
    assert result.rows == 11 and result.left_out == {"an image is empty": 1, "an image is missing": 1}
    assert result.examples == {
        "an image is empty": f"two.csv, row 1: {tmp_path}/set/3.png",
        "an image is missing": f"two.csv, row 2: {tmp_path}/set/x/9.png",
    }
    (tmp_path / "set" / "one.csv").unlink()
    (tmp_path / "set" / "two.csv").write_text(header + "p,8.png,2.png,a\n")
    with pytest.raises(ValueError, match=r"The first is two\.csv, row 0: .*set/8\.png\. Give .* --media-dir$"):
        import_set("custom-images", str(tmp_path / "set"), str(tmp_path / "none"))


def test_import_set_image_of_a_folder_that_is_left_out_is_named(tmp_path: Path) -> None:
    write_images(tmp_path / "set", "a/1.png", "a/2.png")
    (tmp_path / "set" / "a" / "1.txt").write_text("a dot")
    result = import_set("captioned-images", str(tmp_path / "set"), str(tmp_path / "out"))
    assert result.examples == {"it has no caption": "a/2.png"}


def test_input_hash_does_not_read_a_large_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.jsonl").write_text("not JSON")
    origin = Origin(tmp_path, (tmp_path / "rows.jsonl",))
    with pytest.raises(ValueError, match="row 0: not JSON"):
        input_files.input_hash(origin, tmp_path, [])
    monkeypatch.setattr(input_files, "LARGEST_TABLE", 7)
    before = input_files.input_hash(origin, tmp_path, [])
    (tmp_path / "rows.jsonl").write_text("not JSON either")
    assert input_files.input_hash(origin, tmp_path, []) != before


@pytest.mark.parametrize("shards", [0, 1])
def test_import_set_unfinished_import_is_no_dataset(
    shards: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no shard its record is no table, and with some its rows are not all."""
    monkeypatch.setattr(parquet_writer, "SHARD_ROWS", 1)
    parquet(
        tmp_path / "set" / "train.parquet", [pick(0, 1.0) for _ in range(shards)] + [{**pick(1, 1.0), "caption": None}]
    )
    with pytest.raises(ValueError, match=r"train\.parquet"):
        import_set("pickapic", str(tmp_path / "set"), str(tmp_path / "out"))
    assert len(list((tmp_path / "out").glob("*.parquet"))) == shards
    for load in (load_image_pairs, lambda path: load_dataset(path, path=local_pairs(path).path)):
        with pytest.raises(
            ValueError, match=r"out: the import into this folder is not finished\. Run its command again"
        ):
            load(str(tmp_path / "out"))


def test_import_set_failed_before_the_first_shard_can_be_repeated(tmp_path: Path) -> None:
    parquet(tmp_path / "set" / "train.parquet", [{"caption": "p"}])
    with pytest.raises(ValueError, match="column 'label_0' is missing"):
        import_set("pickapic", str(tmp_path / "set"), str(tmp_path / "out"))
    (tmp_path / "out" / ".unpacked").mkdir()
    (tmp_path / "out" / ".part-00000.parquet.1").write_bytes(b"of a run that was killed")
    parquet(tmp_path / "set" / "train.parquet", [pick(0, 1.0)])
    assert import_set("pickapic", str(tmp_path / "set"), str(tmp_path / "out"), limit=1).rows == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["import.json", "part-00000.parquet"]


def test_import_set_full_disk_leaves_no_row_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.json").write_text(json.dumps([{"prompt": "p", "path1": "1.jpg", "path2": "2.jpg"}]))
    tar(tmp_path / "set" / "images.tar.gz", (member("1.jpg"), file_of(1)), (member("2.jpg"), file_of(2)), mode="w:gz")

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr("shutil.copyfileobj", full)
        with pytest.raises(OSError, match="No space left"):
            import_set("hpdv3", str(tmp_path / "set"), str(tmp_path / "out"))
    assert import_set("hpdv3", str(tmp_path / "set"), str(tmp_path / "out")).rows == 1


def test_import_set_limit_and_min_score_gap(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "image1": cell(1), "image2": cell(2), "votes_image1": n, "votes_image2": 10 - n}
        for n in range(11)
    ]
    parquet(tmp_path / "set" / "train.parquet", rows, image1=CELL, image2=CELL)
    result = import_set("rapidata", str(tmp_path / "set"), str(tmp_path / "a"), min_score_gap=0.6)
    assert result.rows == 6 and result.left_out == {"its score gap is below 0.6": 5}
    assert import_set("rapidata", str(tmp_path / "set"), str(tmp_path / "b"), limit=4).rows == 4
    with pytest.raises(ValueError, match=r"no row was imported \(11 x its score gap is below 2\)"):
        import_set("rapidata", str(tmp_path / "set"), str(tmp_path / "c"), min_score_gap=2)


def test_import_set_missing_source_file_or_column_is_named_in_the_error(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    with pytest.raises(ValueError, match=r"source 'pikapic' is unknown; .*pickapic"):
        import_set("pikapic", str(tmp_path / "set"), str(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"set: no train\.json in this folder \(it contains nothing\)"):
        import_set("hpdv2", str(tmp_path / "set"), str(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"no such file or folder\. Give one, or a hub id"):
        import_set("pickapic", str(tmp_path / "other"), str(tmp_path / "out"))
    with pytest.raises(ValueError, match="has no dataset on the hub"):
        import_set("trl", "hub", str(tmp_path / "out"))
    parquet(tmp_path / "set" / "train.parquet", [{"caption": "p", "label_0": 1.0}])
    with pytest.raises(
        ValueError, match=r"train\.parquet, row 0: column 'label_1' is missing \(has caption, label_0\)"
    ):
        import_set("pickapic", str(tmp_path / "set"), str(tmp_path / "out"))
    (tmp_path / "set" / "train.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(ValueError, match="not readable as Parquet"):
        import_set("pickapic", str(tmp_path / "set" / "train.parquet"), str(tmp_path / "out"))


def test_import_set_table_on_the_hub_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    files = {}
    for part in range(2):
        rows = [
            {"prompt": "p", "image1": cell(n), "image2": cell(n + 50), "votes_image1": 3, "votes_image2": n}
            for n in range(part * 4, part * 4 + 4)
        ]
        features = datasets.Features(
            {"prompt": datasets.Value("string"), "image1": datasets.Image(), "image2": datasets.Image()}
            | {name: datasets.Value("int64") for name in ("votes_image1", "votes_image2")}
        )
        files[f"train_{part:04}"] = str(tmp_path / f"{part}.parquet")
        datasets.Dataset.from_list(rows, features=features).to_parquet(files[f"train_{part:04}"])
    requests = []
    load = datasets.load_dataset

    def hub(name: str, streaming: bool) -> Any:
        requests.append((name, streaming))
        return load("parquet", data_files={**files, "test": files["train_0000"]}, streaming=streaming)

    monkeypatch.setattr(datasets, "load_dataset", hub)
    monkeypatch.setattr(parquet_writer, "SHARD_ROWS", 3)
    result = import_set("rapidata", "Rapidata/some", str(tmp_path / "out"))
    assert result.rows == 8 and requests == [("Rapidata/some", True)]
    rows = [row for n in range(3) for row in pq.read_table(result.folder / f"part-{n:05}.parquet").to_pylist()]
    assert [row["image_a"]["bytes"] for row in rows] == [file_of(n) for n in range(8)]
    assert [row["_number"] for row in raw_rows(Origin(tmp_path, (), "Rapidata/some"), start=5)] == [5, 6, 7]
    with pytest.raises(ValueError, match=r"no split 'validation'\. It has train_0000, train_0001, test"):
        import_set("rapidata", "Rapidata/some", str(tmp_path / "no"), split="validation")


def test_import_set_folder_on_the_hub_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    (tmp_path / "snapshot").mkdir()
    rows = [{"prompt": "p", "file_path": ["1.jpg", "2.jpg"], "human_preference": [1, 0]}]
    (tmp_path / "snapshot" / "train.json").write_text(json.dumps(rows))
    write_images(tmp_path / "snapshot", "1.jpg", "2.jpg")
    requests = []
    download = lambda name, repo_type: requests.append((name, repo_type)) or str(tmp_path / "snapshot")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert import_set("hpdv2", "hub", str(tmp_path / "out")).rows == 1 and requests == [("ymhao/HPDv2", "dataset")]


def test_import_set_image_pairs_train(tiny_model: str, tmp_path: Path) -> None:
    from dpo_mm.training.run import train

    rows = [pick(n, (1.0, 0.0, 0.5)[n % 3]) for n in range(6)]
    parquet(tmp_path / "set" / "train.parquet", rows)
    import_set("pickapic", str(tmp_path / "set"), str(tmp_path / "pairs"))
    result = train(
        TrainConfig(tiny_model, str(tmp_path / "pairs"), str(tmp_path / "run"), steps=2, batch_size=2, log_every=1)
    )
    losses = [entry["loss"] for entry in result.history if "loss" in entry]
    assert len(losses) == 2 and abs(losses[0] - 0.6931) < 1e-3


def test_import_set_response_pairs_train(tmp_path: Path) -> None:
    from dpo_mm.training.run import train
    from tests.contracts.tiny_vlms import save

    texts = {"question": "a red circle", "chosen": "a red circle", "rejected": "a blue square"}
    rows = [{"image": cell(n), "text": json.dumps(texts)} for n in range(4)]
    parquet(tmp_path / "set" / "train.parquet", rows, image=CELL)
    import_set("rlhf-v", str(tmp_path / "set"), str(tmp_path / "pairs"))
    config = TrainConfig(
        save("llava", tmp_path / "model"),
        str(tmp_path / "pairs"),
        str(tmp_path / "run"),
        beta=0.1,
        steps=2,
        batch_size=2,
        log_every=1,
    )
    losses = [entry["loss"] for entry in train(config).history if "loss" in entry]
    assert len(losses) == 2 and abs(losses[0] - 0.6931) < 1e-3


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run dpo-mm and return its output."""
    from dpo_mm.cli import main as cli

    def command(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["dpo-mm", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code in (0, None)
        return capsys.readouterr().out

    return command


def test_import_command_prints_rows_left_out_and_the_next_command(command: Callable[..., str], tmp_path: Path) -> None:
    rows = [pick(0, 1.0), pick(1, 0.5), pick(2, 1.0, has_label=False)]
    parquet(tmp_path / "set" / "train.parquet", rows)
    out = str(tmp_path / "out")
    printed = " ".join(command("import", "pickapic", str(tmp_path / "set"), out, "--license", "mit").split())
    assert "rows 2 in 1 files" in printed and "tie 1" in printed
    assert "left out: it has no label 1 (the first: train.parquet, row 2)" in printed
    assert f"Next: dpo-mm doctor {out} && dpo-mm train CONFIG.yaml --pairs {out}" in printed
    assert pq.read_table(Path(out) / "part-00000.parquet")["license"].to_pylist() == ["mit", "mit"]
