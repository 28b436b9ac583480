"""Hostile rows, archives, models and adapters: each is read, or refused in one line. Nothing ends in a traceback or hangs.

The inputs are made by mutating valid ones. A file outside the dataset's folder must never be opened.
"""

from __future__ import annotations

import copy
import gzip
import io
import json
import os
import random
import shutil
import signal
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dpo_mm.data.image_files import encode_png
from dpo_mm.data.load_pairs import Pairs, data_columns
from dpo_mm.data.prompts import read_prompts
from dpo_mm.data.questions import read_questions
from dpo_mm.data.schema import drop_ties, load_pairs, load_responses, split_by_prompt
from dpo_mm.doctor import examine
from dpo_mm.policies.adapter_checks import METADATA
from dpo_mm.policies.adapters import save_lora
from dpo_mm.policies.families import load_policy
from dpo_mm.sources import SOURCES
from dpo_mm.sources.importing import import_set
from tests.conftest import noise_image
from tests.contracts.families import stable_diffusion
from tests.contracts.tiny_vlms import save

PNG = encode_png(noise_image(0, 16))
SECONDS = 20
"""Longest time of one input. Most take milliseconds."""
CANARY = "outside-the-dataset"
OPENED: list[str] = []
VALUES: list[Any] = [
    None, "", "x", "\ud800", "\x1b[2J\0", "a" * 100_000, 0, -1, 7, 2**70, 10**400, 1.5, float("nan"), float("inf"), True, [], {},
    [None], [[]], {"a": 1}, {"bytes": None, "path": "/etc/passwd"}, {"bytes": "text", "path": 5}, {"bytes": [1], "path": None},
    [{"role": "user"}], [{"role": 5, "content": 5}], [{"from": None, "value": None}], "../x.png", "pipe", f"../{CANARY}.png",
    "http://x/y.png", "data:image/png;base64,@@", "data:,x", "iVBORw0KGgo" * 9, [1, "a", None], {"role": "user", "content": [5]},
]  # fmt: skip
"""Values that no column expects. JSON writes a surrogate as its escape."""


