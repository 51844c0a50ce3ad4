"""Dataset files of any bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.core.options import Declared
from harness.core.specification import parse
from harness.inputs.texts import corpora, protocols
from studies import tiny
from tests.fuzz.bounds import quick, slow, survives
from tests.fuzz.damage import HOSTILE, texts

PROTOCOLS = ("chunk:32", "stride:32:16", "gptq:32", "rolling:32", "half:32", "sentence")
TABLES = tuple(f"a{ending}" for ending in sorted(corpora.SPECIAL))


@quick
@given(data=st.one_of(st.binary(max_size=300), texts.map(lambda text: text.encode(errors="surrogatepass"))))
def test_any_bytes_are_a_text_or_refused(tmp_path: Path, data: bytes) -> None:
    kinds = [("text", "text.txt"), ("text-raw", "text.txt"), ("ptb", "text.txt"), *(("text", name) for name in TABLES)]
    for kind, name in kinds:
        (tmp_path / name).write_bytes(data)
        survives(corpora.read, parse(f"{kind}:{tmp_path / name}"), Declared(tmp_path))


@slow
@given(text=st.one_of(texts, st.text(min_size=200, max_size=2000)), name=st.sampled_from(PROTOCOLS))
def test_any_text_is_planned_or_refused(tmp_path: Path, text: str, name: str) -> None:
    (tmp_path / "text.txt").write_bytes(text.encode(errors="replace"))

    def planned() -> None:
        corpus = corpora.read(parse(f"text:{tmp_path / 'text.txt'}"), Declared(tmp_path))
        protocol = protocols.parse(parse(name))
        plan = protocols.plan(corpus, protocol, tiny.tokenizer(), context=64, max_tokens=500)
        assert plan.tokens <= 500

    survives(planned)


@pytest.mark.parametrize("name", [*HOSTILE, "", ".", "/", "/dev/null", "/proc/self/mem", "/etc"])
def test_names_of_no_text(tmp_path: Path, name: str) -> None:
    def read() -> None:
        corpora.read(parse(f"text:{name}"), Declared(tmp_path))

    assert survives(read) is None or Path(name).is_file()
