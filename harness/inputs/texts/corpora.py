"""Where text comes from: known names, files, package files and the Hub. No torch.

Specifications: `lee`, `lee-50` (other articles, for calibration), `wikitext-2`, `synthetic`, `ptb:FILE`, `text:FILE`,
`package:DIST/FILE`, `hub:ORG/NAME[/CONFIG[/SPLIT]][@REVISION]` (split `test` unless named), a name declared under
`[tool.harness.datasets]` (its files relative to that pyproject.toml) or by an entry point `harness.datasets`
(an object that is one of these specifications as a string). Known names beat declared ones.
How a dataset's documents reach a protocol stands in one table, `joining.LAYOUTS`.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, entry_points
from pathlib import Path

from harness.core.errors import BadFile, BadSpecification, HarnessError, MissingAsset, UnknownName
from harness.core.options import Declared
from harness.core.specification import Specification, parse
from harness.inputs.texts import hub_texts
from harness.inputs.texts.joining import LAYOUTS, Reading

LEE_FILE = "gensim/test/test_data/lee_background.cor"
LEE_SHA256 = "5d78d6dafd953bbf65797bef09a9ffb9ec430583381be705f8fd460000f370fb"
LEE_50_FILE = "gensim/test/test_data/lee.cor"
LEE_50_SHA256 = "a878f9a58f6743c32985c56c2f2f75988386216b38a4023a01fd3bcf7884d93e"
GENSIM = "pip install --no-deps gensim==4.4.0"
PTB_SHA256 = "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0"
PTB_LINES = 3761  # sentences of the test split
WIKITEXT_2 = "Salesforce/wikitext/wikitext-2-raw-v1/test@b08601e04326c79dfdd32d625aee71d232d685c3"
SYNTHETIC_TOKENS = 16384  # 64 windows of the tiny models' 256 positions
PTB_ADVICE = (
    "the Penn Treebank's licence forbids shipping it: get the usual preprocessed test split "
    f"(ptb.test.txt, {PTB_LINES:,} lines) and name it as ptb:FILE"
)


@dataclass(frozen=True)
class Corpus:
    """A text with its documents, and how each protocol reads them."""

    name: str  # stands in protocol ids: no folder of this machine in it
    specification: str
    documents: tuple[str, ...]
    layout: str  # key of LAYOUTS
    revision: str  # commit of a Hub dataset named by one, else sha256 of the content
    split: str = ""
    note: str = ""

    def joined(self, protocol_name: str) -> Reading:
        """The texts that a protocol tokenizes, one by one."""
        return LAYOUTS[self.layout].read(self.documents, protocol_name)


@dataclass(frozen=True)
class Content:
    """What was read: documents, and what identifies them."""

    documents: tuple[str, ...]
    revision: str
    name: str
    split: str = ""
    note: str = ""


def sha256_text(text: str) -> str:
    """sha256 (hex) of a text's UTF-8 bytes."""
    return hashlib.sha256(text.encode()).hexdigest()


def read_bytes(path: Path) -> bytes:
    """A text file's bytes; one line on whatever is wrong with it."""
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise MissingAsset(f"there is no text file '{path}'") from error
    except (OSError, ValueError) as error:  # a name can hold what no system allows
        raise BadFile(f"cannot read the text file '{path}': {getattr(error, 'strerror', error)}") from error
    if not data.strip():
        raise BadFile(f"the text file '{path}' is empty")
    return data


def decode(data: bytes, path: Path) -> str:
    """UTF-8 text, its line ends untouched."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadFile(f"'{path}' is not UTF-8 text (byte {error.start}): convert it first") from error


def file_content(path: Path, name: str) -> Content:
    """A file as it is: one document."""
    text = decode(read_bytes(path), path)
    return Content((text,), sha256_text(text), name)


def local(argument: str, root: Path) -> Path:
    """A path as written, relative ones under `root`."""
    return root / Path(argument).expanduser()


def package_file(argument: str) -> Path:
    """The file behind DIST/FILE; DIST may be followed by the file's path inside site-packages, or in the package."""
    name, slash, inside = argument.partition("/")
    if not slash or not inside:
        raise BadSpecification(f"'package:{argument}' names no file: write package:DIST/FILE")
    try:
        found = distribution(name)
    except PackageNotFoundError as error:
        raise MissingAsset(f"'package:{argument}' needs the distribution '{name}': pip install {name}") from error
    package = re.sub(r"[-.]+", "_", name)
    for candidate in (inside, f"{package}/{inside}"):
        path = Path(str(found.locate_file(candidate)))
        if path.is_file():
            return path
    raise MissingAsset(f"the distribution '{name}' {found.version} holds no file '{inside}'")


def gensim_file(inside: str, text: str) -> Path:
    """A text file of the distribution gensim."""
    try:
        return package_file(f"gensim/{inside}")
    except MissingAsset as error:
        raise MissingAsset(f"the text '{text}' lies in the package gensim: {GENSIM}") from error


def lee_content(text: str, inside: str, sha256: str, encoding: str) -> Content:
    """`lee` or `lee-50`, held to its checksum."""
    path = gensim_file(inside, text)
    data = read_bytes(path)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise BadFile(f"'{path}' has another sha256 than the text '{text}': {GENSIM}")
    found = data.decode(encoding)
    return Content((found,), sha256_text(found), text)


