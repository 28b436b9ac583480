"""Datasets, result folders and names that come from somebody else open no other file and run no code."""

from __future__ import annotations

import io
import json
import os
import shlex
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_mm.assets import presets_folder
from dpo_mm.cli.terminal import run_as_command, say
from dpo_mm.config import JudgeConfig
from dpo_mm.data.image_files import FORMATS, decode_image, encode_png, image_bytes
from dpo_mm.data.questions import read_questions
from dpo_mm.data.schema import load_pairs, load_responses
from dpo_mm.doctor import examine
from dpo_mm.doctor.loading import batches, load_dataset, rows_by_id
from dpo_mm.evaluation.image_store import ImageStore
from dpo_mm.evaluation.saved_comparison import load_comparison
from dpo_mm.judges.scoring import score
from dpo_mm.labels.export import export, train_command
from dpo_mm.labels.pairs import open_pairs, pair_digest
from dpo_mm.labels.store import VoteStore
from dpo_mm.printing.printed_text import print_rows, printable
from dpo_mm.sources.importing import import_set
from tests.conftest import noise_image
from tests.unit.evaluation.test_saved_comparison import finished_run

PNG = encode_png(noise_image(0))
SECRET = b"-----BEGIN PRIVATE KEY-----"
CELL = pa.struct({"bytes": pa.binary(), "path": pa.string()})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dataset's folder with one image and one text, next to a folder with a private key, an image and a pipe."""
    home, dataset = tmp_path / "home", tmp_path / "set"
    home.mkdir()
    (dataset / "inside").mkdir(parents=True)
    (home / "id_rsa").write_bytes(SECRET)
    (home / "private.png").write_bytes(PNG)
    os.mkfifo(home / "pipe")
    (dataset / "inside" / "good.png").write_bytes(PNG)
    (dataset / "inside" / "notes.txt").write_bytes(SECRET)
    os.mkfifo(dataset / "pipe")
    (dataset / "link.png").symlink_to(home / "private.png")
    (dataset / "linked").symlink_to(home)
    return dataset


def hostile_paths(folder: Path) -> list[str]:
    """Paths that lead out of the folder, or to anything but an image in it."""
    home = folder.parent / "home"
    return [
        str(home / "private.png"), "../home/private.png", f"{folder}/../home/private.png", "inside/../../home/private.png",
        "link.png", "linked/private.png", "pipe", str(home / "pipe"), "/dev/zero", "inside", "inside/notes.txt",
        str(home / "id_rsa"), "file:///etc/passwd", "http://localhost:1/a.png", "a\0b", "x" * 5000, "/./etc/passwd",
        f"/./{home}/private.png", "", "~/private.png",
    ]  # fmt: skip


def write_pairs(path: Path, cells: list[Any], kind: pa.DataType = CELL) -> str:
    """Write rows whose image_b is given, and whose image_a is a good image."""
    count = len(cells)
    table = {
        "id": [str(n) for n in range(count)],
        "prompt": ["a star"] * count,
        "image_a": pa.array([{"bytes": PNG, "path": None}] * count, CELL),
        "image_b": pa.array(cells, kind),
        "preference": ["a"] * count,
    }
    pq.write_table(pa.table(table), path)
    return str(path)


@pytest.mark.parametrize("kind", ["struct", "text"])
def test_paths_of_pairs_open_only_images_of_the_dataset(kind: str, folder: Path) -> None:
    """Fails if paths are opened as they are, relative to the working folder, or through links."""
    bad = hostile_paths(folder)
    paths = ["inside/good.png", str(folder / "inside" / "good.png"), *bad]
    cells: list[Any] = [{"bytes": None, "path": path} for path in paths] if kind == "struct" else list(paths)
    file = write_pairs(folder / "pairs.parquet", cells, CELL if kind == "struct" else pa.string())
    table = load_pairs(file).with_format("arrow")[:]
    read = [row.as_py() for row in table["image_b"]]
    assert image_bytes(read[0]) == image_bytes(read[1]) == PNG
    refused = 0
    for cell in read[2:]:
        with pytest.raises((ValueError, OSError)):
            image_bytes(cell)
        refused += 1
    assert refused == len(bad) == 20
    dataset = load_dataset(file)
    for rows in (
        [row for part in batches(dataset) for row in part],
        list(rows_by_id(dataset, set(map(str, range(40)))).values()),
    ):
        for row in rows[2:]:
            with pytest.raises((ValueError, OSError)):
                image_bytes(row["image_b"])
        assert image_bytes(rows[0]["image_b"]) == PNG and len(rows) == 22
    assert examine(file).failed()