def watch_files(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and CANARY in str(arguments[0]):
        OPENED.append(str(arguments[0]))


sys.addaudithook(watch_files)


@contextmanager
def refused_in_one_line(name: str) -> Iterator[None]:
    """Context manager for one input. It may succeed, or raise what a command prints as one line, within SECONDS."""

    def stop(number: int, frame: Any) -> None:
        raise AssertionError(f"{name}: still running after {SECONDS} seconds")

    OPENED.clear()
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    except (ValueError, OSError) as error:
        assert not isinstance(error, UnicodeError | json.JSONDecodeError), f"{name}: {error!r} names no file"
        assert len(str(error)) > 20 and len(str(error)) < 3000, f"{name}: {error!r:.300}"
    except AssertionError:
        raise
    except Exception as error:
        raise AssertionError(f"{name}: {type(error).__name__}: {error!s:.300}") from error
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert not OPENED, f"{name}: opened {OPENED}"


def mutated(value: Any, rng: random.Random) -> Any:
    """A copy of a JSON value in which one part, at any depth, has another value, is missing, or is nested deeply."""
    kind = rng.random()
    if isinstance(value, dict) and value and kind < 0.85:
        changed, key = dict(value), rng.choice(sorted(value))
        if kind < 0.08:
            del changed[key]
        else:
            changed[key] = mutated(value[key], rng)
        return changed
    if isinstance(value, list) and value and kind < 0.7:
        number = rng.randrange(len(value))
        return [*value[:number], mutated(value[number], rng), *value[number + 1 :]]
    if kind > 0.97:
        return json.loads("[" * 200 + "]" * 200)
    return copy.deepcopy(rng.choice(VALUES))


TURN = [{"from": "human", "value": "<image>what?"}, {"from": "gpt", "value": "a cat"}]
MESSAGES = [{"role": "user", "content": "what?"}]
RATING = {name: {"Rating": "5"} for name in ("Helpfulness", "Visual Faithfulness", "Ethical Considerations")}
WORSE = {name: {"Rating": "1"} for name in RATING}
ROWS: dict[str, list[dict[str, Any]]] = {
    "pickapic": [{"caption": "p", "jpg_0": "a.png", "jpg_1": "b.png", "label_0": 1, "label_1": 0, "has_label": True}],
    "open-image-preferences": [{"prompt": "p", "chosen": "a.png", "rejected": "b.png", "chosen_model": "m"}],
    "open-image-preferences-results": [
        {"prompt": "p", "images": {"image_1": "a.png", "image_2": "b.png"}, "preference.responses": ["image_1"],
         "preference.responses.status": ["submitted"]}
    ],
    "hpdv2": [
        {"prompt": "p", "file_path": ["a.png", "b.png"], "human_preference": [1, 0]},
        {"prompt": "p", "image_path": ["a.png", "b.png"], "rank": [1, 2], "raw_annotations": [{"rank": [1, 2]}]},
    ],
    "hpdv3": [{"prompt": "p", "path1": "a.png", "path2": "b.png", "choice_dist": [3, 1], "model1": "m"}],
    "hpdv3-plusplus": [{"prompt": "p", "path1": "a.png", "path2": "b.png", "choice_dist": [3, 1]}],
    "image-reward-db": [
        {"prompt": "p", "prompt_id": "1", "image_path": name, "rank": n, "overall_rating": n} for n, name in enumerate(("a.png", "b.png"))
    ],
    "rapidata": [{"prompt": "p", "image1": "a.png", "image2": "b.png", "votes_image1": 3, "votes_image2": 1}],
    "vision-reward-db": [
        {"prompt": "p", "image": name, "annotation": {"clarity": n}, "meta_result": [1, n], "meta_mask": [1, 1]}
        for n, name in enumerate(("a.png", "b.png"))
    ],
    "rlhf-v": [{"image": "a.png", "text": json.dumps({"question": "q", "chosen": "a", "rejected": "b"})}],
    "rlaif-v": [{"image": "a.png", "question": "q", "chosen": "a", "rejected": "b"}],
    "vl-feedback": [
        {"id": 1, "prompt": "q", "img_path": "a.png", "completions": [
            {"annotations": RATING, "model": "m", "response": "a"}, {"annotations": WORSE, "model": "n", "response": "b"}]},
        {"id": 1, "prompt": "q", "img_path": "a.png", "completions": {
            "annotations": [RATING, WORSE], "model": ["m", "n"], "response": ["a", "b"]}},
    ],
    "mmpr": [{"image": ["a.png"], "question": "<image>q", "chosen": "a", "rejected": "b"}],
    "povid": [{"image": "a.png", "conversations": TURN, "rejected_conversations": [TURN[0], {"from": "gpt", "value": "b"}]}],
    "llama-factory": [{"conversations": TURN[:1], "chosen": TURN[1], "rejected": {"from": "gpt", "value": "b"}, "images": ["a.png"], "system": "s"}],
    "trl": [
        {"prompt": MESSAGES, "chosen": [{"role": "assistant", "content": "a"}], "rejected": [{"role": "assistant", "content": "b"}],
         "images": ["a.png"], "tools": "[]", "score_gap": 1},
        {"prompt": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": "t"}]}],
         "chosen": "a", "rejected": "b"},
        {"prompt": MESSAGES, "completion": "a", "label": False, "images": ["a.png"]},
    ],
    "ms-swift": [
        {"messages": [*MESSAGES, {"role": "assistant", "content": "a"}], "rejected_response": "b", "images": ["a.png"]},
        {"messages": TURN, "rejected_messages": [TURN[0], {"from": "gpt", "value": "b"}], "images": ["a.png"], "rejected_images": ["a.png"]},
    ],
    "two-folders": [{"id": "1", "prompt": "p", "better": "a.png", "worse": "b.png"}],
    "kohya-folders": [{"id": "1", "prompt": "p", "better": "a.png", "worse": "b.png"}],
    "captioned-images": [{"file_name": "a.png", "text": "p", "liked": True}],
    "chat": [{"messages": [*MESSAGES, {"role": "assistant", "content": "a"}], "images": ["a.png"], "label": True}, {"conversations": TURN, "image": "a.png"}],
    "custom-images": [{"prompt": "p", "image_a": "a.png", "image_b": "b.png", "preference": "a", "seed_a": 5, "p_a": 0.7, "model_a": "m"}],
    "custom-responses": [{"prompt": "p", "chosen": "a", "rejected": "b", "image": "a.png", "score_gap": 1, "chosen_truncated": True}],
}  # fmt: skip
"""Valid raw rows of each source."""
ROW_MUTATIONS = 12
FILE = {"hpdv3-plusplus": "train_aes.json"}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset's folder with two images and a pipe, next to a file that must not be opened."""
    folder = tmp_path_factory.mktemp("sources") / "set"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(PNG)
    (folder.parent / f"{CANARY}.png").write_bytes(PNG)
    os.mkfifo(folder / "pipe")
    (folder / "link.png").symlink_to(folder.parent / f"{CANARY}.png")
    return folder


def test_every_source_has_valid_rows() -> None:
    assert ROWS.keys() == SOURCES.keys()


@pytest.mark.slow
def test_hostile_rows_of_every_source(dataset: Path, tmp_path: Path) -> None:
    rng, count, imported = random.Random(0), 0, 0
    for source, rows in ROWS.items():
        file = dataset / FILE.get(source, "train.json")
        for number in range(ROW_MUTATIONS + 1):
            raw = copy.deepcopy(rows)
            if number:
                place = rng.randrange(len(raw))
                raw[place] = mutated(raw[place], rng)
            file.write_text("\n".join(json.dumps(row) for row in raw))
            out, name = tmp_path / f"{source}-{number}", f"{source} {raw!r:.300}"
            with refused_in_one_line(name):
                imported += import_set(source, str(file), str(out)).rows > 0
            count += 1
            assert number or out.joinpath("part-00000.parquet").exists(), f"{source}: the valid rows were not imported"
        file.unlink()
    assert count == 23 * 13 and imported >= len(ROWS)


CELL = pa.struct({"bytes": pa.binary(), "path": pa.string()})
TALK = {"user": [{"role": "user", "content": "what?"}], "assistant": [{"role": "assistant", "content": "a cat"}]}
IMAGE_ROW = {
    "id": "r", "prompt": "p", "image_a": {"bytes": PNG, "path": None}, "image_b": {"bytes": PNG, "path": None}, "preference": "a",
    "p_a": 0.7, "votes_a": 3, "votes_b": 1, "score_a": 0.5, "score_b": 0.1, "model_a": "m", "seed_a": 5, "group_id": "g",
}  # fmt: skip
RESPONSE_ROW = {
    "id": "r", "images": [{"bytes": PNG, "path": None}], "prompt": TALK["user"], "chosen": TALK["assistant"],
    "rejected": [{"role": "assistant", "content": "a dog"}], "probability": 0.7, "score_gap": 1.0, "chosen_truncated": False,
    "tools": "[]",
}  # fmt: skip
TABLES = 60


def write_table(path: Path, rows: list[dict[str, Any]]) -> bool:
    """Write rows as Parquet, with the types that Arrow finds. Returns False if Arrow finds none."""
    try:
        pq.write_table(pa.Table.from_pylist(rows), path)
    except (pa.ArrowException, TypeError, ValueError, OverflowError, AttributeError):
        return False
    return True


def load_and_decode(path: str, folder: Path) -> None:
    """What `train` does with image pairs before it encodes them."""
    rows = drop_ties(load_pairs(path))
    train, held_out = split_by_prompt(rows, 0.5, seed=0)
    data_columns(rows)
    for part in (train, held_out or train):
        list(Pairs(part, path, "drop", folder / "dropped.jsonl").decode(range(len(part))))


def write_damaged(file: Path, rows: list[Any], valid: dict[str, Any], rng: random.Random) -> list[Any]:
    """Write rows with a mutated one, or with a wrong value in a whole column. Empty if Parquet does not take them."""
    rows = [mutated(rows[0], rng), *rows[1:]]
    if rng.random() < 0.5:
        key = rng.choice(sorted(valid))
        value = rng.choice(VALUES)
        rows = [{**valid, key: value} for _ in range(2)]
    return rows if all(isinstance(row, dict) for row in rows) and write_table(file, rows) else []


@pytest.mark.slow
def test_hostile_tables_of_pairs(dataset: Path, tmp_path: Path) -> None:
    rng, count = random.Random(1), 0
    while count < TABLES:
        valid = [dict(IMAGE_ROW, id=str(n), prompt=f"p{n}") for n in range(2)]
        file = dataset / "pairs.parquet"
        if not (rows := write_damaged(file, valid, IMAGE_ROW, rng)):
            continue
        count += 1
        with refused_in_one_line(f"pairs {rows!r:.300}"):
            load_and_decode(str(file), tmp_path)
        with refused_in_one_line(f"doctor {rows!r:.300}"):
            examine(str(file))


@pytest.mark.slow
def test_hostile_tables_of_responses(dataset: Path, tmp_path: Path) -> None:
    rng, count, policy = random.Random(2), 0, load_policy(save("llava", tmp_path / "model"))
    while count < TABLES:
        valid = [dict(RESPONSE_ROW, id=str(n)) for n in range(2)]
        file = dataset / "pairs.parquet"
        if not (rows := write_damaged(file, valid, RESPONSE_ROW, rng)):
            continue
        count += 1
        with refused_in_one_line(f"responses {rows!r:.300}"):
            loaded = load_responses(str(file))
            split_by_prompt(loaded, 0.5, seed=0)
            policy.encode(loaded)
        with refused_in_one_line(f"doctor {rows!r:.300}"):
            examine(str(file))


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Bytes of a file that is truncated, changed, compressed, or in another encoding."""
    content, kind = bytearray(data), rng.randrange(8)
    start = rng.randrange(len(content))
    if kind == 0:
        return bytes(content[:start])
    if kind == 1:
        content[start : start + 4] = rng.randbytes(4)
        return bytes(content)
    if kind == 2:
        return gzip.compress(data)[: rng.choice((None, -5))]
    if kind == 3:
        return b"\x28\xb5\x2f\xfd" + rng.randbytes(50)
    if kind == 4:
        return data.decode("latin-1").encode("utf-16")
    if kind == 5:
        return rng.choice(
            (b"", b"\0", b"[", b"\xff\xfe\xff", b"\x1f\x8b", b"[" * 100_000, b'{"a":' * 50_000, b"PAR1PAR1")
        )
    if kind == 6:
        return bytes(content[start:])
    content[start:start] = rng.choice((b"\xed\xa0\x80", b"\0", b"\x1b[2J", b"\xff", b"1" * 5000))
    return bytes(content)


LISTS: dict[str, bytes] = {
    "p.txt": b"a cat\na dog\n",
    "p.jsonl": b'{"prompt": "a cat", "tag": "x"}\n{"prompt": "a dog", "category": null}\n',
    "p.json": b'[{"prompt": "a cat"}, "a dog"]',
    "p.csv": b"prompt,category\na cat,x\n",
    "PartiPrompts.tsv": b"Prompt\tCategory\tChallenge\tNote\na cat\tx\ty\tz\n",
    "q.jsonl": b'{"prompt": "what?", "images": ["a.png"], "ground_truth": ["a", 1], "id": 5}\n',
    "q.json": b'[{"prompt": [{"role": "user", "content": "what?"}], "image": "a.png", "ground_truth": {"a": 1}}]',
}
FILES = 12


def read_list(name: str, path: str) -> None:
    if not name.startswith("q"):
        assert all(prompt.encode() for prompt in read_prompts(path, limit=5))
        return
    for question in read_questions(path):
        assert isinstance(question.prompt, str | list) and all(
            truth.encode() or True for truth in question.ground_truths
        )


@pytest.mark.slow
def test_hostile_lists_of_prompts_and_questions(dataset: Path) -> None:
    rng, count = random.Random(3), 0
    for name, data in LISTS.items():
        for number in range(FILES):
            content = damaged(data, rng) if number else data
            if number % 3 == 2 and name.endswith("jsonl"):
                content = json.dumps(mutated(json.loads(data.split(b"\n")[0]), rng)).encode()
            (dataset / name).write_bytes(content)
            with refused_in_one_line(f"{name} {content!r:.200}"):
                read_list(name, str(dataset / name))
            count += 1
        (dataset / name).unlink()
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero"), Path.mkdir):
        for name in LISTS:
            make(dataset / name)
            with refused_in_one_line(name):
                read_list(name, str(dataset / name))
            (dataset / name).rmdir() if (dataset / name).is_dir() else (dataset / name).unlink()
            count += 1
    assert count == len(LISTS) * (FILES + 3)


@pytest.mark.slow
def test_damaged_files_of_rows(dataset: Path, tmp_path: Path) -> None:
    rng, count = random.Random(4), 0
    rows = [dict(ROWS["custom-images"][0], id=str(n)) for n in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), dataset / "rows.parquet")
    header = ",".join(rows[0])
    contents = {
        "rows.parquet": (dataset / "rows.parquet").read_bytes(),
        "rows.jsonl": "\n".join(map(json.dumps, rows)).encode(),
        "rows.json": json.dumps(rows).encode(),
        "rows.csv": "\n".join([header, *(",".join(map(str, row.values())) for row in rows)]).encode(),
        "rows.jsonl.gz": gzip.compress("\n".join(map(json.dumps, rows)).encode()),
    }
    for name, data in contents.items():
        for number in range(FILES):
            content = damaged(data, rng) if number else data
            (dataset / name).write_bytes(content)
            with refused_in_one_line(f"{name} {content!r:.200}"):
                import_set("custom-images", str(dataset / name), str(tmp_path / f"{name}-{number}"))
            if name == "rows.parquet":
                with refused_in_one_line(f"train {name} {content!r:.200}"):
                    load_and_decode(str(dataset / name), tmp_path)
            count += 1
        (dataset / name).unlink()
    assert count == len(contents) * FILES


def archive(kind: str, names: list[str], rng: random.Random) -> bytes:
    """An archive of images under these names. Some members are links or devices."""
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as target:
            for name in names:
                target.writestr(name, PNG)
        return buffer.getvalue()
    with tarfile.open(fileobj=buffer, mode="w:gz" if kind == "tar.gz" else "w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size, info.type = len(PNG), tarfile.REGTYPE
            if rng.random() < 0.1:
                info.type, info.size, info.linkname = (
                    rng.choice((tarfile.SYMTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE)),
                    0,
                    "/etc/passwd",
                )
            tar.addfile(info, io.BytesIO(PNG))
    return buffer.getvalue()


ARCHIVES = 20
NAMES = [
    "a.png",
    "b.png",
    "../x.png",
    "/etc/x.png",
    "a.png/b.png",
    "x" * 300,
    "C:/x",
    ".",
    "é\u202e.png",
    "a/b/../c.png",
]


@pytest.mark.slow
def test_hostile_archives(tmp_path: Path) -> None:
    rng, count = random.Random(5), 0
    for kind in ("zip", "tar", "tar.gz"):
        for number in range(ARCHIVES):
            folder = tmp_path / f"{kind}-{number}"
            folder.mkdir()
            (folder / "train.json").write_text(json.dumps(ROWS["hpdv3"]))
            data = archive(kind, NAMES[:2] if number < 8 else rng.sample(NAMES, 4), rng)
            if 0 < number < 8 or rng.random() < 0.2:
                data = damaged(data, rng)
            (folder / f"images.{kind}").write_bytes(data)
            with refused_in_one_line(f"{kind} {number}"):
                result = import_set("hpdv3", str(folder), str(folder / "out"))
                assert number or result.rows == 1
            count += 1
            assert not list(tmp_path.glob("*.png"))
    assert count == 3 * ARCHIVES


CONFIG_VALUES: list[Any] = [
    None,
    "x",
    "../x",
    0,
    -1,
    10**9,
    10**12,
    2**70,
    0.5,
    float("nan"),
    True,
    [],
    {},
    ["code", "Class"],
    [10**9],
]
MODEL_INPUTS, ADAPTER_INPUTS = 26, 22


def make_models(folder: Path) -> dict[str, Path]:
    """A pipeline, a vision-language model, and an adapter of each."""
    from peft import LoraConfig, get_peft_model

    models = {"image": stable_diffusion(folder / "image"), "text": Path(save("llava", folder / "text"))}
    policy = load_policy(str(models["text"]))
    torch.manual_seed(0)
    tuned = get_peft_model(policy.base_model, LoraConfig(r=2, target_modules=r".*language_model.*\.(q_proj|v_proj)"))
    tuned.save_pretrained(folder / "text-adapter")
    pipe = load_policy(str(models["image"])).pipe
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    save_lora(pipe, "unet", folder / "image-adapter")
    return {**models, "image adapter": folder / "image-adapter", "text adapter": folder / "text-adapter"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_models(tmp_path_factory.mktemp("models"))


def linked_copy(folder: Path, target: Path) -> Path:
    """A copy of a folder that shares its files. A changed file must be written anew."""
    return Path(shutil.copytree(folder, target, copy_function=os.link))


def write_anew(file: Path, data: bytes) -> None:
    file.unlink()
    file.write_bytes(data)


def damage_config(folder: Path, rng: random.Random) -> str:
    """Change one entry, at any depth, of one JSON file of a model, or the whole file."""
    files = sorted(file for file in folder.rglob("*.json") if file.name not in ("tokenizer.json", "vocab.json"))
    file = rng.choice(files)
    content = json.loads(file.read_text())
    part, steps = content, [file.name]
    while isinstance(part, dict) and part:
        key = rng.choice(sorted(part))
        steps.append(key)
        if isinstance(part[key], dict) and part[key] and rng.random() < 0.8:
            part = part[key]
            continue
        if rng.random() < 0.1:
            del part[key]
        else:
            part[key] = rng.choice(CONFIG_VALUES)
            steps.append(repr(part[key]))
        break
    data = json.dumps(content).encode()
    if rng.random() < 0.1:
        data = rng.choice((b"", b"[]", b"null", b"{", b"\xff", b"[" * 5000, data[: len(data) // 2]))
        steps = [file.name, repr(data[:20])]
    write_anew(file, data)
    return " ".join(map(str, steps))


def damage_weights(folder: Path, rng: random.Random) -> str:
    """Truncate, replace or change one file of weights."""
    file = rng.choice(sorted(folder.rglob("*.safetensors")))
    data, kind = file.read_bytes(), rng.randrange(8)
    if kind < 5:
        buffer = io.BytesIO()
        torch.save({"weight": torch.zeros(3)}, buffer)
        length = (2**40).to_bytes(8, "little")
        write_anew(file, (data[: len(data) // 2], buffer.getvalue(), b"", length + data[8:], data + b"more")[kind])
        return f"{file.name} damaged in way {kind}"
    tensors = load_file(file)
    name = rng.choice(sorted(tensors))
    if kind == 5:
        tensors[name] = torch.full_like(tensors[name], float(rng.choice(("nan", "inf"))))
    elif kind == 6:
        tensors[name] = torch.zeros(*tensors[name].shape, 2)
    else:
        tensors[rng.choice(("unet.(a+)+$.lora_B.weight", "more.weight", f"{name}.more"))] = tensors.pop(name)
    file.unlink()
    save_file(tensors, file, {"format": "pt"})
    return f"{file.name}: {name} changed in way {kind}"


def load_and_use(model: str, adapter: str | None = None) -> None:
    policy = load_policy(model, adapter=adapter)
    if policy.modality == "image":
        next(policy.sample(["a star"], [0], steps=1, guidance=1.0, batch_size=1))
    else:
        policy.generate([[noise_image(0)]], [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]],
                        max_new_tokens=2, do_sample=False)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["image", "text"])
def test_hostile_models(kind: str, models: dict[str, Path], tmp_path: Path) -> None:
    rng = random.Random(6)
    load_and_use(str(models[kind]))
    for number in range(MODEL_INPUTS):
        folder = linked_copy(models[kind], tmp_path / str(number))
        change = damage_weights(folder, rng) if number % 3 == 0 else damage_config(folder, rng)
        with refused_in_one_line(f"{kind} {change}"):
            load_and_use(str(folder))


PATTERNS = (r"(.*)*$x", r"(a|a|b|[a-z_.0-9])+$x", r"(\w+\.?)+$x", "(", r"(?:(?:.*)*)*\.never")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["image", "text"])
def test_hostile_adapters(kind: str, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng, adapter, base = random.Random(7), models[f"{kind} adapter"], str(models[kind])
    load_and_use(base, str(adapter))
    monkeypatch.setattr("dpo_mm.policies.adapter_checks.SECONDS", 0.2)  # from here on, each may be refused
    for number in range(ADAPTER_INPUTS):
        folder = linked_copy(adapter, tmp_path / str(number))
        if kind == "text" and number < len(PATTERNS):
            config = json.loads((folder / "adapter_config.json").read_text())
            config[("target_modules", "exclude_modules")[number % 2]] = change = PATTERNS[number]
            write_anew(folder / "adapter_config.json", json.dumps(config).encode())
        elif kind == "image" and number % 2:
            change = damage_metadata(folder / "pytorch_lora_weights.safetensors", rng)
        elif number % 2 or kind == "image":
            change = damage_weights(folder, rng)
        else:
            change = damage_config(folder, rng)
        with refused_in_one_line(f"{kind} adapter {change}"):
            load_and_use(base, str(folder))


def damage_metadata(file: Path, rng: random.Random) -> str:
    """Change the settings in the header of a LoRA of diffusers."""
    with safe_open(file, framework="pt") as opened:
        settings = json.loads(opened.metadata()[METADATA])
    tensors = load_file(file)
    key = rng.choice([*settings, "unet.r", "unet.target_modules", "unet.rank_pattern", "unet.exclude_modules"])
    settings[key] = rng.choice([*CONFIG_VALUES, *PATTERNS, {PATTERNS[0]: 2}, {"to_q": 10**9}])
    text = json.dumps(settings) if rng.random() < 0.9 else rng.choice(("[]", "{", "5", "[" * 5000))
    file.unlink()
    save_file(tensors, file, {"format": "pt", METADATA: text})
    return f"{key} {settings[key]!r} {text[:9]}"