def ptb_content(argument: str, root: Path) -> Content:
    """The Penn Treebank test split from a local file, held to its checksum; blanks around a line are not text."""
    path = local(argument, root)
    if not path.is_file():
        raise MissingAsset(f"there is no file '{argument}': {PTB_ADVICE}")
    data = read_bytes(path)
    found, lines = hashlib.sha256(data).hexdigest(), data.count(b"\n")
    if found != PTB_SHA256:
        raise BadFile(
            f"'{path}' is not the expected Penn Treebank test split: {lines:,} lines, sha256 {found[:12]}, not "
            f"{PTB_LINES:,} lines, sha256 {PTB_SHA256[:12]} (any other text goes as text:FILE)"
        )
    documents = tuple(line.strip() for line in decode(data, path).removesuffix("\n").split("\n"))
    return Content(documents, found, "ptb", "test")


def synthetic_content() -> Content:
    """Held-out text of the seeded language that the tiny models learn."""
    from harness.inputs.texts import synthetic

    text = synthetic.text(SYNTHETIC_TOKENS, synthetic.HELD_OUT_SEED)
    note = f"a seeded language of entropy rate {synthetic.entropy_rate():.4f} nat a word: no model can do better"
    return Content((text,), sha256_text(text), "synthetic", note=note)


def hub_content(argument: str, name: str) -> Content:
    """Rows of a Hub dataset."""
    rows, revision, split = hub_texts.read(argument)
    return Content(rows, revision, name, split)


@dataclass(frozen=True)
class Dataset:
    """A kind of dataset: its layout, what follows its name, how to read it and to see that it is there.

    `read` and `check` take what follows the colon and the folder that relative paths start from; `syntax` takes it
    alone and touches nothing. A kind whose reading is quick is checked by reading it.
    """

    layout: str
    read: Callable[[str, Path], Content]
    argument: str = ""  # the placeholder of what must follow the colon
    check: Callable[[str, Path], object] | None = None
    syntax: Callable[[str], object] | None = None


DATASETS: Mapping[str, Dataset] = {
    "lee": Dataset("file", lambda argument, root: lee_content("lee", LEE_FILE, LEE_SHA256, "utf-8")),
    "lee-50": Dataset("file", lambda argument, root: lee_content("lee-50", LEE_50_FILE, LEE_50_SHA256, "latin-1")),
    "wikitext-2": Dataset(
        "wikitext",
        lambda argument, root: hub_content(WIKITEXT_2, "wikitext-2"),
        check=lambda argument, root: hub_texts.check(WIKITEXT_2),
    ),
    "synthetic": Dataset("file", lambda argument, root: synthetic_content(), check=lambda argument, root: None),
    "ptb": Dataset("lines", ptb_content, "FILE"),
    "text": Dataset(
        "file",
        lambda argument, root: file_content(local(argument, root), f"text:{Path(argument).name}"),
        "FILE",
    ),
    "package": Dataset(
        "file",
        lambda argument, root: file_content(package_file(argument), f"package:{argument}"),
        "DIST/FILE",
    ),
    "hub": Dataset(
        "rows",
        lambda argument, root: hub_content(argument, f"hub:{argument.partition('@')[0]}"),
        "ORG/NAME[/CONFIG[/SPLIT]][@REVISION]",
        check=lambda argument, root: hub_texts.check(argument),
        syntax=hub_texts.parse,
    ),
}


@functools.cache
def installed() -> dict[str, str]:
    """Names that installed packages add: entry points `harness.datasets`, each a specification as a string."""
    found = {}
    for point in entry_points(group="harness.datasets"):
        where = f"entry point harness.datasets: {point.name} = {point.value}"
        try:
            value = point.load()
        except Exception as error:
            raise HarnessError(f"{where} fails: {error!r}") from error
        if not isinstance(value, str):
            raise HarnessError(f"{where} is no specification as a string")
        if point.name in found or point.name in DATASETS:
            raise HarnessError(f"{where}: '{point.name}' is already a dataset's name: choose another")
        found[point.name] = value
    return found


def resolve(specification: Specification, declared: Declared) -> tuple[Dataset, str, Path]:
    """The kind of a dataset, its argument, and where its relative paths start; names and grammar only."""
    root, asked = Path(), specification
    if asked.name not in DATASETS and not asked.words and not asked.arguments:
        if asked.name in declared.datasets:
            root, asked = declared.root, parse(declared.datasets[asked.name])
        elif asked.name in installed():
            asked = parse(installed()[asked.name])
    if asked.name not in DATASETS:
        raise UnknownName("dataset", asked.name, {*DATASETS, *declared.datasets, *installed()})
    dataset = DATASETS[asked.name]
    if asked.arguments or len(asked.words) > bool(dataset.argument):
        raise BadSpecification(f"'{asked}': the dataset '{asked.name}' takes no such argument")
    argument = asked.words[0] if asked.words else ""
    if dataset.argument and not argument:
        raise BadSpecification(f"'{asked}' names no text: write {asked.name}:{dataset.argument}")
    if dataset.syntax:
        dataset.syntax(argument)
    return dataset, argument, root


def check_name(specification: Specification, declared: Declared) -> None:
    """Whether the name is known and reads well; touches no file and no network."""
    resolve(specification, declared)


def check(specification: Specification, declared: Declared) -> None:
    """Whether the text is there and reads as text; one line on what is wrong, no torch."""
    dataset, argument, root = resolve(specification, declared)
    (dataset.check or dataset.read)(argument, root)


def read(specification: Specification, declared: Declared) -> Corpus:
    """Read a dataset whole."""
    dataset, argument, root = resolve(specification, declared)
    found = dataset.read(argument, root)
    text = str(specification)
    return Corpus(found.name, text, found.documents, dataset.layout, found.revision, found.split, found.note)
