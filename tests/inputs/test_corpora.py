import bz2
import csv
import gzip
import hashlib
import importlib
import io
import json
import lzma
import sys
import types
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

from harness.core import catalog
from harness.core.errors import BadFile, BadSpecification, HarnessError, MissingAsset, UnknownName
from harness.core.options import Declared
from harness.core.specification import Specification, parse
from harness.inputs import hub
from harness.inputs.texts import columns, corpora


def read(text: str, declared: Declared | None = None) -> corpora.Corpus:
    return corpora.read(parse(text), declared or Declared(Path()))


def test_lee_is_the_file_as_it_is_and_300_lines() -> None:
    lee = read("lee")
    assert lee.joined("chunk").texts == lee.documents == lee.joined("rolling").originals
    assert hashlib.sha256(lee.documents[0].encode()).hexdigest() == corpora.LEE_SHA256 == lee.revision
    lines = lee.joined("sentence").texts
    assert len(lines) == 300
    assert lines[0].startswith("Hundreds of people have been forced to vacate their homes")


def test_lee_missing_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(corpora, "distribution", absent)
    with pytest.raises(MissingAsset, match=r"pip install --no-deps gensim==4\.4\.0$"):
        corpora.check(parse("lee"), Declared(Path()))
    with pytest.raises(MissingAsset, match=r"pip install elsewhere$"):
        corpora.check(parse("package:elsewhere/file.txt"), Declared(Path()))


def test_lee_of_other_content_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "lee").write_text("something else")
    monkeypatch.setattr(corpora, "package_file", lambda argument: tmp_path / "lee")
    for name in ("lee", "lee-50"):
        with pytest.raises(BadFile, match=f"another sha256 than the text '{name}'"):
            read(name)


def test_the_calibration_text_has_other_articles_than_the_text_that_is_measured() -> None:
    fifty, background = (read(name).joined("sentence").texts for name in ("lee-50", "lee"))
    assert (len(fifty), len(background)) == (50, 300)
    assert not set(fifty) & set(background)

    def runs(articles: tuple[str, ...]) -> set[tuple[str, ...]]:
        """Eight words in a row: longer passages that two articles have in common hold one."""
        words = [article.split() for article in articles]
        return {tuple(row[at : at + 8]) for row in words for at in range(len(row) - 7)}

    assert not runs(fifty) & runs(background)


def test_text_keeps_every_byte_but_its_order_mark(tmp_path: Path) -> None:
    data = "\ufeffone\r\ntwo\n\n three \u2028 \n"
    (tmp_path / "a.txt").write_bytes(data.encode())
    for kind, begins in (("text-raw", "\ufeff"), ("text", "")):
        text = read(f"{kind}:{tmp_path}/a.txt")
        assert text.joined("gptq").texts == (begins + data[1:],)
        assert text.joined("sentence").texts == (f"{begins}one\r", "two", "", " three \u2028 ")
        assert text.revision == hashlib.sha256((begins + data[1:]).encode()).hexdigest()
        assert text.name == f"{kind}:a.txt"  # no folder of this machine


ROWS = ("One, two.", 'He said "no"\nand went \u2028 on.', "", "Käse \N{GRINNING FACE}")


def parquet(rows: Sequence[str]) -> bytes:
    arrow, writer = (importlib.import_module(name) for name in ("pyarrow", "pyarrow.parquet"))  # both untyped
    file = io.BytesIO()
    writer.write_table(arrow.table({"id": [1] * len(rows), "text": rows, "body": rows}), file)
    return file.getvalue()


def csv_of(rows: Sequence[str], separator: str = ",") -> bytes:
    file = io.StringIO(newline="")
    csv.writer(file, delimiter=separator).writerows([["id", "text", "body"], *([1, row, row] for row in rows)])
    return file.getvalue().encode()


def json_of(rows: Sequence[str]) -> list[dict[str, Any]]:
    return [{"id": 1, "text": row or None, "body": row} for row in rows]


