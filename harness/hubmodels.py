"""Models of the Hub: which commit a revision is, whether its files will do, and their download. No torch.

Grammar: ORG/NAME[@REVISION]. Where the Hub does not answer, a copy in its cache serves.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path

from harness import weightfiles
from harness.errors import BadSpecification, HarnessError, MissingAsset

GRAMMAR = re.compile(r"(?P<repository>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[^\s@]+))?")
COMMIT = re.compile(r"[0-9a-f]{40}")
TIMEOUT_SECONDS = 5.0  # to find out whether the Hub answers at all
KEPT_SUFFIXES = (".json", ".model", ".txt", ".jinja")  # of a repository's files beside the weights: configs, tokenizers


@dataclass(frozen=True)
class Snapshot:
    """One commit of a Hub model: in the cache (`directory`), or to be had (`names` of the files to fetch)."""

    repository: str
    commit: str
    directory: Path | None = None
    names: tuple[str, ...] = ()


def parse(argument: str) -> tuple[str, str]:
    """(repository, revision) of `ORG/NAME[@REVISION]`; BadSpecification shows the grammar."""
    match = GRAMMAR.fullmatch(argument)
    if not match:
        raise BadSpecification(f"'hub:{argument}' does not read as hub:ORG/NAME[@REVISION]")
    return match["repository"], match["revision"] or "main"


def _cached(repository: str, revision: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def _transport(error: Exception) -> bool:
    """Whether the network is to blame: the client's errors are no OSError, and its module's name has changed."""
    return isinstance(error, OSError) or type(error).__module__.startswith(("httpx", "httpcore", "requests"))


@functools.cache
def _ask(repository: str, revision: str) -> Snapshot | str:
    """What the Hub says of a revision, or, as text, why it cannot be asked; once a process."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name = f"'{repository}' at revision '{revision}'"
    try:
        info = HfApi().model_info(repository, revision=revision, timeout=TIMEOUT_SECONDS)
    except GatedRepoError as error:
        raise MissingAsset(f"the Hub model {name} is gated: accept its terms and run 'hf auth login'") from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise MissingAsset(f"the Hub shows no model {name}: check the name, or log in if it is private") from error
    except OfflineModeIsEnabled:
        return "HF_HUB_OFFLINE is set"
    except Exception as error:
        if not _transport(error):
            raise
        return f"the Hub does not answer ({type(error).__name__})"
    names = tuple(sibling.rfilename for sibling in info.siblings or () if "/" not in sibling.rfilename)
    return Snapshot(repository, str(info.sha), names=names)


def find(argument: str, *, allow_pickle: bool, trust_remote_code: bool) -> Snapshot:
    """Resolve `ORG/NAME[@REVISION]` to a commit whose files will do.

    A commit that lies whole in the cache needs no network. Raises MissingAsset, within seconds, where there is
    neither a network nor a cached copy.
    """
    repository, revision = parse(argument)
    model = f"model 'hub:{argument}'"
    answer = "" if COMMIT.fullmatch(revision) and _cached(repository, revision) else _ask(repository, revision)
    if isinstance(answer, str):
        directory = _cached(repository, revision)
        if directory is None:
            fix = "unset it" if "OFFLINE" in answer else "connect"
            raise MissingAsset(f"{model} is not cached and {answer}: {fix}, or name a local copy as path:DIR")
        try:
            weightfiles.check_folder(directory, model, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
            return Snapshot(repository, directory.name, directory)
        except HarnessError:
            if answer:  # nobody to ask for the rest
                raise
            answer = _ask(repository, revision)
            if isinstance(answer, str):
                raise
    weights = weightfiles.check_names(answer.names, model, allow_pickle=allow_pickle)
    config = _fetch_config(answer, model)
    weightfiles.check_config(config, model, trust_remote_code=trust_remote_code)
    suffixes = (*KEPT_SUFFIXES, ".py") if trust_remote_code else KEPT_SUFFIXES
    kept = {name for name in answer.names if name.endswith(suffixes) and not name.endswith(".index.json")}
    return Snapshot(repository, answer.commit, names=tuple(sorted(kept.union(weights))))


def _fetch_config(snapshot: Snapshot, model: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(snapshot.repository, "config.json", revision=snapshot.commit))
    except Exception as error:
        if not _transport(error):
            raise
        raise MissingAsset(f"{model}: its config.json cannot be fetched ({type(error).__name__}): try again") from error


def download(snapshot: Snapshot) -> Path:
    """The snapshot's folder, fetched where it is not in the cache; MissingAsset where the transfer fails."""
    from huggingface_hub import snapshot_download

    if snapshot.directory is not None:
        return snapshot.directory
    try:
        return Path(
            snapshot_download(snapshot.repository, revision=snapshot.commit, allow_patterns=list(snapshot.names))
        )
    except Exception as error:
        if not _transport(error):
            raise
        raise MissingAsset(
            f"the download of '{snapshot.repository}' broke off ({type(error).__name__}): run again, it resumes"
        ) from error
