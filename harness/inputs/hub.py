"""Models and texts of the Hub: found, checked, fetched, and each refusal in one line. No torch.

Where the Hub does not answer, a copy in its cache serves.

- A model is ORG/NAME[@REVISION]: which commit that is, and whether its files will do, is found out before they come.
- A text is ORG/NAME[/CONFIG[/SPLIT]][@REVISION][:column=NAME], the split `test` unless named: rows of one text
  column, through `datasets`. A revision that is a commit (40 hex digits) identifies it; of any other the content's
  sha256 does, since branches move.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import re
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness.core import progress
from harness.core.errors import BadFile, BadSpecification, HarnessError, MissingAsset, reading
from harness.core.files import replace_text
from harness.core.specification import COLUMN, with_column
from harness.inputs.models import adapters, folder

COMMIT = re.compile(r"[0-9a-f]{40}")
TIMEOUT_SECONDS = 5.0  # to find out whether the Hub answers at all
TRANSFER = "Downloading bytes"  # what the client calls the bytes that came over the network


def transport(error: BaseException) -> bool:
    """Whether the network is to blame: the client's errors are no OSError, and its module's name has changed."""
    return isinstance(error, OSError) or type(error).__module__.startswith(("httpx", "httpcore", "requests"))


def refusal(error: BaseException, what: str) -> str:
    """What the user must do before the Hub gives `what` ('model 'org/name' at revision 'main''); '' for other errors.

    A gated repository tells everybody what it holds: it refuses at the first file.
    """
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return f"the Hub {what} is gated: accept its terms on its page and run 'hf auth login'"
    if isinstance(error, errors.RepositoryNotFoundError | errors.RevisionNotFoundError):
        return f"the Hub shows no {what}: check the name, or log in if it is private"
    if isinstance(error, errors.HfHubHTTPError) and error.response.status_code == 401:
        return f"the Hub takes no token of yours for the {what}: run 'hf auth login', or unset HF_TOKEN"
    return ""


def unanswered(error: Exception, what: str) -> str:
    """Why the Hub could not be asked: offline by wish, a status, or no answer.

    Raises MissingAsset where it refuses `what`, and the error itself where neither Hub nor network is to blame.
    """
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if reason := refusal(error, what):
        raise MissingAsset(reason) from error
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, HfHubHTTPError):
        return f"the Hub answers with status {error.response.status_code}"
    if transport(error):
        return f"the Hub does not answer ({type(error).__name__})"
    raise error


@contextlib.contextmanager
def fetching(what: str, failure: str, advice: str) -> Iterator[None]:
    """MissingAsset, in one line, where the Hub refuses `what` or the transfer fails."""
    try:
        yield
    except Exception as error:
        if reason := refusal(error, what):
            raise MissingAsset(reason) from error
        if not transport(error):
            raise
        why = getattr(error, "strerror", None) or type(error).__name__  # what the system says of a disk that is full
        raise MissingAsset(f"{failure} ({why}): {advice}") from error


MODEL_GRAMMAR = re.compile(r"(?P<repository>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[^\s@]+))?")
KEPT_SUFFIXES = (".json", ".model", ".txt", ".jinja")  # of a repository's files beside the weights: configs, tokenizers


@dataclass(frozen=True)
class Snapshot:
    """One commit of a Hub model: in the cache (`directory`), or to be had (`names` of the files to fetch)."""

    repository: str
    commit: str
    directory: Path | None = None
    names: tuple[str, ...] = ()
    revision: str = ""  # the branch or tag that was asked for and led to the commit


def parse_model(argument: str) -> tuple[str, str]:
    """(repository, revision) of `ORG/NAME[@REVISION]`; BadSpecification shows the grammar."""
    match = MODEL_GRAMMAR.fullmatch(argument)
    if not match:
        raise BadSpecification(f"'hub:{argument}' does not read as hub:ORG/NAME[@REVISION]")
    return match["repository"], match["revision"] or "main"


def _cached(repository: str, revision: str, suffixes: tuple[str, ...]) -> Path | None:
    """The folder of a revision in the cache, unless it lacks files of these suffixes that the Hub has listed."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    # folders below hold other formats, and shards of other weights have indices: neither is ever fetched
    kept: Any = {"allow_patterns": [f"*{suffix}" for suffix in suffixes], "ignore_patterns": ["*/*", "*.index.json"]}
    try:
        return Path(snapshot_download(repository, revision=revision, local_files_only=True, **kept))
    except LocalEntryNotFoundError:
        return None


