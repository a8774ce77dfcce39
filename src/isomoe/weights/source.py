"""Where a checkpoint lies: a folder, a hub id, a lone config.json, or the bundled one."""

import re
from importlib import resources
from pathlib import Path

from isomoe.errors import CheckpointError

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")

BUNDLED = "arith-moe"
"""The checkpoint that ships with the package; the default of `--model-path`."""


def bundled_checkpoint() -> Path:
    """The folder of the checkpoint that ships with the package."""
    return Path(str(resources.files("isomoe"))) / "checkpoints" / BUNDLED


def resolve(model_path: str | None, weights: bool = True) -> Path:
    """The folder of a checkpoint, fetched from the hub if `model_path` is a hub id.

    Args:
        model_path: a folder, a hub id such as `Qwen/Qwen3-30B-A3B`, or None for the bundled one.
        weights: False fetches and demands config.json only; a lone config.json will do then.

    Raises:
        CheckpointError: if there is nothing of the sort.
    """
    if model_path is None:
        return bundled_checkpoint()
    path = Path(model_path).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise CheckpointError(f"--model-path {model_path}: the folder has no config.json")
        return path
    if path.is_file():
        if weights:
            raise CheckpointError(f"--model-path {model_path}: a folder is needed, this is a file")
        return path
    if not _HUB_ID.fullmatch(model_path):
        what = "folder" if weights else "folder or file"
        raise CheckpointError(f"--model-path {model_path}: no such {what}")
    return _from_hub(model_path, weights)


def _from_hub(repo_id: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.jinja", "*.txt", "*.model"] + (["*.safetensors"] if weights else [])
    try:
        return Path(snapshot_download(repo_id, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"--model-path {repo_id}: no such folder, and not to be had from the hub ({reason})"
        ) from None
