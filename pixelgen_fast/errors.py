"""What a user can mend, and whether anything was done before it was found.

    refused     before the first step, image or file: nothing was done, and the same command may be given again
    failed      after work had begun; what was saved before stays

An error of this kind is shown as one line. Before work has begun the same goes for what a library says of bad input or
a missing file; after that, whatever is not a UserError is a fault of the program, and keeps its traceback.
"""

from __future__ import annotations

REFUSED, FAILED, FAULT = 2, 3, 70  # exit codes: usage, failed in the middle, sysexits.h EX_SOFTWARE
SET_UP = (ValueError, OSError, RuntimeError, ImportError)


class UserError(Exception):
    """The message names the value, the place and the fix."""


class InputError(UserError, ValueError):
    """A value, a file or a folder that a user gave does not fit."""


_began = False


def begin(working: bool = True) -> None:
    """To be called when the first lasting thing is about to be done; with False, when a command starts."""
    global _began
    _began = working


def exit_code(error: Exception) -> int:
    """The exit code that an error deserves: REFUSED or FAILED for one line, FAULT for a traceback."""
    if isinstance(error, UserError):
        return FAILED if _began else REFUSED
    return FAULT if _began or not isinstance(error, SET_UP) else REFUSED
