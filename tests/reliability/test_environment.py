"""Users without a home directory, with folders that cannot be written, and one process of several."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

import pytest

from dpo_mm.cli.terminal import run_as_command
from dpo_mm.files import cache_folder as module
from dpo_mm.files.cache_folder import cache_folder, create_cache, set_hub_cache
from dpo_mm.files.checksums import all_intact, write_with_checksum
from dpo_mm.files.outputs import OutputKind, output_folder


@pytest.fixture(autouse=True)
def no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user whose home is a file, so that nothing can be written in it, whoever runs the test."""
    for name in ("DPO_MM_CACHE", "XDG_CACHE_HOME", "HF_HOME"):
        monkeypatch.setenv(name, "")  # so that what a test sets is removed after it
        monkeypatch.delenv(name)
    (tmp_path / "home").write_text("", encoding="utf-8")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    module._default.cache_clear()


@pytest.mark.parametrize("missing", [False, True])
def test_user_without_a_home_directory_has_a_private_cache(
    missing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mutations that it catches: Could not determine home directory, and a cache that other users can write."""
    if missing:

        def home() -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(module.Path, "home", home)
    folder = cache_folder()
    assert folder.parent == tmp_path / "tmp" and stat.S_IMODE(folder.stat().st_mode) == 0o700
    set_hub_cache()
    assert os.environ["HF_HOME"] == str(folder / "huggingface")


def test_cache_of_another_user_is_not_used(tmp_path: Path) -> None:
    """Mutation that it catches: a link that another user has put in the temporary folder is followed."""
    (tmp_path / "other").mkdir()
    (tmp_path / "tmp" / f"dpo-mm-{module._user()}").symlink_to(tmp_path / "other")
    assert cache_folder().parent == tmp_path / "tmp" and not cache_folder().is_symlink()


def test_home_that_can_be_written_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "real"))
    assert cache_folder() == tmp_path / "real" / ".cache" / "dpo-mm"
    set_hub_cache()
    assert "HF_HOME" not in os.environ


def test_folders_that_cannot_be_written_are_named_with_the_fix(tmp_path: Path) -> None:
    """Mutation that it catches: [Errno 20] Not a directory, without what to change."""
    below = tmp_path / "home" / "a" / "b"
    with pytest.raises(
        OSError, match=rf"^could not write {below}: .*\. Set DPO_MM_CACHE to a folder that you can write$"
    ):
        create_cache(below)
    kind = OutputKind("mining.json", done="mined")
    with (
        pytest.raises(OSError, match=rf"^could not write {below}: .*choose another folder"),
        output_folder(below, kind, {}),
    ):
        pass


def test_missing_temporary_folder_is_one_line_with_the_fix(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), run_as_command():
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")
    assert capsys.readouterr().err.endswith("found in ['/tmp']. Set TMPDIR to a folder that you can write\n")


def test_process_that_waits_for_others_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Mutation that it catches: RANK=1 WORLD_SIZE=2 alone ends without a word, as if all was done."""
    paths = [tmp_path / f"shard-0000{number}.parquet" for number in range(4)]
    for path in paths[1::2]:
        with write_with_checksum(path) as temporary:
            temporary.write_bytes(b"1")
    with caplog.at_level(logging.WARNING):
        assert not all_intact(paths, tmp_path / "pairs.parquet")
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith(
        f"pairs.parquet is not written yet: 2 of 4 shards are missing in {tmp_path} (shard-00000.parquet, "
    )
    assert message.endswith("run the same command again without RANK and WORLD_SIZE")
    caplog.clear()
    assert all_intact(paths[1::2], tmp_path / "pairs.parquet") and not caplog.records
