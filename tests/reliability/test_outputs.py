"""A command changes only what it made itself: outputs that are inputs, foreign files, finished results, locks, overwrite."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpo_mm.assets import resolve_asset
from dpo_mm.config import CompareConfig, TrainConfig, as_dict
from dpo_mm.files.checksums import (
    COMPLETE,
    changed_files,
    complete_files,
    missing_shards,
    what_is_wrong,
    write_checksums,
    write_with_checksum,
)
from dpo_mm.files.content_key import file_hash, model_files_hash
from dpo_mm.files.output_files import output_files, write_file
from dpo_mm.files.outputs import LOCK, RECORDS, OutputKind, differences, output_folder, write_results
from dpo_mm.files.resumable import TEMPORARY, atomic_write, temporary_path
from dpo_mm.recipe import compare
from dpo_mm.training import run as training
from dpo_mm.training.checkpoints import remove_old_checkpoints
from dpo_mm.training.model_card import MADE, add_results
from dpo_mm.training.run import TRAINING, dry_run, train

HERE = "tests.reliability.test_outputs"
MINING = OutputKind("mining.json", "mined", results=("pairs.parquet",))


def redness(images: Any, prompts: Any) -> list[float]:
    return [image.getpixel((0, 0))[0] for image in images]


redness.better = "higher"  # type: ignore[attr-defined]


def contents(folder: Path) -> dict[str, str]:
    """Hash of every file of a folder, and the target of every link, by name."""
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else file_hash(path)
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def fill(folder: Path, settings: dict[str, Any], *, result: str = "pairs", **more: Any) -> bool:
    """Make a result in a folder as a command does. True if it was there already."""
    with output_folder(folder, MINING, settings, **more) as finished:
        if not finished:
            with write_with_checksum(folder / "shard-00000.parquet") as temporary:
                temporary.write_text("shard")
            with write_results(folder) as temporary:
                (temporary / "pairs.parquet").write_text(result)
        return finished


# The folder


@pytest.mark.parametrize("name", ["README.md", "unet/config.json", "checkpoint-5/model.bin", "shard-00000.parquet"])
def test_folder_with_foreign_files_is_refused_and_unchanged(name: str, tmp_path: Path) -> None:
    """Catches a command that takes any folder for its own."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("of the user")
    before = contents(tmp_path)
    for overwrite in (False, True):
        message = rf"has files that dpo-mm did not make \({name.partition('/')[0]}\). Choose another output_dir"
        with pytest.raises(ValueError, match=message):
            fill(tmp_path, {"seed": 0}, overwrite=overwrite)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("record", ["[]", "{", '{"kind": "of another program"}', '{"pairs": "x"}'])
def test_record_of_another_program_is_a_foreign_file(record: str, tmp_path: Path) -> None:
    (tmp_path / "mining.json").write_text(record)
    with pytest.raises(ValueError, match=r"dpo-mm did not make \(mining.json\)"):
        fill(tmp_path, {"seed": 0}, overwrite=True)
    assert (tmp_path / "mining.json").read_text() == record