def test_paths_of_prompt_images_open_only_images_of_the_dataset(folder: Path) -> None:
    bad = hostile_paths(folder)[:14]
    turn = lambda text: [{"role": "user", "content": [{"type": "text", "text": text}]}]
    cells = [[{"bytes": None, "path": path}] for path in ["inside/good.png", *bad]]
    count = len(cells)
    table = {name: [turn("x")] * count for name in ("prompt", "chosen", "rejected")}
    pq.write_table(pa.table({**table, "images": pa.array(cells, pa.list_(CELL))}), folder / "pairs.parquet")
    read = load_responses(str(folder / "pairs.parquet")).with_format("arrow")[:]["images"].to_pylist()
    assert image_bytes(read[0][0]) == PNG
    for images in read[1:]:
        with pytest.raises((ValueError, OSError)):
            image_bytes(images[0])


def test_rows_with_bytes_are_not_copied(folder: Path) -> None:
    file = write_pairs(folder / "pairs.parquet", [{"bytes": PNG, "path": "/etc/passwd"}] * 3)
    assert [image_bytes(row["image_b"]) for row in open_pairs(file)] == [PNG] * 3


@pytest.mark.parametrize("path", ["pipe", "link.png", "inside/notes.txt", "../home/id_rsa", "/dev/zero"])
def test_questions_and_imports_open_only_images_of_the_dataset(path: str, folder: Path, tmp_path: Path) -> None:
    (folder / "q.jsonl").write_text(json.dumps({"prompt": "what?", "images": [path]}))
    with pytest.raises(ValueError, match=r"q\.jsonl, row 0: image .* cannot be read"):
        read_questions(str(folder / "q.jsonl"))
    (folder / "rows.jsonl").write_text(
        json.dumps({"prompt": "p", "image_a": "inside/good.png", "image_b": path, "preference": "a"})
    )
    with pytest.raises(ValueError, match="no row was imported"):
        import_set("custom-images", str(folder / "rows.jsonl"), str(tmp_path / "out"))


def test_files_of_a_folder_are_regular_files_in_it(folder: Path, tmp_path: Path) -> None:
    """A pipe or a link out of the folder with the name of a dataset's file is refused, not opened."""
    other = write_pairs(tmp_path / "home" / "other.parquet", [{"bytes": PNG, "path": None}])
    for number, make in enumerate((os.mkfifo, lambda path: path.symlink_to(other), Path.mkdir)):
        inside = folder / str(number)
        inside.mkdir()
        make(inside / "train.parquet")
        with pytest.raises(ValueError, match=r"regular file|no Parquet"):
            load_pairs(str(inside))
        with pytest.raises(ValueError, match="regular file"):
            load_dataset(str(inside))
        with pytest.raises(ValueError, match=r"regular file|no Parquet"):
            import_set("custom-images", str(inside), str(tmp_path / f"out-{number}"))
    os.mkfifo(folder / "one.parquet")
    for command in (load_pairs, load_dataset, lambda path: import_set("trl", path, str(tmp_path / "out"))):
        with pytest.raises(ValueError):
            command(str(folder / "one.parquet"))


def test_links_of_a_repository_in_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    repository = tmp_path / "datasets--owner--name"
    snapshot = repository / "snapshots" / "0123"
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (repository / "blobs" / "a").write_bytes(PNG)
    (snapshot / "a.png").symlink_to("../../blobs/a")
    file = Path(write_pairs(repository / "blobs" / "b", [{"bytes": None, "path": "a.png"}]))
    (snapshot / "train.parquet").symlink_to(file)
    assert image_bytes(open_pairs(str(snapshot))[0]["image_b"]) == PNG


