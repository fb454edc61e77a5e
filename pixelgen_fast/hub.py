"""The Hugging Face Hub: names that mean a repository there, and folders put there. The only importer of its library.

    hub:OWNER/NAME[@REVISION]           a repository of models, as a folder       REVISION: branch, tag or commit
    hub:OWNER/NAME[@REVISION]/FILE      one of its files

A repository is kept in the library's cache (HF_HOME) and read from there where the hub is away. The token is the
library's own: `hf auth login`, or HF_TOKEN. HF_ENDPOINT names another hub, HF_HUB_OFFLINE=1 asks none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pixelgen_fast.errors import InputError

if TYPE_CHECKING:
    from types import ModuleType

PREFIX = "hub:"
_PART = r"[A-Za-z0-9][\w.-]*"
_NAME = re.compile(rf"hub:(?P<repo>{_PART}/{_PART})(@(?P<revision>[\w.-]+))?(/(?P<file>.+))?")
LOGIN = "log in with `hf auth login`, or set HF_TOKEN"
INSTALL = "pip install 'pixelgen_fast[hub]'"


class HubError(InputError):
    """The hub has not what was asked for, or refuses it; the message says which and what to do."""


def local(name: str | Path) -> Path:
    """The folder or file that a name means: one on the hub is downloaded, any other name is a path already.

    Raises HubError for what is not there, not allowed, or cannot be reached and is not in the cache.
    """
    if not is_hub_name(name):
        return Path(name)
    found = _NAME.fullmatch(str(name))
    if found is None:
        raise HubError(f"{name}: is no name on the hub; write hub:OWNER/NAME, hub:OWNER/NAME@REVISION or either/FILE")
    hub, repo, revision, file = _library(), *found.group("repo", "revision", "file")
    with _one_line(hub, repo, revision, str(name)):
        if file:
            return Path(hub.hf_hub_download(repo, file, revision=revision))
        return Path(hub.snapshot_download(repo, revision=revision))


def is_hub_name(name: str | Path) -> bool:
    """Whether a name means something on the hub."""
    return str(name).startswith(PREFIX)


def check_repo(repo: str) -> str:
    """The name of a repository without hub: in front. Raises HubError for what names none."""
    plain = repo.removeprefix(PREFIX)
    if not re.fullmatch(f"{_PART}/{_PART}", plain):
        raise HubError(f"{repo}: is no repository; write OWNER/NAME, where OWNER is you or an organisation")
    return plain


def upload(folder: Path, repo: str, *, private: bool | None, message: str, replacing: list[str]) -> str:
    """Put a folder into a repository, which is made where there is none; returns the address of the commit.

    private: of a repository that is made; None: as its owner has set it. replacing: patterns of files of an earlier
    push, which go where the folder has them no more. Raises HubError for no token or no permission.
    """
    hub = _library()
    api = hub.HfApi()
    with _one_line(hub, repo, None, repo):
        api.create_repo(repo, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message=message, delete_patterns=replacing or None
        )
    return done.commit_url


def _library() -> ModuleType:
    try:
        import huggingface_hub
    except ImportError as error:
        raise HubError(f"names on the hub need huggingface_hub ({error}): {INSTALL}") from error
    return huggingface_hub


@contextmanager
def _one_line(hub: ModuleType, repo: str, revision: str | None, name: str) -> Iterator[None]:
    """Errors of the library, of the system and of what carries the requests, each as a line that says what to do."""
    errors = hub.errors
    try:
        yield
    except (errors.HFValidationError, errors.EntryNotFoundError, OSError, *errors.HfHubHTTPError.__bases__) as error:
        raise HubError(f"{name}: {_said(hub, error, f'{hub.constants.ENDPOINT}/{repo}', revision)}") from error


def _said(hub: ModuleType, error: Exception, page: str, revision: str | None) -> str:
    """What an error of the library means."""
    if isinstance(error.__cause__, hub.errors.HfHubHTTPError):  # why it looked for its cache at all
        error = error.__cause__
    e, away = hub.errors, "HF_HUB_OFFLINE is set" if hub.constants.HF_HUB_OFFLINE else f"{page} is out of reach"
    if isinstance(error, e.GatedRepoError):
        return f"its owner asks you to accept terms first, at {page}; {LOGIN}"
    if isinstance(error, e.RepositoryNotFoundError):
        return f"there is no such repository, or it is private and not yours to read: {LOGIN}"
    if isinstance(error, e.RevisionNotFoundError):
        return f"the repository has no branch, tag or commit {revision}"
    if isinstance(error, e.LocalEntryNotFoundError):
        return f"{away}, and the cache does not hold it; download it where there is a network"
    if isinstance(error, e.EntryNotFoundError):
        return f"the repository has no such file; see {page}"
    if isinstance(error, e.HFValidationError):
        return f"is no name on the hub: {_first_line(error)}"
    if isinstance(error, e.HfHubHTTPError):
        return _refusal(error)
    return f"{away}: {_first_line(error)}"


def _refusal(error: Exception) -> str:
    """What the hub's answer says, by its status."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return f"the hub wants to know who you are: {LOGIN}"
    if status == 403:
        return f"the hub does not let you do this ({_first_line(error)}): use a token that may write there"
    if status == 429:
        return "the hub answers that there were too many requests: wait some minutes and give the same command again"
    return f"the hub answered {status}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
