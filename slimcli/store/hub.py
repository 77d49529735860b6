"""Model folders on the Hugging Face hub: fetched file by file, each checked before the next, and pushed whole.

Tokens are the hub's own affair: they come from its login or its environment variables, and no message holds one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from slimcli.documents import visible
from slimcli.errors import SlimError, parameter
from slimcli.hub import cached_where_unreached, is_offline, why_not_fetched
from slimcli.store.run_folder import CONFIG, SLIM_WEIGHTS, WEIGHTS
from slimcli.store.schema import LARGEST_JSON, check_config, read_json

CARD = "README.md"
#: the files of a model folder on the hub
FILES = (CONFIG, WEIGHTS, SLIM_WEIGHTS, CARD)
_NAME = re.compile(r"hf[-_]hub:(?!timm/)([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def hub_folder(text: str) -> Path | None:
    """The folder in the hub's cache of `hf-hub:owner/name[@revision]`; None where that is no such name.

    Nothing else than a model folder is fetched, and its weights only once its config.json is known to be sound.

    Raises:
        SlimError: where it cannot be had, or is not slim's.
    """
    found = find_on_hub(text)
    if found is None and text.startswith(("hf-hub:", "hf_hub:")):
        where = visible(text)
        raise SlimError(
            f"{where}: expected a model folder made by slim: hf-hub:owner/name or hf-hub:owner/name@revision"
        )
    return found


def find_on_hub(text: str) -> Path | None:
    """As `hub_folder`, but None for what is on the hub and not slim's as well."""
    named = _NAME.fullmatch(text)
    if named is None:
        return None
    with cached_where_unreached():
        return _model_folder(text, named[1], named[2])


def _model_folder(text: str, repository: str, revision: str | None) -> Path | None:
    """The folder in the cache with all files of a model; None where the repository is not slim's."""
    from slimcli.store.model_folder import check_architecture, open_folder

    path = _fetch(text, repository, CONFIG, revision, LARGEST_JSON)
    config = read_json(path)
    if not isinstance(config, dict) or config.get("format") != "slim":
        return None
    # the weights are those of the same commit, whatever is pushed meanwhile
    folder, commit = path.parent, path.parent.name
    config = check_config(path, config)
    size = _size(text, repository, WEIGHTS, commit)
    check_architecture(folder, config, lambda _model: None, size if size is not None else 2**60)
    _fetch(text, repository, WEIGHTS, commit, size)
    _fetch(text, repository, SLIM_WEIGHTS, commit, size, optional=True)
    open_folder(folder)
    return folder


def _fetch(
    text: str, repository: str, name: str, revision: str | None, most: int | None, optional: bool = False
) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    size = _size(text, repository, name, revision)
    if size is not None and most is not None and size > most:
        raise SlimError(f"{text}: {name} has {size} bytes, expected at most {most}: nothing more is fetched")
    with _told(text):
        try:
            return Path(hf_hub_download(repository, name, revision=revision))
        except EntryNotFoundError as error:
            if optional:
                return Path(name)
            if not _is_remote(error):
                raise
            raise SlimError(f"{text}: has no {name}: it is no model folder of slim's") from None


def _is_remote(error: Exception) -> bool:
    """Whether the hub said that a file is not there; without the network the cache says the same of itself."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    return not isinstance(error, LocalEntryNotFoundError)


def _size(text: str, repository: str, name: str, revision: str | None) -> int | None:
    """Bytes of a file on the hub; None where the hub is not reached or does not have it."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    if is_offline():
        return None
    try:
        return get_hf_file_metadata(hf_hub_url(repository, name, revision=revision)).size
    except Exception:  # who needs the file finds out what is wrong with it
        return None


def push_folder(folder: Path, repository: str, private: bool = False, revision: str | None = None) -> str:
    """Make the files of a model folder the content of a repository on the hub, in one commit; return its address.

    Raises:
        SlimError: where the name is none, the repository holds something else, or the hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    check_repository(repository)
    api = HfApi(library_name="slimcli")
    with _told(repository):
        there: set[str] = set()
        try:
            info = api.model_info(repository)
            if private and not info.private:
                raise SlimError(
                    f"{repository}: is public already: leave {parameter('private')} out, or choose another name"
                )
            there = {file.rfilename for file in info.siblings or ()}
        except RepositoryNotFoundError:
            api.create_repo(repository, private=private, repo_type="model")
        else:
            _refuse_foreign(repository, there)
        if revision is not None:
            try:
                there = {file.rfilename for file in api.model_info(repository, revision=revision).siblings or ()}
            except RevisionNotFoundError:
                api.create_branch(repository, branch=revision, exist_ok=True)
            else:
                _refuse_foreign(repository, there, revision)
        mine = [name for name in FILES if (folder / name).is_file()]
        changes: list[Any] = [CommitOperationAdd(name, folder / name) for name in mine]
        changes += [CommitOperationDelete(name) for name in FILES if name in there and name not in mine]
        done = api.create_commit(repository, changes, commit_message="A model folder of slim's", revision=revision)
        return str(done.commit_url)


def check_repository(name: str) -> None:
    """`SlimError` unless `name` is `owner/name`."""
    if not _REPOSITORY.fullmatch(name) or len(name) > 96 or ".." in name or "--" in name:
        raise SlimError(f"{visible(name)}: expected the name of a repository on the hub, owner/name")


def _refuse_foreign(repository: str, there: Sequence[str] | set[str], revision: str | None = None) -> None:
    """`SlimError` where a repository holds anything but a model folder of slim's."""
    content = {name for name in there if name not in (".gitattributes", CARD)}
    if not content:
        return
    if CONFIG in content:
        config = read_json(_fetch(repository, repository, CONFIG, revision, LARGEST_JSON))
        if isinstance(config, dict) and config.get("format") == "slim":
            return
    held = ", ".join(sorted(map(visible, content))[:3])
    raise SlimError(f"{repository}: holds something else than a model of slim's ({held}): choose another name")


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Errors of the hub and the network as one line, without a token and without the traceback that may hold one."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except SlimError:
        raise
    except GatedRepoError:
        reason = "asks for an agreement first: give it on its page, and log in (`hf auth login`)"
    except RepositoryNotFoundError:
        reason = "no such repository, or a private one: log in (`hf auth login`) or set HF_TOKEN"
    except RevisionNotFoundError:
        reason = "has no such revision"
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        reason = f"is not in the cache, and {why_not_fetched()}"
    except HFValidationError as error:
        reason = _plain(error)
    except HfHubHTTPError as error:
        code = getattr(error.response, "status_code", None)
        denied = ": log in (`hf auth login`) or set HF_TOKEN to a token that may write" if code in (401, 403) else ""
        reason = f"the hub refuses{denied} ({code})" if code in (401, 403) else f"the hub answers: {_plain(error)}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"the hub's answer cannot be used: {_plain(error)}"
    except Exception as error:
        if type(error).__module__.split(".")[0] not in ("httpx", "httpx2", "httpcore", "requests", "urllib3"):
            raise
        reason = f"the hub cannot be reached ({_plain(error)}): connect to the network"
    else:
        return
    raise SlimError(f"{visible(what)}: {reason}") from None


def _plain(error: Exception) -> str:
    """What an error says, in a line, without anything that looks like a token."""
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    for token in filter(None, (os.environ.get("HF_TOKEN"), os.environ.get("HUGGING_FACE_HUB_TOKEN"))):
        line = line.replace(token, "***")
    return visible(re.sub(r"hf_[A-Za-z0-9]{8,}", "***", line))[:300]