TABLES = {
    "a.json": json.dumps(json_of(ROWS)).encode(),
    "a.jsonl": "\n".join(json.dumps(row, ensure_ascii=False) for row in json_of(ROWS)).encode(),
    "a.ndjson": b"\xef\xbb\xbf" + "\n\n".join(map(json.dumps, json_of(ROWS))).encode(),
    "lines.json": "\n".join(map(json.dumps, json_of(ROWS))).encode(),  # what many call .json
    "a.csv": csv_of(ROWS),
    "A.CSV": b"\xef\xbb\xbf" + csv_of(ROWS),
    "a.tsv": csv_of(ROWS, "\t"),
    "a.parquet": parquet(ROWS),
    "a.jsonl.gz": gzip.compress("\n".join(map(json.dumps, json_of(ROWS))).encode()),
    "a.csv.xz": lzma.compress(csv_of(ROWS)),
    "a.parquet.bz2": bz2.compress(parquet(ROWS)),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_read_as_what_it_is(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(TABLES[name])
    text, named = read(f"text:{tmp_path}/{name}"), read(f"text:{tmp_path}/{name}:column=body")
    assert text.documents == named.documents == ROWS
    assert text.joined("chunk").texts == ("\n\n".join(ROWS),)
    assert text.joined("rolling").texts == text.joined("sentence").texts == ROWS
    assert text.revision == named.revision == hashlib.sha256("\0".join(ROWS).encode()).hexdigest()
    assert (text.name, named.name) == (f"text:{name}", f"text:{name}:column=body")
    with pytest.raises(BadFile, match=r"row 1 has no text in 'title'; with text it has .*text, body: .*:column=text"):
        read(f"text:{tmp_path}/{name}:column=title")


def test_packed_text_and_strings_in_json_are_texts_too(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("\ufeffone\n".encode()))
    assert read(f"text:{tmp_path}/a.txt.gz").documents == ("one\n",)
    (tmp_path / "a.jsonl").write_text('"one"\n"two"\n', encoding="utf-8")
    assert read(f"text:{tmp_path}/a.jsonl").documents == ("one", "two")
    assert read(f"text-raw:{tmp_path}/a.jsonl").documents == ('"one"\n"two"\n',)
    assert read(f"text:{tmp_path}/a.jsonl").joined("gptq").texts == ("one\n\ntwo",)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.json", b'[{"content": "x"}]', "no text in 'text'; with text it has content: name one with :column=content"),
        ("a.json", b'[{"id": 1}]', "no text in 'text', nor in any other column"),
        ("a.json", b"[1]", "row 1 has no text and no columns: it is of type int"),
        ("a.jsonl", b'{"text": "x"}\n{"text": 1}', "row 2 has no text in 'text'"),
        ("a.jsonl", b'{"text": "x"}\nno json', "cannot be read"),
        ("a.jsonl", b'{"text": "\\ud800"}', "cannot be read"),
        ("a.json", b'[{"text": " "}]', "holds no text"),
        ("a.json", b"[" * 100_000, "cannot be read"),
        ("a.csv", b"text\nOne, two.\n", "line 2 has not as many fields as the header"),
        ("a.csv", b"id,text\n1\n", "line 2 has not as many fields as the header"),
        ("a.csv", b"label;text\n1;One\n", "with text it has label;text"),
        ("a.csv", b"text\n\xff\n", "cannot be read"),
        ("a.parquet", b"no parquet", "cannot be read"),
        ("a.txt.gz", b"no gzip", "cannot be read"),
        ("a.txt.xz", lzma.compress(b"one")[:20], "cannot be read"),
        ("a.txt", b"\xef\xbb\xbf", "is empty"),
        ("a.zip", b"PK\x03\x04\xff", "is not UTF-8 text"),
    ],
)
def test_a_table_without_text_is_one_line(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(HarnessError, match=message) as caught:
        corpora.check(parse(f"text:{tmp_path}/{name}"), Declared(Path()))
    assert "\n" not in str(caught.value)


def test_a_plain_text_has_no_columns_and_a_long_field_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one", encoding="utf-8")
    with pytest.raises(BadSpecification, match="is a text without columns"):
        read(f"text:{tmp_path}/a.txt:column=body")
    (tmp_path / "a.csv").write_text("text\n" + "x" * 200_000, encoding="utf-8")
    assert len(read(f"text:{tmp_path}/a.csv").documents[0]) == 200_000


def test_the_endings_that_are_looked_at_are_those_that_are_read() -> None:
    assert corpora.SPECIAL == {*columns.ROWS, *columns.UNPACKED}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "there is no text file"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_bytes(b" \n\n"), "is empty"),
        (lambda path: path.write_bytes(b"ab\xff"), r"is not UTF-8 text \(byte 2\)"),
        (lambda path: path.mkdir(), "cannot read the text file"),
    ],
)
def test_unreadable_files_are_one_line(make: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    make(tmp_path / "a.txt")
    with pytest.raises(HarnessError, match=message) as caught:
        corpora.check(parse(f"text:{tmp_path}/a.txt"), Declared(Path()))
    assert "\n" not in str(caught.value)


def test_package_file() -> None:
    for inside in ("gensim/test/test_data", "test/test_data"):
        assert read(f"package:gensim/{inside}/lee_background.cor").documents == read("lee").documents
    with pytest.raises(MissingAsset, match=r"'gensim' .* holds no file 'nowhere\.txt'"):
        read("package:gensim/nowhere.txt")
    with pytest.raises(BadSpecification, match="write package:DIST/FILE"):
        read("package:gensim")


def test_ptb_joins_lines_by_a_line_feed_and_stands_line_by_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data = b" no it was n't \n but while N \n"
    (tmp_path / "ptb.txt").write_bytes(data)
    monkeypatch.setattr(corpora, "PTB_SHA256", hashlib.sha256(data).hexdigest())
    ptb = read(f"ptb:{tmp_path}/ptb.txt")
    assert ptb.joined("chunk").texts == ("no it was n't\nbut while N",) == ptb.joined("rolling").texts
    assert ptb.joined("sentence").texts == ("no it was n't", "but while N")
    assert (ptb.name, ptb.split) == ("ptb", "test")


def test_ptb_says_why_it_is_not_here_and_refuses_another_file(tmp_path: Path) -> None:
    with pytest.raises(MissingAsset, match=r"none\.txt': .* licence forbids shipping it: .* name it as ptb:FILE"):
        corpora.check(parse(f"ptb:{tmp_path}/none.txt"), Declared(Path()))
    with pytest.raises(BadSpecification, match="write ptb:FILE"):
        corpora.resolve(Specification("ptb"), Declared(Path()))
    (tmp_path / "other.txt").write_text("a\nb\n")
    with pytest.raises(BadFile, match=r"2 lines, sha256 [0-9a-f]{12}, not 3,761 lines, sha256 dd65dff31e70"):
        read(f"ptb:{tmp_path}/other.txt")


def test_synthetic_is_held_out_and_the_same_every_time() -> None:
    from harness.inputs.texts import synthetic

    text = read("synthetic")
    assert len(text.documents[0].split()) == corpora.SYNTHETIC_TOKENS
    assert text == read("synthetic")
    assert text.documents[0] != synthetic.text(corpora.SYNTHETIC_TOKENS, synthetic.TRAINING_SEED)


def test_declared_names_are_relative_to_their_file_and_known_names_beat_them(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("mine")
    declared = Declared(tmp_path, datasets={"mine": "text:a.txt", "lee": "text:a.txt", "odd": "nothing"})
    assert read("mine", declared).documents == ("mine",)
    assert read("lee", declared).documents != ("mine",)
    with pytest.raises(UnknownName, match="unknown dataset 'nothing'"):
        corpora.resolve(parse("odd"), declared)


def test_names_of_installed_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    def point(value: object) -> Any:
        return types.SimpleNamespace(name="extra", value="there:TEXT", load=lambda: value)

    file = "package:gensim/test/test_data/lee_background.cor"
    for value, message in ((file, ""), (3, "is no specification as a string")):
        monkeypatch.setattr(catalog, "entry_points", lambda group, value=value: [point(value)])
        corpora.installed.cache_clear()
        if message:
            with pytest.raises(HarnessError, match=message):
                read("extra")
        else:
            assert read("extra").joined("sentence").texts[0]
    monkeypatch.undo()
    corpora.installed.cache_clear()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("wikitext2", "did you mean 'wikitext-2'"),
        ("lee:3", "takes no such argument"),
        ("lee:lines=3", "takes no such argument"),
        ("hub:justname", "hub:ORG/NAME"),
        ("hub:a/b/c/d/e", "hub:ORG/NAME"),
    ],
)
def test_bad_names_without_touching_anything(text: str, message: str) -> None:
    with pytest.raises(HarnessError, match=message):
        corpora.resolve(parse(text), Declared(Path()))


