"""Importing the large libraries: no garbage is collected in the meantime, and none stays in memory."""

import builtins
import gc
from typing import Any

import pytest

from dpo_mm.cli.terminal import suppress_library_output


@pytest.mark.parametrize("enabled", [True, False])
def test_no_garbage_is_collected_while_training_is_imported(enabled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    collecting = {}
    import_module = builtins.__import__

    def record(name: str, *arguments: Any, **keywords: Any) -> Any:
        collecting[name] = gc.isenabled()
        return import_module(name, *arguments, **keywords)

    was_enabled = gc.isenabled()
    try:
        gc.enable() if enabled else gc.disable()
        monkeypatch.setattr(builtins, "__import__", record)
        with suppress_library_output(training=True):
            assert gc.isenabled() == enabled
    finally:
        gc.enable() if was_enabled else gc.disable()
    assert {name: collecting[name] for name in ("datasets", "transformers", "dpo_mm.training.run")} == {
        "datasets": False,
        "transformers": False,
        "dpo_mm.training.run": False,
    }


def test_garbage_of_earlier_work_can_still_be_collected() -> None:
    with suppress_library_output(training=True):
        pass
    frozen = gc.get_freeze_count()
    with suppress_library_output(training=True):
        pass
    assert gc.get_freeze_count() <= frozen
