"""Upload an export to the hub, only if the user asks for it."""

from __future__ import annotations

from pathlib import Path

from dpo_mm.errors import one_line
from dpo_mm.files.checksums import COMPLETE
from dpo_mm.policies.adapter_sources import HUB_ID

NOT_UPLOADED = ["export.json", COMPLETE, ".*"]
"""Records of this machine."""


def check_name(name: str) -> None:
    """Check a hub name and that there is a token, before any work.

    Raises:
        ValueError: if the name has no namespace, or huggingface_hub has no token.
    """
    from huggingface_hub import get_token

    if not HUB_ID.fullmatch(name):
        raise ValueError(f"push_to_hub {name!r} is not a hub id. Expected NAMESPACE/NAME, for example me/my-adapter")
    if not get_token():
        raise ValueError("push_to_hub: there is no token for the hub. Run hf auth login, or set HF_TOKEN")


def push(folder: str | Path, name: str, *, public: bool = False) -> str:
    """Upload the files of an export, and return the address of the repository.

    Args:
        folder: a finished export.
        name: hub id of the repository, which is created if it does not exist.
        public: a new repository is public. An existing one is not changed.

    Raises:
        ValueError: if the name or the token is missing or refused, or the hub is not reachable.
    """
    from huggingface_hub import HfApi

    check_name(name)
    api = HfApi()
    try:
        address = api.create_repo(name, private=not public, exist_ok=True)
        api.upload_folder(
            repo_id=name,
            folder_path=folder,
            ignore_patterns=NOT_UPLOADED,
            commit_message="Upload files exported by dpo-mm",
        )
    except Exception as error:  # of the hub, or of the network library of its release
        reason = one_line(error.__cause__ if type(error) is RuntimeError and error.__cause__ else error)  # of one file
        raise ValueError(
            f"push_to_hub {name!r}: {reason}. The files are in {folder}. Run the same command again"
        ) from error
    return str(address)