def test_hub_grammar() -> None:
    commit = "0123456789" * 4
    full = hub.parse_text(f"org/name/config/validation@{commit}")
    assert full == hub.HubText("org/name", "config", "validation", commit)
    assert full.commit == commit
    assert hub.parse_text("org/name@main") == hub.HubText("org/name", None, "test", "main")
    assert hub.parse_text("org/name@main").commit == ""


class Table:
    """Stands in for a datasets.Dataset."""

    def __init__(self, cached_at: str = "", **columns: list[str]) -> None:
        self.columns = columns
        self.features = {name: types.SimpleNamespace(dtype="string") for name in columns}
        self.cache_files = [{"filename": f"somewhere/{cached_at}/data.arrow"}]

    def __getitem__(self, name: str) -> list[str]:
        return self.columns[name]


def serve(monkeypatch: pytest.MonkeyPatch, table: Table, reason: str = "") -> list[Any]:
    asked: list[Any] = []

    def load_dataset(*arguments: Any, **more: Any) -> Table:
        asked.append((arguments, more))
        return table

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr(hub, "unreachable", lambda text: reason)
    return asked


WIKITEXT_ROWS = [
    *("", " = One @-@ act = \n", "", " A ( b ) . \n", " = = Part = = \n", ""),
    *(" = Two = \n", "", " C 's . \n"),
]


