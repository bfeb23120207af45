"""Names that become names of files or folders: what they may be, in one place."""

import re

from preprocessing.errors import DataError

_LONGEST = 128
_PLAIN = re.compile(rf"[A-Za-z0-9_][A-Za-z0-9._-]{{0,{_LONGEST - 1}}}")
_NOT_IN_A_PART = re.compile(r"[/\\\x00-\x1f\x7f]")


def plain_name(text: str) -> str:
    """Turn any text into a name that a slide may have."""
    return (re.sub(r"[^A-Za-z0-9._-]", "_", text).lstrip(".-") or "slide")[:_LONGEST]


def require_plain_name(what: str, name: str) -> str:
    """Return a name that names a file on any system: of a slide, or of a feature set.

    Args:
        what: what is named, for the message.
        name: as it was given, or read from a file.

    Raises:
        DataError: empty, over 128 characters, or with others than letters, digits, ".", "_", "-"
            (so without separators, NUL and "..").
    """
    if not _PLAIN.fullmatch(name):
        raise DataError(
            f"{what} {_shown(name)} is not a plain name; use letters, digits, '.', '_', '-' only "
            f"(at most {_LONGEST}, not beginning with '.' or '-')"
        )
    return name


def folder_part(text: str) -> str:
    """Turn a text that is not empty into one that `require_folder_part` accepts."""
    return _NOT_IN_A_PART.sub("_", text).lstrip(".")[:_LONGEST].strip() or "_"


def require_folder_part(what: str, name: str) -> str:
    r"""Return a free text that becomes part of a folder's name: a patient, a fold, a variant.

    Args:
        what: what is named, for the message.
        name: as it was given, or read from a file; blanks and any script are allowed.

    Raises:
        DataError: empty, over 128 characters, begins with ".", or holds a separator ("/", "\") or
            a control character.
    """
    if not name or len(name) > _LONGEST or name.startswith(".") or _NOT_IN_A_PART.search(name):
        raise DataError(
            f"{what} {_shown(name)} cannot name a folder; use 1 to {_LONGEST} characters, no '/', "
            "'\\' or control characters, not beginning with '.'"
        )
    return name


def _shown(name: str) -> str:
    return repr(name) if len(name) <= _LONGEST else f"{name[:40]!r}... ({len(name)} characters)"