@functools.cache
def _ask(repository: str, revision: str) -> Snapshot | str:
    """What the Hub says of a revision, or, as text, why it cannot be asked; once a process."""
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(repository, revision=revision, timeout=TIMEOUT_SECONDS)
    except Exception as error:
        return unanswered(error, f"model '{repository}' at revision '{revision}'")
    names = tuple(sibling.rfilename for sibling in info.siblings or () if "/" not in sibling.rfilename)
    commit = str(info.sha)
    return Snapshot(repository, commit, names=names, revision="" if revision == commit else revision)


def find_model(argument: str, *, allow_pickle: bool, trust_remote_code: bool) -> Snapshot:
    """Resolve `ORG/NAME[@REVISION]` to a commit whose files will do.

    A commit that lies whole in the cache needs no network. Raises MissingAsset, within seconds, where there is
    neither a network nor a cached copy.
    """
    from huggingface_hub import hf_hub_download

    repository, revision = parse_model(argument)
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
            folder.check_folder(directory, model, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
            adapters.beside(directory, model, allow_pickle=allow_pickle)
            return Snapshot(repository, directory.name, directory)
        except HarnessError:
            if answer:  # nobody to ask for the rest
                raise
            answer = _ask(repository, revision)
            if isinstance(answer, str):
                raise
    weights = folder.check_names(answer.names, model, allow_pickle=allow_pickle)
    with fetching(model, f"{model}: its config.json cannot be fetched", "try again"):
        config = Path(hf_hub_download(repository, "config.json", revision=answer.commit))
    folder.check_config(config, model, trust_remote_code=trust_remote_code)
    kept = {name for name in answer.names if name.endswith(suffixes) and not name.endswith(".index.json")}
    beside = adapters.WEIGHTS if adapters.SETTINGS in answer.names else ()
    kept |= {name for name in beside if name in answer.names and (allow_pickle or not name.endswith(".bin"))}
    return replace(answer, names=tuple(sorted(kept.union(weights))))


def to_fetch(snapshot: Snapshot) -> int | None:
    """Bytes of a snapshot's files that are not in the cache yet, as the Hub lists them; None where it does not say."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    repository, commit = snapshot.repository, snapshot.commit
    if snapshot.directory is not None:
        return 0
    names = [
        name
        for name in snapshot.names
        if not isinstance(try_to_load_from_cache(repository, name, revision=commit), str)
    ]
    try:
        listed = HfApi().get_paths_info(repository, names, revision=commit)
    except Exception as error:
        unanswered(error, f"model '{repository}' at revision '{commit}'")
        return None
    return sum(getattr(file, "size", 0) for file in listed)


def has_text(repository: str) -> bool:
    """Whether the cache of the Hub's client holds anything of a dataset's repository."""
    from huggingface_hub import constants

    return (Path(constants.HF_HUB_CACHE) / f"datasets--{repository.replace('/', '--')}").is_dir()


def free_space() -> int:
    """Bytes free where the cache of the Hub's client lies, or will."""
    from huggingface_hub import constants

    home = Path(constants.HF_HUB_CACHE).absolute()
    there = next(folder for folder in (home, *home.parents) if folder.is_dir())
    return shutil.disk_usage(there).free


def told(repository: str) -> type[Any]:
    """A progress bar for the Hub's client that draws nothing: it notes how many bytes of a repository have come."""
    from tqdm.std import tqdm

    class Fetched(tqdm):  # type: ignore[misc]
        """Counts as its base does; of the bars of bytes not the one whose total is made up as they come."""

        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **{**named, "file": io.StringIO(), "disable": False})

        def display(self, msg: str | None = None, pos: int | None = None) -> None:
            """Tell instead."""
            if self.unit == "B" and not self.desc.startswith(TRANSFER) and self.total and self.n:
                progress.note(f"fetching {repository}", int(self.n), int(self.total), "B")

    Fetched.set_lock(threading.RLock())  # its own would start a process
    return Fetched


def download_model(snapshot: Snapshot) -> Path:
    """The snapshot's folder, fetched where it is not in the cache; MissingAsset where the transfer fails."""
    from huggingface_hub import snapshot_download

    if snapshot.directory is not None:
        return snapshot.directory
    broke = f"the download of '{snapshot.repository}' broke off"
    wanted = list(snapshot.names)
    with fetching(f"model '{snapshot.repository}'", broke, "run again, it resumes"):
        chosen: Any = {"revision": snapshot.commit, "allow_patterns": wanted, "tqdm_class": told(snapshot.repository)}
        directory = Path(snapshot_download(snapshot.repository, **chosen))
    # the client gives the folder that it has where the Hub goes silent before it has listed the files
    lost = [name for name in snapshot.names if not (directory / name).is_file()]
    if lost:
        raise MissingAsset(f"{broke} ({lost[0]} and perhaps more is not there): run again, it resumes")
    if snapshot.revision:  # fetched by its commit: the cache must know later, without network, what led to it
        with contextlib.suppress(OSError):  # a cache that is not ours to write serves all the same
            replace_text(directory.parent.parent / "refs" / snapshot.revision, snapshot.commit)
    return directory