def test_wikitext_joins_rows_and_cuts_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "b08601e04326c79dfdd32d625aee71d232d685c3"
    asked = serve(monkeypatch, Table(commit, text=WIKITEXT_ROWS))
    wikitext = read("wikitext-2")
    assert asked == [(("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "test", "revision": commit})]
    assert (wikitext.revision, wikitext.split) == (commit, "test")
    for protocol in ("chunk", "stride", "gptq", "half"):
        assert wikitext.joined(protocol).texts == ("\n\n".join(WIKITEXT_ROWS),)
    pages = wikitext.joined("rolling")
    assert pages.originals == (
        " = One @-@ act = \n \n A ( b ) . \n = = Part = = \n ",
        " = Two = \n \n C 's . \n",
    )
    assert pages.texts == (" = One-act =\n\nA (b).\n== Part ==\n", " = Two =\n\nC's.\n")
    assert wikitext.joined("sentence").texts[3] == " A ( b ) . "


def test_detokenizer_rules_by_hand() -> None:
    page = '10 @,@ 000 , 3 @.@ 5 ; of N [ x ] : 20 \N{DEGREE SIGN} C ! it \'s { y } \n a " quoted word " ? no \n '
    assert corpora.detokenize_wikitext(page) == (
        '10,000, 3.5; of 1 [x]: 20\N{DEGREE SIGN}C! it\'s {y}\na "quoted word"? no\n'
    )
    assert corpora.detokenize_wikitext("the dogs ' tails") == "the dogs' tails"
    assert corpora.detokenize_wikitext("say ' no ' = = = = X = = = =") == "say 'no' ==== X ===="


def test_hub_rows_take_the_text_column(monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, Table(text=["a", "b\n"], title=["t", "u"]))
    rows = read("hub:org/name@main")
    assert rows.joined("chunk").texts == ("a\n\nb\n",)
    assert rows.joined("rolling").texts == rows.joined("sentence").texts == ("a", "b")
    assert rows.revision == hashlib.sha256(b"a\0b\n").hexdigest()  # main moves: the content identifies it
    serve(monkeypatch, Table(sentence=["a"]))
    assert read("hub:org/name").documents == ("a",)
    serve(monkeypatch, Table(one=["a"], two=["b"]))
    with pytest.raises(
        BadFile, match="and not just one column of strings: one, two; name one as hub:org/name:column=one"
    ):
        read("hub:org/name")
    named = read("hub:org/name@main:column=two")
    assert (named.documents, named.name) == (("b",), "hub:org/name:column=two")
    with pytest.raises(BadFile, match="has no column 'three': one, two; name one as hub:org/name:column=one"):
        read("hub:org/name:column=three")
    serve(monkeypatch, Table(text=["", " "]))
    with pytest.raises(BadFile, match="holds no text"):
        read("hub:org/name")


def test_without_the_hub_only_a_copy_of_the_same_commit_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "b08601e04326c79dfdd32d625aee71d232d685c3"
    serve(monkeypatch, Table(commit, text=["a"]), reason="HF_HUB_OFFLINE is set")
    assert read("wikitext-2").documents == ("a",)
    serve(monkeypatch, Table("f" * 40, text=["a"]), reason="HF_HUB_OFFLINE is set")
    with pytest.raises(MissingAsset, match="cached at another revision than b08601e04326, and HF_HUB_OFFLINE is set"):
        read("wikitext-2")


def test_no_network_and_no_copy_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(MissingAsset, match="HF_HUB_OFFLINE is set and no copy is cached: connect, or name") as caught:
        corpora.check(parse("wikitext-2"), Declared(Path()))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["connection", "unknown", "bug"])
def test_what_the_hub_answers(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub import errors

    class ConnectError(Exception):
        __module__ = "httpx"

    class Gone(errors.RepositoryNotFoundError):
        def __init__(self) -> None:
            Exception.__init__(self)

    raised = {"connection": ConnectError(), "unknown": Gone(), "bug": KeyError("x")}[kind]

    def info(self: Any, *arguments: Any, **more: Any) -> None:
        raise raised

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)
    text = hub.parse_text("org/name")
    if kind == "connection":
        assert hub.unreachable(text) == "the Hub does not answer (ConnectError)"
    else:
        with pytest.raises(MissingAsset if kind == "unknown" else KeyError):
            hub.unreachable(text)


def test_every_protocol_reads_every_layout() -> None:
    for layout in corpora.LAYOUTS.values():
        for protocol in ("chunk", "stride", "gptq", "half", "rolling", "sentence"):
            reading = layout["joined" if protocol in corpora.JOINED else protocol]((" = T = \n", "b"))
            assert len(reading.texts) == len(reading.originals) > 0
            assert reading.how
