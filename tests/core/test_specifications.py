from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.core.errors import BadSpecification
from harness.core.specification import (
    Specification,
    items,
    listed,
    parse,
    parse_list,
    parse_model,
    parse_models,
    with_column,
)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("gpt2", "gpt2"),
        (" nf4:block=128 ", "nf4:block=128"),
        ("bnb-nf4:dtype=bf16:compute=fp32", "bnb-nf4:compute=fp32:dtype=bf16"),
        ("absmax-int8:attention:layers=0-11", "absmax-int8:attention:layers=0-11"),
        ("stride:512:256", "stride:512:256"),
        ("path:/some/dir:with:colons", "path:/some/dir:with:colons"),
        ("hub:org/name@main", "hub:org/name@main"),
    ],
)
def test_parse_gives_the_canonical_text(text: str, canonical: str) -> None:
    assert str(parse(text)) == canonical


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no specification"),
        ("nf4[block]", "is no specification"),
        ("nf4:", "empty argument"),
        ("nf4:block=", "empty argument"),
        ("nf4::attention", "empty argument"),
        ("nf4:block=64:block=32", "gives 'block' twice"),
        ("path:", "names no source"),
    ],
)
def test_bad_specifications_say_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(BadSpecification, match=message):
        parse(text)


def test_lists_refuse_duplicates() -> None:
    assert [str(item) for item in parse_list("fp32,nf4:block=32")] == ["fp32", "nf4:block=32"]
    with pytest.raises(BadSpecification, match="twice"):
        parse_list("nf4,nf4")


def test_a_comma_belongs_to_a_path_where_it_is_written_so(tmp_path: Path) -> None:
    for name in ("text:a,b.txt", "path:/data/one, two,three", "gpt2=path:/a,b", "nf4:block=64"):
        assert items(listed([name, "lee"])) == [name, "lee"]
    assert [str(one) for one in parse_list(r"text:a\,b.txt,lee")] == ["text:a,b.txt", "lee"]
    (tmp_path / "a,b.txt").touch()
    with pytest.raises(BadSpecification, match=r"a comma that belongs to a path is written '\\,'"):
        parse_list(f"lee,text:{tmp_path}/a,b.txt")


def test_a_column_stands_behind_what_it_is_of() -> None:
    assert with_column("C:/x.csv:column=body") == ("C:/x.csv", "body")
    assert with_column("a:b.txt") == ("a:b.txt", "")
    assert str(parse("text:x.csv:column=body")) == "text:x.csv:column=body"
    with pytest.raises(BadSpecification, match="names no column"):
        with_column("x.csv:column=")


def test_a_model_may_say_where_its_name_is_read_from() -> None:
    named = parse_model("gpt2=path:/a=b")
    assert (str(named), named.source, named) == ("gpt2", "path:/a=b", parse("gpt2"))
    assert (parse_model("path:/a=b"), parse_model("nf4:block=64").source) == (parse("path:/a=b"), "")
    for wrong in ("gpt2=", "gpt2=path:", "=path:/a"):
        with pytest.raises(BadSpecification):
            parse_model(wrong)
    with pytest.raises(BadSpecification, match="twice"):
        parse_models("gpt2=path:/a,gpt2=path:/b")


NAMES = st.from_regex(r"[a-z][a-z0-9_-]{0,8}", fullmatch=True)
WORDS = st.from_regex(r"[a-z0-9*@+/._-]{1,8}", fullmatch=True)
SPECIFICATIONS = st.builds(
    Specification,
    NAMES.filter(lambda name: name not in {"path", "hub", "package", "text", "text-raw", "ptb"}),
    st.lists(WORDS, max_size=3).map(tuple),
    st.dictionaries(NAMES, WORDS, max_size=3).map(lambda pairs: tuple(sorted(pairs.items()))),
)


@given(SPECIFICATIONS)
def test_the_canonical_text_parses_back(specification: Specification) -> None:
    assert parse(str(specification)) == specification


@given(SPECIFICATIONS, SPECIFICATIONS)
def test_file_names_never_collide(one: Specification, other: Specification) -> None:
    assert (one.filename == other.filename) == (one == other)
    assert "/" not in one.filename
    assert "@" not in one.filename


def test_names_that_differ_in_punctuation_are_two_files() -> None:
    assert parse("gpt2-nf4").filename != parse("gpt2_nf4").filename
