from dataclasses import fields
from pathlib import Path

import pytest

from harness.core.errors import BadFile, BadSpecification
from harness.core.options import SETTINGS, Options, address, batch, build, device_name, positive, read_declared
from harness.core.specification import parse, parse_models
from harness.inputs.models import names


def project(folder: Path, text: str) -> Path:
    (folder / "pyproject.toml").write_text(text)
    return folder


def test_no_table_is_not_active(tmp_path: Path) -> None:
    assert read_declared(tmp_path)[0] is False
    assert read_declared(project(tmp_path, "[tool.other]\n"))[0] is False
    assert read_declared(project(tmp_path, "[tool.harness]\n"))[0] is True


def test_declared_names_and_defaults(tmp_path: Path) -> None:
    text = """
[tool.harness.models]
mine = "path:checkpoints/mine"
[tool.harness.datasets]
notes = "text:notes.txt"
[tool.harness.options]
max-tokens = 100
resume = true
report-dir = "out"
"""
    _, declared = read_declared(project(tmp_path, text))
    options = build({}, declared, Path("/elsewhere"))
    assert declared.models == {"mine": "path:checkpoints/mine"}
    assert options.max_tokens == 100
    assert options.resume
    assert options.report_dir == tmp_path / "out"
    assert options.baselines == tmp_path / "baselines"
    given = build({"max_tokens": 7, "report_dir": Path("here")}, declared, Path("/elsewhere"))
    assert given.max_tokens == 7
    assert given.report_dir == Path("/elsewhere/here")


def test_names_read_from_elsewhere_are_kept_for_every_reader(tmp_path: Path) -> None:
    _, declared = read_declared(tmp_path)
    given = build({"models": parse_models("gpt2=path:copy,tiny-gpt2")}, declared, tmp_path)
    assert given.declared.sources == {"gpt2": "path:copy"}
    assert names.declared_source(parse("gpt2"), given.declared) == parse(f"path:{Path.cwd() / 'copy'}")
    assert names.declared_source(parse("tiny-gpt2"), given.declared) == parse("tiny:gpt2")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[tool.harness", "cannot be read as TOML"),
        ("[tool.harness]\nmodel = 'x'\n", "has no 'model'"),
        ("[tool.harness]\nmodels = 'x'\n", "must be a table"),
        ("[tool.harness]\nclaims = 'x'\n", "must be a list"),
        ("[tool.harness]\nsources = { gpt2 = 'path:x' }\n", "has no 'sources'"),
        ("[tool.harness.options]\nmax-token = 3\n", "did you mean 'max-tokens'"),
        ("[tool.harness.options]\nmax-tokens = 'x'\n", "no whole number"),
        ("[tool.harness.models]\nmine = ':'\n", "is no specification"),
    ],
)
def test_a_bad_table_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(BadFile, match=message) as caught:
        build({}, read_declared(project(tmp_path, text))[1], tmp_path)
    assert "\n" not in str(caught.value)


def test_readers_refuse_nonsense() -> None:
    assert positive("12") == 12
    for text in ("0", "-1", "x", "1.5", "²", "9" * 19):
        with pytest.raises(BadSpecification, match="whole number"):
            positive(text)
    with pytest.raises(BadSpecification, match="auto, cpu, cuda"):
        device_name("gpu")


def test_a_cluster_has_an_address() -> None:
    assert [address(text) for text in ("auto", "head:6379")] == ["auto", "head:6379"]
    for text in ("head", "head:", "head:99999", "head:²", "ray://head:1"):
        with pytest.raises(BadSpecification, match="is no address of a Ray cluster"):
            address(text)


def test_the_default_in_words_is_the_default() -> None:
    """What `--help` shows is read as what holds where nothing is given; words that no reader takes are listed here."""
    defaults = {item.name: item.default for item in fields(Options)}
    in_words = {"methods", "max_tokens", "shard", "ray_address"}
    for setting in SETTINGS:
        if setting.read is None:
            assert defaults[setting.name] is False
        elif setting.name not in in_words:
            assert setting.read(setting.default) == defaults[setting.name]


def test_a_batch_is_a_number_or_chosen() -> None:
    assert (batch("3"), batch("auto")) == (3, 0)
    for text in ("0", "automatic", ""):
        with pytest.raises(BadSpecification, match="no whole number above zero"):
            batch(text)