def test_same_settings_give_the_finished_result_and_others_are_refused(tmp_path: Path) -> None:
    """Catches a result that another one silently replaces, and work that is done again."""
    folder = tmp_path / "new" / "folder"
    assert not fill(folder, {"seed": 0, "batch_size": 4})
    before, times = contents(folder), {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert fill(folder, {"seed": 0, "batch_size": 8})
    with pytest.raises(ValueError, match=r"was mined with other settings \(seed: 0 -> 1\). .* with --overwrite"):
        fill(folder, {"seed": 1, "batch_size": 4})
    with pytest.raises(ValueError, match="contains mined pairs"), output_folder(folder, training.TRAINING, {}):
        pass
    assert contents(folder) == before and {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times


def test_overwrite_removes_only_unchanged_files_of_ours(tmp_path: Path) -> None:
    fill(tmp_path, {"seed": 0})
    (tmp_path / "notes.txt").write_text("of the user")
    assert not fill(tmp_path, {"seed": 1}, result="other pairs", overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "of the user"
    assert json.loads((tmp_path / "mining.json").read_text())["seed"] == 1
    for name in ("pairs.parquet", "shard-00000.parquet"):
        content = (tmp_path / name).read_text()
        (tmp_path / name).write_text("edited by the user")
        before = contents(tmp_path)
        with pytest.raises(ValueError, match=rf"{name} has changed since it was written"):
            fill(tmp_path, {"seed": 2}, overwrite=True)
        assert contents(tmp_path) == before
        (tmp_path / name).write_text(content)


def test_changed_result_is_not_given_for_the_finished_one(tmp_path: Path) -> None:
    fill(tmp_path, {"seed": 0})
    (tmp_path / "pairs.parquet").write_text("edited by the user")
    with pytest.raises(ValueError, match=r"pairs\.parquet has changed since it was written"):
        fill(tmp_path, {"seed": 0})
    assert (tmp_path / "pairs.parquet").read_text() == "edited by the user"


def test_file_of_the_user_with_the_name_of_a_result_is_not_replaced(tmp_path: Path) -> None:
    """Catches a user's file that was put into the folder of an interrupted command."""
    (tmp_path / "mining.json").write_text(json.dumps({"kind": "mined pairs", "seed": 0}))
    (tmp_path / "pairs.parquet").write_text("of the user")
    with pytest.raises(ValueError, match=r"pairs\.parquet exists, and dpo-mm did not make it"):
        fill(tmp_path, {"seed": 0})


def test_foreign_shard_in_an_unfinished_folder_is_not_adopted_or_lost(tmp_path: Path) -> None:
    """Catches a shard without our checksum that is taken for ours, or replaced."""
    shard = tmp_path / "shard-00000.parquet"
    (tmp_path / "mining.json").write_text(json.dumps({"kind": "mined pairs", "seed": 0}))
    shard.write_text("of the user")
    assert missing_shards([shard]) == [0]
    assert not fill(tmp_path, {"seed": 0})
    (renamed,) = tmp_path.glob("shard-00000.parquet.*.old")
    assert renamed.read_text() == "of the user" and shard.read_text() == "shard"


def test_failed_command_leaves_no_folder_that_binds_the_next_one(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with pytest.raises(RuntimeError), output_folder(folder, MINING, {"seed": 0}):
        raise RuntimeError("failed before anything was made")
    assert not folder.exists()
    with pytest.raises(RuntimeError), output_folder(folder, MINING, {"seed": 0}):
        (folder / "shard-00000.parquet").write_text("made")
        raise RuntimeError("failed later")
    assert {path.name for path in folder.iterdir()} == {"mining.json", "shard-00000.parquet"}


@pytest.mark.parametrize("kind", ["link", "broken link", "FIFO", "file", "device"])
def test_output_that_is_no_folder_is_refused(kind: str, tmp_path: Path) -> None:
    path = Path("/dev/null") if kind == "device" else tmp_path / "out"
    (tmp_path / "real").mkdir()
    if "link" in kind:
        path.symlink_to(tmp_path / ("nothing" if "broken" in kind else "real"))
    elif kind == "FIFO":
        os.mkfifo(path)
    elif kind == "file":
        path.write_text("of the user")
    with pytest.raises(ValueError, match="is a link" if "link" in kind else "is not a folder"):
        fill(path, {"seed": 0}, overwrite=True)
    assert not any((tmp_path / "real").iterdir()) and not (tmp_path / "nothing").exists()


def test_output_in_an_input_is_refused(tmp_path: Path) -> None:
    """An input, a folder in an input, a link to it and a bundled model. The folder above an input is no input."""
    model = tmp_path / "models" / "model"
    model.mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "models")
    for folder in (model, model / "unet", tmp_path / "link" / "model"):
        with pytest.raises(ValueError, match=r"(is|lies in) an input of the command .*Choose another output_dir"):
            fill(folder, {"seed": 0}, inputs=[str(model)])
    bundled = str(resolve_asset("shapes-sd"))
    with pytest.raises(ValueError, match="is an input of the command"):
        fill(Path(bundled), {"seed": 0}, inputs=[None, "no/such/model", "shapes-sd"])
    assert not any(model.iterdir())
    fill(tmp_path / "models" / "out", {"seed": 0}, inputs=[str(model)])


# Locks and temporary files

HOLD = """
import sys, time
from pathlib import Path
from dpo_mm.files.outputs import OutputKind, output_folder
with output_folder(Path(sys.argv[1]), OutputKind("mining.json", "mined"), {"seed": 0}):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_second_process_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    """Catches two runs of one folder, both of which end well and one of which is lost; and a lock that a kill leaves."""
    folder = tmp_path / "out"
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout is not None and first.stdout.readline() == "locked\n"
        before = contents(folder)
        for settings in ({"seed": 0}, {"seed": 1}):
            with pytest.raises(ValueError, match=rf"out is in use by process {first.pid} on .*another output_dir"):
                fill(folder, settings)
        assert contents(folder) == before
    finally:
        first.kill()
        first.wait()
    assert not fill(folder, {"seed": 0}) and not (folder / LOCK).exists()


def test_other_processes_of_a_run_share_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with output_folder(tmp_path / "out", MINING, {"seed": 0}):
        monkeypatch.setenv("RANK", "1")
        with output_folder(tmp_path / "out", MINING, {"seed": 0}) as finished:
            assert not finished


def test_temporary_names_differ_between_processes_with_one_id(tmp_path: Path) -> None:
    """Containers on a shared disk have equal process ids. Catches a name with the process id alone."""
    path = tmp_path / "file"
    with atomic_write(path) as one, atomic_write(path) as other:
        assert one != other and TEMPORARY.match(one.name) and str(os.getpid()) not in one.name
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one" and [found.name for found in tmp_path.iterdir()] == ["file"]


def test_temporary_files_of_killed_processes_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder that several processes share, only those older than an hour. Files of others stay."""
    stale = temporary_path(tmp_path / "pairs.parquet")
    for path in (stale, tmp_path / ".notes.part", tmp_path / "x.0123456789abcdef.part"):
        path.write_text("half")
    (tmp_path / "mining.json").write_text(json.dumps({"kind": "mined pairs", "seed": 0}))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with output_folder(tmp_path, MINING, {"seed": 0}):
        assert stale.exists()
    os.utime(stale, (time.time() - 4000,) * 2)
    with output_folder(tmp_path, MINING, {"seed": 0}):
        assert not stale.exists() and (tmp_path / ".notes.part").exists()
        assert (tmp_path / "x.0123456789abcdef.part").exists()


def test_temporary_files_next_to_an_output_file_are_removed(tmp_path: Path) -> None:
    """Also that of its checksum. Mutation: only names that start with the name of the output."""
    output = tmp_path / "pairs.parquet"
    stale = [temporary_path(output), temporary_path(tmp_path / ".pairs.parquet.checksum")]
    other = temporary_path(tmp_path / ".others.parquet.checksum")
    for path in (*stale, other):
        path.write_text("half")
    with output_files([output]):
        assert not any(path.exists() for path in stale) and other.exists()


# Training


@pytest.fixture
def config(tiny_model: str, pairs: str, tmp_path: Path) -> TrainConfig:
    return TrainConfig(tiny_model, pairs, str(tmp_path / "out"), steps=2, batch_size=1, save_every=1, eval_fraction=0.0)


@pytest.fixture(scope="module")
def trained(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished run."""
    from dpo_mm.data.schema import make_image_rows
    from tests.conftest import rows

    folder = tmp_path_factory.mktemp("run")
    make_image_rows(rows(4)).to_parquet(str(folder / "pairs.parquet"))
    train(
        TrainConfig(
            tiny_model, str(folder / "pairs.parquet"), str(folder / "out"), steps=2, batch_size=1, save_every=1,
            eval_fraction=0.0, log_every=1,
        )
    )  # fmt: skip
    return folder / "out"


def settings_of(folder: Path, **changes: Any) -> TrainConfig:
    record = json.loads((folder / "dpo_mm.json").read_text())
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    return TrainConfig(**{name: value for name, value in record.items() if name in names} | changes)


@pytest.mark.parametrize("start", [train, dry_run])
def test_training_into_the_base_model_is_refused(start: Callable[..., Any], config: TrainConfig) -> None:
    before = contents(Path(config.model))
    with pytest.raises(ValueError, match="is an input of the command"):
        start(dataclasses.replace(config, output_dir=config.model))
    assert contents(Path(config.model)) == before


@pytest.mark.slow
def test_finished_run_is_printed_and_never_replaced(trained: Path) -> None:
    """Catches kohya files of one run next to diffusers files of another, and an older run's checkpoints removed."""
    before = contents(trained)
    result = train(settings_of(trained))
    assert len(result.history) and result.settings["pairs"] and result.beta == settings_of(trained).beta
    for changes in ({"seed": 1}, {"lora_format": "kohya"}, {"steps": 3}):
        with pytest.raises(ValueError, match="was trained with other settings"):
            train(settings_of(trained, **changes))
    assert contents(trained) == before


def test_setting_that_a_record_lacks_had_its_default(tmp_path: Path) -> None:
    """An earlier version wrote the record. It catches a run that cannot be finished after an update, and a changed setting."""
    settings = json.loads(json.dumps(as_dict(TrainConfig(model="m", pairs="p", output_dir="o"))))
    record = {name: value for name, value in settings.items() if name != "proportion_empty_prompts"}
    (tmp_path / TRAINING.record).write_text(json.dumps({"kind": RECORDS[TRAINING.record], **record}))
    assert differences(tmp_path, TRAINING, settings) == []
    assert differences(tmp_path, TRAINING, settings | {"proportion_empty_prompts": 0.2}) == [
        "proportion_empty_prompts: 0.0 -> 0.2"
    ]
    (tmp_path / TRAINING.record).unlink()
    assert differences(tmp_path, TRAINING, settings)


@pytest.mark.slow
def test_resume_without_a_checkpoint_is_refused(config: TrainConfig) -> None:
    """Catches a run that starts over although its checkpoints were to be continued."""
    with pytest.raises(ValueError, match="has no checkpoint to continue from"):
        train(dataclasses.replace(config, resume=True))
    assert not Path(config.output_dir).exists()


@pytest.mark.slow
def test_overwritten_run_has_no_files_of_the_one_before(config: TrainConfig) -> None:
    folder = Path(config.output_dir)
    train(dataclasses.replace(config, steps=3, lora_format="kohya"))
    (folder / "README.md").write_text("my notes")
    (folder / "checkpoint-2" / "notes.txt").write_text("of the user")
    train(dataclasses.replace(config, seed=1, save_every=0, overwrite=True))
    assert (folder / "README.md").read_text() == "my notes"
    assert [str(path.relative_to(folder)) for path in folder.glob("checkpoint-*/*")] == ["checkpoint-2/notes.txt"]
    assert len(list(folder.glob("*.safetensors"))) == 1 and (folder / COMPLETE).exists()


def test_retention_removes_only_checkpoints_of_training(tmp_path: Path) -> None:
    """Catches removal of a foreign checkpoint-1, and of files that were added or edited."""
    for step in (1, 2, 3, 4):
        (tmp_path / f"checkpoint-{step}" / "unet").mkdir(parents=True)
        for name in ("state.bin", "unet/weights.bin"):
            (tmp_path / f"checkpoint-{step}" / name).write_text("weights")
        if step > 1:
            write_checksums(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-best").mkdir()
    edited = tmp_path / "checkpoint-2" / "state.bin"
    edited.write_text("edited by the user")
    os.utime(edited, (time.time() + 5,) * 2)
    remove_old_checkpoints(tmp_path, limit=1)
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert {name for name in found if "checkpoint-4" not in name} == {
        "checkpoint-1/state.bin",
        "checkpoint-1/unet/weights.bin",
        "checkpoint-2/state.bin",
    }
    assert len(found) == 6 and (tmp_path / "checkpoint-best").exists()


def test_results_in_a_card_change_no_other_file_and_not_what_the_adapter_is(tmp_path: Path) -> None:
    """Catches a comparison that is refused the second time, because its own results have changed the adapter."""
    (tmp_path / "adapter_model.safetensors").write_text("weights")
    (tmp_path / "README.md").write_text(f"# adapter\n\n`m` {MADE}\n")
    write_checksums(tmp_path)
    before, files = model_files_hash(tmp_path), contents(tmp_path)
    add_results(tmp_path, [], verdict="better", command="one")
    assert model_files_hash(tmp_path) == before and what_is_wrong(tmp_path) is None
    changed = {name for name, checksum in contents(tmp_path).items() if checksum != files[name]}
    assert changed == {"README.md", COMPLETE} and changed_files(tmp_path, complete_files(tmp_path)) == []


@pytest.mark.parametrize("notes", ["above", "below"])
def test_results_in_a_card_leave_the_notes_of_the_user(notes: str, tmp_path: Path) -> None:
    """Catches a card that is cut at the heading of its results, and a card of others that is changed."""
    card, kept = tmp_path / "README.md", "\n## My notes\n\nUse it at half strength.\n\n| a | b |\n"
    card.write_text(f"# adapter\n\n`m` {MADE}\n" + (kept if notes == "above" else ""))
    add_results(tmp_path, [], verdict="better", command="one")
    card.write_text(card.read_text() + (kept if notes == "below" else ""))
    add_results(tmp_path, [], verdict="worse", command="two")
    text = card.read_text()
    assert text.count(kept.strip()) == 1 and "Verdict: worse" in text and "better" not in text
    card.write_text("# A card of somebody else\n")
    assert add_results(tmp_path, [], verdict="better", command="") is None
    assert card.read_text() == "# A card of somebody else\n"


# Comparisons


def test_finished_comparison_is_returned_and_never_replaced(
    tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a user's report.html, or that of another comparison, that a report replaces, and files in pictures/ that go."""
    (tmp_path / "prompts.txt").write_text("a red circle\na blue star\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.html").write_text("of the user")
    config = CompareConfig(
        tiny_model, str(tmp_path / "out"), prompts=str(tmp_path / "prompts.txt"), images_per_prompt=1,
        judges=(f"{HERE}:redness",), num_inference_steps=1, guidance_scale=1.0,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"did not make \(report\.html\)"):
        compare(config)
    (tmp_path / "out" / "report.html").unlink()
    first = compare(config)
    (tmp_path / "out" / "pictures" / "base" / "mine.txt").write_text("of the user")
    before = contents(tmp_path / "out")
    monkeypatch.setattr("dpo_mm.recipe._compare", lambda *_: pytest.fail("compared again"))
    assert compare(config) == first
    for changes in ({"seed": 1}, {"batch_size": 1}, {"guidance_scale": 2.0}):
        with pytest.raises(ValueError, match="was made with other settings"):
            compare(dataclasses.replace(config, **changes))
    assert contents(tmp_path / "out") == before
    monkeypatch.undo()
    compare(dataclasses.replace(config, save_images=False, overwrite=True))
    assert [path.name for path in (tmp_path / "out" / "pictures").rglob("*") if path.is_file()] == ["mine.txt"]


# Output files


def put(path: Path, text: str, *, overwrite: bool = False, inputs: tuple[str, ...] = ()) -> None:
    """Write an output file as a command does."""
    with output_files([path], inputs=inputs), write_file(path, overwrite=overwrite) as temporary:
        temporary.write_text(text)


def test_output_file_is_replaced_only_with_overwrite_and_unchanged(tmp_path: Path) -> None:
    """Catches a user's file, an edited result or the result of other settings that a command replaces."""
    path = tmp_path / "new" / "scores.parquet"
    put(path, "scores")
    times = path.stat().st_mtime_ns
    put(path, "scores")
    with pytest.raises(ValueError, match=r"has another result\. Choose another output, or replace it with --overwrite"):
        put(path, "others")
    assert path.read_text() == "scores" and path.stat().st_mtime_ns == times
    put(path, "others", overwrite=True)
    for text in ("edited by the user", None):
        (path.with_name(".scores.parquet.checksum").unlink() if text is None else path.write_text(text))
        before = contents(tmp_path)
        with pytest.raises(ValueError, match="dpo-mm did not make it or it has changed since"):
            put(path, "others", overwrite=True)
        assert contents(tmp_path) == before


@pytest.mark.parametrize("kind", ["link", "broken link", "FIFO", "folder"])
def test_output_file_that_is_no_file_is_refused(kind: str, tmp_path: Path) -> None:
    path, target = tmp_path / "scores.parquet", tmp_path / "real"
    target.write_text("of the user")
    if "link" in kind:
        path.symlink_to(tmp_path / "nothing" if "broken" in kind else target)
    elif kind == "FIFO":
        os.mkfifo(path)
    else:
        path.mkdir()
    with pytest.raises(ValueError, match="is a link, a folder or a device"):
        put(path, "scores", overwrite=True)
    assert target.read_text() == "of the user" and not (tmp_path / "nothing").exists()


def test_output_file_that_is_or_joins_an_input_is_refused(tmp_path: Path) -> None:
    """Catches labels written onto the votes, by name, by link or by hard link, and a file that joins a folder of rows."""
    votes, folder = tmp_path / "votes.sqlite", tmp_path / "rows"
    folder.mkdir()
    put(votes, "votes")
    os.link(votes, tmp_path / "again.sqlite")
    (tmp_path / ".again.sqlite.checksum").write_text((tmp_path / ".votes.sqlite.checksum").read_text())
    (folder / "part-0.parquet").write_text("rows")
    for output in (votes, tmp_path / "again.sqlite", folder / ".." / "votes.sqlite", folder / "part-1.parquet"):
        with pytest.raises(ValueError, match=r"(is|lies in) an input of the command .*Choose another output"):
            put(output, "labels", overwrite=True, inputs=(str(votes), str(folder)))
    put(folder / "report.html", "report", inputs=(str(votes), str(folder)))
    assert votes.read_text() == "votes" and not (folder / "part-1.parquet").exists()


def test_two_commands_do_not_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "scores.parquet"
    with output_files([path]), pytest.raises(ValueError, match=f"is in use by process {os.getpid()}"):
        put(path, "scores")
    put(path, "scores")
    assert {found.name for found in tmp_path.iterdir()} == {"scores.parquet", ".scores.parquet.checksum"}