def test_votes_on_a_hostile_dataset_leak_no_file(folder: Path, tmp_path: Path) -> None:
    for number, path in enumerate((str(tmp_path / "home" / "id_rsa"), "inside/notes.txt", "link.png")):
        file = write_pairs(folder / f"{number}.parquet", [{"bytes": None, "path": path}])
        rows, votes = open_pairs(file), tmp_path / f"{number}.sqlite"
        store = VoteStore(str(votes), rows["id"], source=file)
        shown = store.next_pair("Ann")
        assert shown is not None
        store.record_digest(shown.pair, pair_digest(rows[0]))
        store.cast("Ann", shown.id, "left")
        for format in ("rows", "label-studio", "argilla"):
            with pytest.raises(ValueError, match="pair '0'"):
                export(str(votes), str(tmp_path / "out"), format=format)
        assert not (tmp_path / "out").exists()


def test_folder_to_label_or_judge_follows_no_link(tmp_path: Path, folder: Path) -> None:
    for side in ("a", "b"):
        (tmp_path / "sides" / side).mkdir(parents=True)
    (tmp_path / "sides" / "a" / "0.png").write_bytes(PNG)
    (tmp_path / "sides" / "b" / "0.png").symlink_to(tmp_path / "home" / "private.png")
    (tmp_path / "sides" / "0.txt").symlink_to(tmp_path / "home" / "id_rsa")
    rows = open_pairs(str(tmp_path / "sides"))
    assert rows[0]["prompt"] == "0" and image_bytes(rows[0]["image_a"]) == PNG
    with pytest.raises(ValueError, match="leads out"):
        image_bytes(rows[0]["image_b"])
    images = tmp_path / "images"
    images.mkdir()
    (images / "0.png").write_bytes(PNG)
    (images / "1.png").symlink_to(tmp_path / "home" / "private.png")
    os.mkfifo(images / "2.png")
    (images / "prompts").write_text("a\nb\nc\n")
    result = score(JudgeConfig("aesthetic", str(images), str(tmp_path / "s.parquet"), str(images / "prompts")))
    assert result is not None and (result.scored, result.broken) == (1, 2)


