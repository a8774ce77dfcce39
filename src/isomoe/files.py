"""Files that are whole, or not there."""

import os
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile

from isomoe.errors import ConfigError


def make_folder(path: Path) -> None:
    """Makes a folder, if there is none, and makes sure that files can be written in it.

    Raises:
        ConfigError: if they cannot.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ConfigError(f"{path}: nothing can be written there ({error})") from None


def write_atomically(path: Path, text: str) -> None:
    """Writes a text as UTF-8; what UTF-8 cannot hold is escaped. Until it is whole, an older file
    of that name stays.

    Raises:
        ConfigError: if it cannot be written.
    """
    partly = path.with_name(f"{path.name}.part")
    try:
        partly.write_text(text, encoding="utf-8", errors="backslashreplace")
        os.replace(partly, path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error})") from None
    finally:
        with suppress(OSError):
            partly.unlink()
