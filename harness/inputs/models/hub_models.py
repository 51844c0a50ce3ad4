"""Models of the Hub: which commit a revision is, whether its files will do, and their download. No torch.

Grammar: ORG/NAME[@REVISION]. Where the Hub does not answer, a copy in its cache serves.
"""

from __future__ import annotations

import contextlib
import functools
import re
from dataclasses import dataclass, replace
from pathlib import Path

from harness.core.errors import BadSpecification, HarnessError, MissingAsset
from harness.core.files import replace_text
from harness.inputs.hub_answers import COMMIT, TIMEOUT_SECONDS, refusal, silence, transport
from harness.inputs.models import folder as weightfiles

GRAMMAR = re.compile(r"(?P<repository>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[^\s@]+))?")
KEPT_SUFFIXES = (".json", ".model", ".txt", ".jinja")  # of a repository's files beside the weights: configs, tokenizers


@dataclass(frozen=True)
class Snapshot:
    """One commit of a Hub model: in the cache (`directory`), or to be had (`names` of the files to fetch)."""

    repository: str
    commit: str
    directory: Path | None = None
    names: tuple[str, ...] = ()
    revision: str = ""  # the branch or tag that was asked for and led to the commit


def parse(argument: str) -> tuple[str, str]:
    """(repository, revision) of `ORG/NAME[@REVISION]`; BadSpecification shows the grammar."""
    match = GRAMMAR.fullmatch(argument)
    if not match:
        raise BadSpecification(f"'hub:{argument}' does not read as hub:ORG/NAME[@REVISION]")
    return match["repository"], match["revision"] or "main"


def _cached(repository: str, revision: str, suffixes: tuple[str, ...]) -> Path | None:
    """The folder of a revision in the cache, unless it lacks files of these suffixes that the Hub has listed."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    patterns = [f"*{suffix}" for suffix in suffixes]
    try:  # folders below hold other formats, and shards of other weights have indices: neither is ever fetched
        return Path(
            snapshot_download(
                repository,
                revision=revision,
                local_files_only=True,
                allow_patterns=patterns,
                ignore_patterns=["*/*", "*.index.json"],
            )
        )
    except LocalEntryNotFoundError:
        return None


@functools.cache
def _ask(repository: str, revision: str) -> Snapshot | str:
    """What the Hub says of a revision, or, as text, why it cannot be asked; once a process."""
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(repository, revision=revision, timeout=TIMEOUT_SECONDS)
    except Exception as error:
        if told := refusal(error, f"model '{repository}' at revision '{revision}'"):
            raise MissingAsset(told) from error
        if told := silence(error):
            return told
        raise
    names = tuple(sibling.rfilename for sibling in info.siblings or () if "/" not in sibling.rfilename)
    commit = str(info.sha)
    return Snapshot(repository, commit, names=names, revision="" if revision == commit else revision)


def find(argument: str, *, allow_pickle: bool, trust_remote_code: bool) -> Snapshot:
    """Resolve `ORG/NAME[@REVISION]` to a commit whose files will do.

    A commit that lies whole in the cache needs no network. Raises MissingAsset, within seconds, where there is
    neither a network nor a cached copy.
    """
    repository, revision = parse(argument)
    model = f"model 'hub:{argument}'"
    suffixes = (*KEPT_SUFFIXES, ".py") if trust_remote_code else KEPT_SUFFIXES
    known = bool(COMMIT.fullmatch(revision)) and _cached(repository, revision, suffixes) is not None
    answer = "" if known else _ask(repository, revision)
    if isinstance(answer, str):
        directory = _cached(repository, revision, suffixes)
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
    kept = {name for name in answer.names if name.endswith(suffixes) and not name.endswith(".index.json")}
    return replace(answer, names=tuple(sorted(kept.union(weights))))


def _fetch_config(snapshot: Snapshot, model: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(snapshot.repository, "config.json", revision=snapshot.commit))
    except Exception as error:
        if told := refusal(error, model):
            raise MissingAsset(told) from error
        if not transport(error):
            raise
        raise MissingAsset(f"{model}: its config.json cannot be fetched ({_why(error)}): try again") from error


def _why(error: Exception) -> str:
    """What the system says of a disk that is full or not ours, else the error's name."""
    return getattr(error, "strerror", None) or type(error).__name__


def download(snapshot: Snapshot) -> Path:
    """The snapshot's folder, fetched where it is not in the cache; MissingAsset where the transfer fails."""
    from huggingface_hub import snapshot_download

    if snapshot.directory is not None:
        return snapshot.directory
    broke = f"the download of '{snapshot.repository}' broke off"
    try:
        folder = Path(
            snapshot_download(snapshot.repository, revision=snapshot.commit, allow_patterns=list(snapshot.names))
        )
    except Exception as error:
        if told := refusal(error, f"model '{snapshot.repository}'"):
            raise MissingAsset(told) from error
        if not transport(error):
            raise
        raise MissingAsset(f"{broke} ({_why(error)}): run again, it resumes") from error
    # the client gives the folder that it has where the Hub goes silent before it has listed the files
    lost = [name for name in snapshot.names if not (folder / name).is_file()]
    if lost:
        raise MissingAsset(f"{broke} ({lost[0]} and perhaps more is not there): run again, it resumes")
    if snapshot.revision:  # fetched by its commit: the cache must know later, without network, what led to it
        with contextlib.suppress(OSError):  # a cache that is not ours to write serves all the same
            replace_text(folder.parent.parent / "refs" / snapshot.revision, snapshot.commit)
    return folder
