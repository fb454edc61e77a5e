"""What a user can mend, what not, and whether work had begun before it was found.

An error to mend is one line and exit code 2. Before work has begun that goes for what a library says of bad input or a
missing file as well, and nothing was done; after that the line says that what was saved stays, and whatever is not a
UserError is a fault of the program: it keeps its traceback and has another code.
"""

from __future__ import annotations

MEND, LOST, FAULT = 2, 69, 70  # exit codes: usage, and sysexits.h EX_UNAVAILABLE, EX_SOFTWARE
SET_UP = (ValueError, OSError, RuntimeError, ImportError)


class UserError(Exception):
    """The message names the value, the place and the fix. `code`: what the process ends with."""

    code = MEND


class InputError(UserError, ValueError):
    """A value, a file or a folder that a user gave does not fit."""


_began = False


def begin(working: bool = True) -> None:
    """To be called when the first lasting thing is about to be done; with False, when a command starts."""
    global _began
    _began = working


def exit_code(error: Exception) -> int:
    """FAULT for an error with its traceback; another code for one to be shown as one line, MEND as a rule."""
    if isinstance(error, UserError):
        return error.code
    return MEND if not _began and isinstance(error, SET_UP) else FAULT


def stopped_line(name: str) -> str:
    """What to print when a signal of this name ended a command."""
    return f"pixelgen: stopped by {name}" + ("; what was done so far is kept" if _began else " before work had begun")


def line(error: Exception) -> str:
    """What to print of it, on one line."""
    begun = "; work had begun, and what was saved stays" if _began else ""
    return f"pixelgen: error: {printable(str(error))}{begun}"


def printable(text: str) -> str:
    """Text in which what a terminal would act on, or cannot show, is written as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
