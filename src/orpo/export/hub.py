"""An exported folder on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from orpo.errors import ConfigError, RunError, first_line, raised_as


def check_push(repository: str) -> None:
    """Refuse before any work is done what the hub would refuse after it.

    Raises:
        ConfigError: The name cannot be one, or nobody is logged in.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ConfigError(f"--push {repository}: {first_line(error)}") from None
    if repository.count("/") != 1:
        raise ConfigError(f"--push {repository}: name the owner too, owner/name")
    if get_token() is None:
        raise ConfigError("--push: nobody is logged in to the hub; run `hf auth login`, or set HF_TOKEN")


def push(folder: Path, repository: str, *, private: bool) -> str:
    """Upload all files of a folder; returns the address.

    Raises:
        RunError: The hub cannot be reached, or refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with raised_as(RunError, f"{repository}: not uploaded", f"the export is in {folder}"):
        api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Export with orpo")
    return f"https://huggingface.co/{repository}"