STRINGS = ("string", "large_string")  # dtypes of a column of text
TEXT_GRAMMAR = re.compile(
    r"(?P<repository>[\w.-]+/[\w.-]+)(?:/(?P<config>[\w.-]+)(?:/(?P<split>[\w.-]+))?)?(?:@(?P<revision>[^\s@]+))?"
)


@dataclass(frozen=True)
class HubText:
    """A Hub dataset's text, named."""

    repository: str
    config: str | None
    split: str
    revision: str | None
    column: str = ""

    @property
    def commit(self) -> str:
        """The revision where it is a commit, else ''."""
        return self.revision if self.revision and COMMIT.fullmatch(self.revision) else ""


def parse_text(argument: str) -> HubText:
    """Read the grammar; BadSpecification shows it."""
    named, column = with_column(argument)
    match = TEXT_GRAMMAR.fullmatch(named)
    if not match:
        grammar = "hub:ORG/NAME[/CONFIG[/SPLIT]][@REVISION][:column=NAME]"
        raise BadSpecification(f"'hub:{argument}' does not read as {grammar}")
    return HubText(match["repository"], match["config"], match["split"] or "test", match["revision"], column)


def name_of(argument: str) -> str:
    """What a protocol id calls a dataset: all but its revision, which stands there by itself."""
    named, column = with_column(argument)
    return f"hub:{named.partition('@')[0]}{COLUMN + column if column else ''}"


def unreachable(text: HubText) -> str:
    """'' where the Hub gives this dataset, else why it cannot be asked; MissingAsset where it refuses."""
    from huggingface_hub import HfApi

    try:
        info = HfApi().dataset_info(text.repository, revision=text.revision, timeout=TIMEOUT_SECONDS)
        if info.gated:
            HfApi().auth_check(text.repository, repo_type="dataset")
    except Exception as error:
        return unanswered(error, f"dataset '{text.repository}' at revision '{text.revision or 'main'}'")
    return ""


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Let `datasets` look into its cache only: its own retries take half a minute to find that there is no network."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def load_text(text: HubText) -> Any:
    """The `datasets.Dataset` of the split; MissingAsset in one line where it cannot be had."""
    import datasets

    reason = unreachable(text)
    where = f"{text.repository}{f', {text.config}' if text.config else ''}, {text.split}"
    with reading(f"the text {where}"):
        try:
            with offline() if reason else contextlib.nullcontext():
                table = datasets.load_dataset(text.repository, text.config, split=text.split, revision=text.revision)
        except Exception as error:
            if not isinstance(error, ValueError) and not transport(error):
                raise
            detail = str(error).splitlines()[0] if str(error) else type(error).__name__
            why = f"{reason} and no copy is cached: connect, or name a local file as text:FILE" if reason else detail
            raise MissingAsset(f"the text {where} cannot be had: {why}") from error
    # where the Hub is silent, or goes silent meanwhile, the library takes whatever copy it has
    if text.commit and not any(text.commit in str(item["filename"]) for item in table.cache_files):
        why = reason or "the Hub broke off: run again"
        raise MissingAsset(f"the text {where} is cached at another revision than {text.commit[:12]}, and {why}")
    return table


def check_text(argument: str) -> None:
    """Whether the text can be had; `datasets` is only asked where the Hub does not answer (it may hold a copy)."""
    text = parse_text(argument)
    if unreachable(text):
        load_text(text)


def read_text(argument: str) -> tuple[tuple[str, ...], str, str]:
    """(rows, revision, split): the rows of the column named, else of `text`, else of the only column of strings."""
    text = parse_text(argument)
    table = load_text(text)
    columns = [name for name, feature in table.features.items() if getattr(feature, "dtype", "") in STRINGS]
    usual = "text" if "text" in columns or len(columns) != 1 else columns[0]
    if (wanted := text.column or usual) not in columns:
        there, plain = ", ".join(columns) or "none", with_column(argument)[0]
        fix = f"; name one as hub:{plain}{COLUMN}{columns[0]}" if columns else ""
        alone = "" if text.column else " and not just one column of strings"
        raise BadFile(f"'hub:{plain}' has no column '{wanted}'{alone}: {there}{fix}")
    rows = tuple(str(row or "") for row in table[wanted])
    if not any(row.strip() for row in rows):
        raise BadFile(f"'hub:{argument}' holds no text")
    content = hashlib.sha256("\0".join(rows).encode()).hexdigest()
    return rows, text.commit or content, text.split
