"""Text datasets of the Hub, through `datasets`: rows of one text column. Without network, what is cached serves.

Grammar: ORG/NAME[/CONFIG[/SPLIT]][@REVISION]; the split is `test` unless named. A revision that is a commit (40 hex
digits) identifies the text; of any other the content's sha256 does, since branches move.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from harness.core.errors import BadFile, BadSpecification, MissingAsset, MissingPackage, reading
from harness.inputs.hub_answers import COMMIT, TIMEOUT_SECONDS, refusal, silence, transport

GRAMMAR = re.compile(
    r"(?P<repository>[\w.-]+/[\w.-]+)(?:/(?P<config>[\w.-]+)(?:/(?P<split>[\w.-]+))?)?(?:@(?P<revision>[^\s@]+))?"
)


@dataclass(frozen=True)
class HubText:
    """A Hub dataset's text, named."""

    repository: str
    config: str | None
    split: str
    revision: str | None

    @property
    def commit(self) -> str:
        """The revision where it is a commit, else ''."""
        return self.revision if self.revision and COMMIT.fullmatch(self.revision) else ""


def parse(argument: str) -> HubText:
    """Read the grammar; BadSpecification shows it."""
    match = GRAMMAR.fullmatch(argument)
    if not match:
        raise BadSpecification(f"'hub:{argument}' does not read as hub:ORG/NAME[/CONFIG[/SPLIT]][@REVISION]")
    return HubText(match["repository"], match["config"], match["split"] or "test", match["revision"])


def unreachable(text: HubText) -> str:
    """'' where the Hub gives this dataset, else why it cannot be asked; MissingAsset where it refuses."""
    from huggingface_hub import HfApi

    try:
        info = HfApi().dataset_info(text.repository, revision=text.revision, timeout=TIMEOUT_SECONDS)
        if info.gated:
            HfApi().auth_check(text.repository, repo_type="dataset")
    except Exception as error:
        if told := refusal(error, f"dataset '{text.repository}' at revision '{text.revision or 'main'}'"):
            raise MissingAsset(told) from error
        if told := silence(error):
            return told
        raise
    return ""


@contextmanager
def offline() -> Iterator[None]:
    """Let `datasets` look into its cache only: its own retries take half a minute to find that there is no network."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def load(text: HubText) -> Any:
    """The `datasets.Dataset` of the split; MissingAsset in one line where it cannot be had."""
    try:
        import datasets
    except ImportError as error:
        raise MissingPackage("datasets", f"the text 'hub:{text.repository}'") from error
    reason = unreachable(text)
    where = f"{text.repository}{f', {text.config}' if text.config else ''}, {text.split}"
    with reading(f"the text {where}"):
        try:
            with offline() if reason else nullcontext():
                found = datasets.load_dataset(text.repository, text.config, split=text.split, revision=text.revision)
        except Exception as error:
            if not isinstance(error, ValueError) and not transport(error):
                raise
            detail = str(error).splitlines()[0] if str(error) else type(error).__name__
            why = f"{reason} and no copy is cached: connect, or name a local file as text:FILE" if reason else detail
            raise MissingAsset(f"the text {where} cannot be had: {why}") from error
    # where the Hub is silent, or goes silent meanwhile, the library takes whatever copy it has
    if text.commit and not any(text.commit in str(item["filename"]) for item in found.cache_files):
        why = reason or "the Hub broke off: run again"
        raise MissingAsset(f"the text {where} is cached at another revision than {text.commit[:12]}, and {why}")
    return found


def check(argument: str) -> None:
    """Whether the text can be had; `datasets` is only asked where the Hub does not answer (it may hold a copy)."""
    text = parse(argument)
    if unreachable(text):
        load(text)


def read(argument: str) -> tuple[tuple[str, ...], str, str]:
    """(rows, revision, split): the rows of the column `text`, or of the only column of strings."""
    text = parse(argument)
    table = load(text)
    columns = [name for name, feature in table.features.items() if getattr(feature, "dtype", "") == "string"]
    if "text" not in columns and len(columns) != 1:
        names = ", ".join(columns) or "none"
        raise BadFile(f"'hub:{argument}' has no column 'text' and not just one column of strings: {names}")
    rows = tuple(str(row or "") for row in table["text" if "text" in columns else columns[0]])
    if not any(row.strip() for row in rows):
        raise BadFile(f"'hub:{argument}' holds no text")
    content = hashlib.sha256("\0".join(rows).encode()).hexdigest()
    return rows, text.commit or content, text.split