def test_pillow_opens_only_the_listed_formats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An EPS starts Ghostscript in Pillow. Fails if `Image.open` is called without formats."""
    ran = tmp_path / "ran"
    (tmp_path / "gs").write_text(f"#!/bin/sh\necho >> {ran}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    buffer = io.BytesIO()
    noise_image(0).save(buffer, "PCX")
    for data in (eps, b"\xc5\xd0\xd3\xc6" + eps, buffer.getvalue()):
        with pytest.raises(ValueError):
            decode_image(data)
    assert not ran.exists() and "EPS" not in FORMATS
    package = Path(__file__).parents[2]
    files = [
        *(package / "dpo_mm").rglob("*.py"),
        *(package / "demos").glob("*.py"),
        *(package / "recipes").glob("*.py"),
    ]
    assert len(files) > 150
    calls = [line for file in files for line in file.read_text().splitlines() if "Image.open(" in line]
    assert calls and all("formats=" in line for line in calls)


def with_judge(folder: Path, judge: str) -> Path:
    finished_run(folder)
    (folder / "metrics.json").write_text(
        json.dumps({"comparisons": [{"judge": judge, "headline": True}], "settings": {}})
    )
    return folder


def test_judges_of_a_result_folder_are_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a judge that a folder names is imported without the user's flag."""
    (tmp_path / "evil_judge.py").write_text(
        f"open({str(tmp_path / 'canary')!r}, 'w')\ndef score(images, prompts): pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = with_judge(tmp_path / "result", "evil_judge:score")
    with pytest.raises(ValueError, match=r"'evil_judge:score', which is not built in.*--judges evil_judge:score"):
        load_comparison(folder)
    found = load_comparison(folder, judges=["aesthetic"])
    assert "evil_judge:score" not in found.judges and "aesthetic" in found.judges
    found.select("aesthetic", outcome="better")
    assert not (tmp_path / "canary").exists()
    assert load_comparison(folder, judges=["evil_judge:score"]).judges[0] == "evil_judge:score"


@pytest.mark.slow
def test_models_of_a_result_folder_are_opened_only_if_bundled(tmp_path: Path) -> None:
    from dpo_mm.pages.server import load_page

    page = load_page("compare_images")
    for model, adapter in (("/other/evil", "none"), ("shapes-sd", "../evil"), ("owner/name", "none")):
        folder = finished_run(tmp_path / model.replace("/", "-"))
        metrics = json.loads((folder / "metrics.json").read_text())
        metrics["settings"] = {"model": model, "adapter": adapter}
        (folder / "metrics.json").write_text(json.dumps(metrics))
        with pytest.raises(ValueError, match=r"only if you name them: --model .* --adapter"):
            page.run(comparison=str(folder))


@pytest.mark.parametrize(
    "name", ["../../secret.png", "/etc/passwd", "base/../../../secret.png", "base/link.png", "a\0b", 5, None]
)
def test_manifest_names_only_files_of_its_folder(name: Any, tmp_path: Path) -> None:
    folder = finished_run(tmp_path / "result")
    (tmp_path / "secret.png").write_bytes(PNG)
    (folder / "pictures" / "base" / "link.png").symlink_to(tmp_path / "secret.png")
    manifest = folder / "pictures" / "manifest.jsonl"
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    from dpo_mm.files.checksums import with_checksum, without_checksum

    changed = {**(without_checksum(lines[0]) or {}), "file": name}
    manifest.write_text("".join(json.dumps(line) + "\n" for line in [with_checksum(changed), *lines[1:]]))
    for read in (load_comparison, lambda path: ImageStore(path / "pictures")):
        with pytest.raises(ValueError, match=r"manifest\.jsonl, row 0: "):
            read(folder)


ESCAPES = "\x1b]0;title\x07\x1b[2Jx\r\x9b31m\u202eabc\x7f\ud800"


def test_control_characters_are_printed_as_escapes(capsys: pytest.CaptureFixture[str]) -> None:
    print_rows({"name" + ESCAPES: "value" + ESCAPES})
    say(ESCAPES)
    with pytest.raises(SystemExit), run_as_command():
        raise ValueError(f"prompt {ESCAPES}")
    shown = "".join(capsys.readouterr())
    assert printable(shown) == shown and shown.count("\\x1b]0;title\\x07\\x1b[2Jx") == 4


def test_doctor_and_ratings_print_no_control_characters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from dpo_mm.cli.main import app

    escapes = ESCAPES.replace("\ud800", "")
    file = tmp_path / "pairs.parquet"
    write_pairs(file, [{"bytes": PNG, "path": None}] * 4)
    table = pq.read_table(file)
    for name in ("id", "prompt", "model_a", "model_b", "source"):
        values = pa.array([f"{name}{number}{escapes}" for number in range(4)])
        table = (
            table.set_column(table.column_names.index(name), name, values)
            if name in table.column_names
            else table.append_column(name, values)
        )
    pq.write_table(table, file)
    for command in (["doctor", str(file)],):
        with pytest.raises(SystemExit):
            app(command, standalone_mode=True)
    shown = "".join(capsys.readouterr())
    assert printable(shown) == shown and "\\x1b" in shown


@pytest.mark.parametrize(
    "name", ["a'; touch x #.sqlite", "$(touch x).sqlite", "-rf.sqlite", "a\nb.sqlite", "`id`.sqlite"]
)
def test_commands_to_copy_quote_names(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = shlex.split(train_command(name, presets_folder() / "faithfulness-shapes.yaml"))
    assert Path(words[3]) == Path(name) and not words[3].startswith("-") and not words[5].startswith("-")


def test_texts_that_are_not_utf_8_are_refused(folder: Path) -> None:
    """Parquet does not check its texts."""
    file = write_pairs(folder / "pairs.parquet", [{"bytes": PNG, "path": None}])
    table = pq.read_table(file)
    prompt = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff\xfe"], pa.binary()).buffers())
    pq.write_table(table.set_column(table.column_names.index("prompt"), "prompt", prompt), file)
    for command in (load_pairs, examine, read_questions):
        with pytest.raises(ValueError, match=r"pairs\.parquet"):
            command(file)


def test_checksums_of_others_are_read_safely(tmp_path: Path) -> None:
    from dpo_mm.files.checksums import complete_files

    for content in ("[" * 100_000, "[]", "5", '{"../x": "a", "/etc/passwd": "b"}', "{"):
        (tmp_path / "complete.json").write_text(content)
        assert complete_files(tmp_path) == {}
