"""Errors about arguments that several commands share."""

from __future__ import annotations

import dataclasses
import re
from os import PathLike, fspath
from typing import Any

# pathlib makes s3:/bucket of s3://bucket. One letter is a drive of Windows.
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+")


def check_local(where: str, name: str, path: str | PathLike[str]) -> None:
    """An error in the name of `where` about a path `name` that is the address of something elsewhere."""
    text = fspath(path)
    if found := _SCHEME.match(text):
        raise ValueError(
            f"{where}: {name} is {found[1]}://{text[found.end() :]}, accepted is a path in this machine's "
            "file system: copy the files, or mount the storage"
        )


def check_paths(where: str, config: Any) -> None:
    """`check_local` of all options of a configuration dataclass, as the command line names them."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            check_paths(where, value)
        for one in value if isinstance(value, tuple) else (value,):
            if isinstance(one, str | PathLike):
                check_local(where, f"--{field.name.replace('_', '-')}", one)
