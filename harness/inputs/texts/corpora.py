"""Where text comes from: known names, files, package files and the Hub. No torch.

Specifications: `lee`, `lee-50` (other articles, for calibration), `wikitext-2`, `synthetic`, `ptb:FILE`, `text:FILE`,
`text-raw:FILE`, `package:DIST/FILE`, `hub:ORG/NAME[/CONFIG[/SPLIT]][@REVISION]` (split `test` unless named), a name
declared under `[tool.harness.datasets]` (its files relative to that pyproject.toml) or by an entry point
`harness.datasets` (an object that is one of these specifications as a string). Known names beat declared ones.

`text:` and `package:` read a file as what its name says (`columns`), without a byte order mark; `text-raw:` reads UTF-8
as it is, whatever the name. `:column=NAME` behind a table or a Hub dataset names the column that is the text.

How each kind of dataset reaches each protocol, which documents and how they are joined, stands in the table `LAYOUTS`.
An over-long text is cut by the protocol (`--max-tokens`, windows); a text of which nothing can be scored is
`TextTooShort`, except that under `sentence` single documents may be empty or hold one token: they are counted.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from harness.core import catalog
from harness.core.errors import BadFile, BadSpecification, HarnessError, MissingAsset, UnknownName
from harness.core.files import read_plain
from harness.core.options import Declared
from harness.core.specification import COLUMN, Specification, parse, with_column
from harness.inputs import hub

JOINED = frozenset({"chunk", "stride", "gptq", "half"})  # protocols that read one running text


@dataclass(frozen=True)
class Reading:
    """What one protocol reads of a dataset.

    texts: tokenized one by one. originals: of the same length, the texts whose words and bytes normalise a figure.
    how: the words that stand in the protocol id.
    """

    texts: tuple[str, ...]
    originals: tuple[str, ...]
    how: str


Layout = Callable[[Sequence[str]], Reading]


def unaltered(texts: Iterable[str], how: str) -> Reading:
    """Texts whose words and bytes are counted as they are tokenized."""
    read = tuple(texts)
    return Reading(read, read, how)


def join(separator: str, what: str) -> Layout:
    """One text: the documents with a separator between them."""
    return lambda documents: unaltered([separator.join(documents)], f"{what} joined by {separator!r}")


def whole(documents: Sequence[str]) -> Reading:
    """The file as it is."""
    return unaltered(documents, "the file as it is")


def each(what: str) -> Layout:
    """Every document by itself, without its line end."""
    return lambda documents: unaltered((text.removesuffix("\n") for text in documents), f"each {what} by itself")


def file_lines(documents: Sequence[str]) -> Reading:
    """Every line of a file by itself; only line feeds end a line, and the last need not."""
    return unaltered("".join(documents).removesuffix("\n").split("\n"), "each line by itself")


TITLE = re.compile(r"\s*= (?!= ).*(?<! =) =\s*")  # ' = Title = ', not the ' = = Section = = ' of a part


def wikitext_pages(rows: Sequence[str]) -> tuple[str, ...]:
    """The pages of WikiText, cut before each title line (62 in WikiText-2's test split).

    The Hub stores a blank line, which is one space in the original file, as an empty row: the space is put back.
    Lines before the first title, if blank, are no page.
    """
    pages: list[list[str]] = [[]]
    for row in rows:
        line = row.removesuffix("\n") or " "
        if TITLE.fullmatch(line):
            pages.append([])
        pages[-1].append(line)
    pages[-1].append("")  # the file's last line ends like every other
    return tuple("\n".join(page) for page in pages if "".join(page).strip())


# What lm-evaluation-harness undoes of WikiText's tokenization, in its order: literal pairs, then what stands in pairs
# of brackets or quotes loses the blanks at its ends, then literal pairs again.
BEFORE_PAIRS = (
    ("s '", "s'"),
    (" @-@ ", "-"),
    (" @,@ ", ","),
    (" @.@ ", "."),
    *((f" {mark} ", f"{mark} ") for mark in ":;.!?,"),
)
PAIRS = (("(", ")"), ("[", "]"), ("{", "}"), ('"', '"'), ("'", "'"))
AFTER_PAIRS = (
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" \N{DEGREE SIGN} ", "\N{DEGREE SIGN}"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)


def detokenize_wikitext(page: str) -> str:
    """A WikiText page as running text, by the rules of lm-evaluation-harness's wikitext task.

    Its rule for "' 5" is left out: it is written with slashes inside the pattern and matches nothing.
    """
    for tokenized, plain in BEFORE_PAIRS:
        page = page.replace(tokenized, plain)
    for opening, closing in PAIRS:
        first, last = re.escape(opening), re.escape(closing)
        page = re.sub(rf"{first}\s*([^{last}]*?)\s*{last}", rf"{opening}\1{closing}", page)
    for tokenized, plain in AFTER_PAIRS:
        page = page.replace(tokenized, plain)
    return page


def detokenized_pages(rows: Sequence[str]) -> Reading:
    """WikiText's pages as lm-evaluation-harness reads them; words and bytes are counted in the original page."""
    pages = wikitext_pages(rows)
    return Reading(tuple(map(detokenize_wikitext, pages)), pages, "each page by itself, detokenized")


# how documents are read as one running text, page by page and sentence by sentence
LAYOUTS: Mapping[str, Mapping[str, Layout]] = {
    "file": {"joined": whole, "rolling": whole, "sentence": file_lines},
    "lines": {"joined": join("\n", "lines"), "rolling": join("\n", "lines"), "sentence": each("line")},
    "wikitext": {"joined": join("\n\n", "rows"), "rolling": detokenized_pages, "sentence": each("row")},
    "rows": {"joined": join("\n\n", "rows"), "rolling": each("row"), "sentence": each("row")},
}


LEE_FILE = "gensim/test/test_data/lee_background.cor"
LEE_SHA256 = "5d78d6dafd953bbf65797bef09a9ffb9ec430583381be705f8fd460000f370fb"
LEE_50_FILE = "gensim/test/test_data/lee.cor"
LEE_50_SHA256 = "a878f9a58f6743c32985c56c2f2f75988386216b38a4023a01fd3bcf7884d93e"
GENSIM = "pip install --no-deps gensim==4.4.0"
PTB_SHA256 = "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0"
PTB_LINES = 3761  # sentences of the test split
SPECIAL = frozenset(".gz .bz2 .xz .json .jsonl .ndjson .csv .tsv .parquet".split())  # endings that `columns` reads
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
    documents: tuple[str, ...]
    layout: str  # key of LAYOUTS
    revision: str  # commit of a Hub dataset named by one, else sha256 of the content
    split: str = ""

    def joined(self, protocol_name: str) -> Reading:
        """The texts that a protocol tokenizes, one by one."""
        return LAYOUTS[self.layout]["joined" if protocol_name in JOINED else protocol_name](self.documents)


def read_bytes(path: Path) -> bytes:
    """A text file's bytes; one line on whatever is wrong with it."""
    try:
        data = read_plain(path)
    except FileNotFoundError as error:
        raise MissingAsset(f"there is no text file '{path}'") from error
    except (OSError, ValueError) as error:  # a name can hold what no system allows
        raise BadFile(f"cannot read the text file '{path}': {getattr(error, 'strerror', error)}") from error
    if not data.strip():
        raise BadFile(f"the text file '{path}' is empty")
    return data


def single(name: str, text: str) -> Corpus:
    """A text that is one document."""
    return Corpus(name, (text,), "file", hashlib.sha256(text.encode()).hexdigest())


def plain(path: Path, name: str, data: bytes, encoding: str = "utf-8") -> Corpus:
    """The bytes of a file of UTF-8 as they are, line ends untouched; with `utf-8-sig` but for a byte order mark."""
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise BadFile(f"'{path}' is not UTF-8 text (byte {error.start}): convert it first") from error
    if not text.strip():
        raise BadFile(f"the text file '{path}' is empty")
    return single(name, text)


def text_file(argument: str, find: Callable[[str], Path], name: Callable[[str], str]) -> Corpus:
    """A file, read as what its name says: text, packed text, or the column of a table, each row a document.

    `find` gives the path and `name` the corpus's name of what the argument names without its column.
    """
    named, column = with_column(argument)
    path = find(named)
    data, ending = read_bytes(path), ""
    if SPECIAL.intersection(map(str.lower, path.suffixes)):
        from harness.inputs.texts import columns  # local: most texts are plain

        data, ending = columns.unpacked(path, data)
        if ending in columns.ROWS:
            rows = columns.documents(path, data, ending, column)
            revision = hashlib.sha256("\0".join(rows).encode()).hexdigest()
            return Corpus(f"{name(named)}{COLUMN}{column}" if column else name(named), rows, "rows", revision)
    if column:
        raise BadSpecification(f"'{path}' is a text without columns: leave out '{COLUMN}{column}'")
    return plain(path, name(named), data, "utf-8-sig")


def package_file(argument: str) -> Path:
    """The file behind DIST/FILE; DIST may be followed by the file's path inside site-packages, or in the package."""
    name, slash, inside = argument.partition("/")
    if not slash or not inside:
        raise BadSpecification(f"'package:{argument}' names no file: write package:DIST/FILE")
    try:
        package = distribution(name)
    except PackageNotFoundError as error:
        raise MissingAsset(f"'package:{argument}' needs the distribution '{name}': pip install {name}") from error
    home = re.sub(r"[-.]+", "_", name)
    for candidate in (inside, f"{home}/{inside}"):
        path = Path(str(package.locate_file(candidate)))
        if path.is_file():
            return path
    raise MissingAsset(f"the distribution '{name}' {package.version} holds no file '{inside}'")


def lee(name: str, inside: str, sha256: str, encoding: str) -> Corpus:
    """`lee` or `lee-50`, of the distribution gensim, held to its checksum."""
    try:
        path = package_file(f"gensim/{inside}")
    except MissingAsset as error:
        raise MissingAsset(f"the text '{name}' lies in the package gensim: {GENSIM}") from error
    data = read_bytes(path)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise BadFile(f"'{path}' has another sha256 than the text '{name}': {GENSIM}")
    return single(name, data.decode(encoding))


def ptb(argument: str, root: Path) -> Corpus:
    """The Penn Treebank test split from a local file, held to its checksum; blanks around a line are not text."""
    path = root / Path(argument).expanduser()
    if not path.is_file():
        raise MissingAsset(f"there is no file '{argument}': {PTB_ADVICE}")
    data = read_bytes(path)
    sha256, lines = hashlib.sha256(data).hexdigest(), data.count(b"\n")
    if sha256 != PTB_SHA256:
        raise BadFile(
            f"'{path}' is not the expected Penn Treebank test split: {lines:,} lines, sha256 {sha256[:12]}, not "
            f"{PTB_LINES:,} lines, sha256 {PTB_SHA256[:12]} (any other text goes as text:FILE)"
        )
    documents = tuple(line.strip() for line in data.decode().removesuffix("\n").split("\n"))
    return Corpus("ptb", documents, "lines", sha256, "test")


def held_out() -> Corpus:
    """Held-out text of the seeded language that the tiny models learn."""
    from harness.inputs.texts import synthetic

    return single("synthetic", synthetic.text(SYNTHETIC_TOKENS, synthetic.HELD_OUT_SEED))


def hub_rows(argument: str, name: str, layout: str = "rows") -> Corpus:
    """Rows of a Hub dataset."""
    rows, revision, split = hub.read_text(argument)
    return Corpus(name, rows, layout, revision, split)


@dataclass(frozen=True)
class Dataset:
    """A kind of dataset: how it is read, and what follows its name.

    `read` and `check` take what follows the colon and the folder that relative paths start from; `syntax` takes it
    alone and touches nothing. A kind whose reading is quick is checked by reading it.
    """

    read: Callable[[str, Path], Corpus]
    argument: str = ""  # the placeholder of what must follow the colon
    check: Callable[[str, Path], object] | None = None
    syntax: Callable[[str], object] | None = None


DATASETS: Mapping[str, Dataset] = {
    "lee": Dataset(lambda argument, root: lee("lee", LEE_FILE, LEE_SHA256, "utf-8")),
    "lee-50": Dataset(lambda argument, root: lee("lee-50", LEE_50_FILE, LEE_50_SHA256, "latin-1")),
    "wikitext-2": Dataset(
        lambda argument, root: hub_rows(WIKITEXT_2, "wikitext-2", "wikitext"),
        check=lambda argument, root: hub.check_text(WIKITEXT_2),
    ),
    "synthetic": Dataset(lambda argument, root: held_out(), check=lambda argument, root: None),
    "ptb": Dataset(ptb, "FILE"),
    "text": Dataset(
        lambda argument, root: text_file(
            argument, lambda named: root / Path(named).expanduser(), lambda named: f"text:{Path(named).name}"
        ),
        "FILE[:column=NAME]",
    ),
    "text-raw": Dataset(
        lambda argument, root: plain(
            path := root / Path(argument).expanduser(), f"text-raw:{path.name}", read_bytes(path)
        ),
        "FILE",
    ),
    "package": Dataset(
        lambda argument, root: text_file(argument, package_file, lambda named: f"package:{named}"),
        "DIST/FILE[:column=NAME]",
    ),
    "hub": Dataset(
        lambda argument, root: hub_rows(argument, hub.name_of(argument)),
        "ORG/NAME[/CONFIG[/SPLIT]][@REVISION][:column=NAME]",
        check=lambda argument, root: hub.check_text(argument),
        syntax=hub.parse_text,
    ),
}


@functools.cache
def installed() -> dict[str, str]:
    """Names that installed packages add: entry points `harness.datasets`, each a specification as a string."""
    datasets: dict[str, str] = {}
    for name, value, where in catalog.entry_values("harness.datasets", str, "specification as a string"):
        if name in datasets or name in DATASETS:
            raise HarnessError(f"{where}: '{name}' is already a dataset's name: choose another")
        datasets[name] = value
    return datasets


def resolve(specification: Specification, declared: Declared) -> tuple[Dataset, str, Path]:
    """The kind of a dataset, its argument, and where its relative paths start; touches no file and no network."""
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


def check(specification: Specification, declared: Declared) -> None:
    """Whether the text is there and reads as text; one line on what is wrong, no torch."""
    dataset, argument, root = resolve(specification, declared)
    (dataset.check or dataset.read)(argument, root)


def read(specification: Specification, declared: Declared) -> Corpus:
    """Read a dataset whole."""
    dataset, argument, root = resolve(specification, declared)
    return dataset.read(argument, root)
