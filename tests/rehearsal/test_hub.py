"""The harness's own Hub code against the loopback Hub, by the real clients: what serves, what breaks, and what is told.

Every session is a process of its own, since the clients read HF_ENDPOINT when they are imported.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from harness.inputs.hub import parse_text
from harness.inputs.texts import corpora
from tests.rehearsal import folders
from tests.rehearsal.hub import Cut, Hub, Repository, serving

OLD, NEW = "0" * 39 + "1", "0" * 39 + "2"
WEIGHTS = 200_000  # bytes
FETCH = """
import sys
from pathlib import Path
from huggingface_hub import constants, file_download
from harness.inputs import hub
from harness.inputs.models import names
from harness.inputs.texts import corpora
from harness.core.errors import HarnessError
from harness.core.options import Declared
from harness.core.specification import parse

constants.DOWNLOAD_CHUNK_SIZE = 1 << 16  # bytes written at once: what a resumed transfer goes on from
file_download.time.sleep = lambda seconds: None  # the client waits a second before each of five tries
kind, name = sys.argv[1:]
here = Declared(Path())
try:
    if kind == "model":
        print(hub.download_model(names.locate(parse(name), here).snapshot))
    else:
        corpora.check(parse(name), here)
        read = corpora.read(parse(name), here)
        print(read.revision, "|".join(read.documents).replace("\\n", "~"))
except HarnessError as error:
    assert "\\n" not in str(error)
    sys.exit(f"told: {error}")
"""


@dataclass
class Client:
    """Sessions of one user: a home of its own, and a Hub to ask."""

    hub: Hub
    home: Path

    def run(self, kind: str, name: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = (sys.executable, "-c", FETCH, kind, name)
        world = self.hub.client(self.home) | environment
        return subprocess.run(command, env=world, cwd=self.home.parent, capture_output=True, text=True, check=False)

    def had(self, kind: str, name: str, **environment: str) -> str:
        """What a session that must succeed prints."""
        result = self.run(kind, name, **environment)
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    def told(self, kind: str, name: str, **environment: str) -> str:
        """The one line of a session that must fail, with no traceback."""
        result = self.run(kind, name, **environment)
        assert result.returncode != 0, result.stdout  # the parquet library can abort as the process ends
        assert "Traceback" not in result.stderr
        return next(line for line in result.stderr.splitlines() if line.startswith("told: ")).removeprefix("told: ")

    def cached(self) -> set[str]:
        """Names of the files that snapshots in the cache hold."""
        return {path.name for path in self.home.glob("hub/*/snapshots/*/*") if path.is_file()}


def repository(folder: Path, weights: bytes, **more: str) -> Path:
    """A repository as the Hub's are: beside what is fetched, other formats, onnx in a folder, a README."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [len(weights)], "data_offsets": [0, len(weights)]}}).encode()
    files: dict[str, bytes] = {
        "model.safetensors": len(header).to_bytes(8, "little") + header + weights,
        "pytorch_model.bin": b"pickled",
        "onnx/config.json": b"{}",
        "onnx/model.onnx": b"graph",
        "README.md": b"# a model\n",
        "config.json": b'{"model_type": "gpt2"}',
        "tokenizer.json": b"{}",
        "tokenizer_config.json": b"{}",
    }
    for name, data in (files | {name: text.encode() for name, text in more.items()}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as found:
        yield found


@pytest.fixture
def client(hub: Hub, tmp_path: Path) -> Client:
    """A user of a Hub that has two commits of a model, `main` at the new one."""
    commits = {
        OLD: repository(tmp_path / "old", bytes(WEIGHTS)),
        NEW: repository(tmp_path / "new", bytes(range(250)) * (WEIGHTS // 250)),
    }
    hub.repositories["models"]["org/name"] = Repository(commits, {"main": NEW, "v1": OLD})
    return Client(hub, tmp_path / "home")


def fetched(folder: str) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file()}


def test_a_model_is_fetched_once_and_then_serves_without_network(client: Client, tmp_path: Path) -> None:
    folder = client.had("model", "hub:org/name")
    assert Path(folder).name == NEW
    assert fetched(folder) == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert (Path(folder) / "model.safetensors").read_bytes() == (tmp_path / "new" / "model.safetensors").read_bytes()
    assert any(asked.endswith("?signature=made-up") for asked in client.hub.asked)  # by way of the other host
    client.hub.asked.clear()
    assert client.had("model", "hub:org/name", HF_HUB_OFFLINE="1") == folder
    assert client.had("model", "hub:org/name", HF_ENDPOINT="http://127.0.0.1:9") == folder  # nobody listens there
    assert client.hub.asked == []


def test_a_commit_and_a_branch_name_what_they_name(client: Client) -> None:
    folder = client.had("model", f"hub:org/name@{OLD}")
    assert Path(folder).name == OLD
    client.hub.asked.clear()
    assert client.had("model", f"hub:org/name@{OLD}") == folder
    assert client.hub.asked == []  # a commit that is cached is never asked for
    assert client.had("model", "hub:org/name@v1") == folder
    assert client.had("model", "hub:org/name@v1", HF_HUB_OFFLINE="1") == folder
    text = client.told("model", "hub:org/name", HF_HUB_OFFLINE="1")  # main is at another commit
    assert text == (
        "model 'hub:org/name' is not cached and HF_HUB_OFFLINE is set: unset it, or name a local copy as path:DIR"
    )


def test_a_branch_that_moved_is_followed_and_its_old_commit_serves_until_the_new_one_is_whole(client: Client) -> None:
    served = client.hub.repositories["models"]["org/name"]
    served.branches["main"] = OLD
    assert Path(client.had("model", "hub:org/name")).name == OLD
    served.branches["main"] = NEW
    client.hub.cuts["model.safetensors"] = Cut(WEIGHTS // 2, times=99)
    assert "broke off" in client.told("model", "hub:org/name")
    assert Path(client.had("model", "hub:org/name", HF_HUB_OFFLINE="1")).name == OLD
    client.hub.cuts.clear()
    assert Path(client.had("model", "hub:org/name")).name == NEW
    assert Path(client.had("model", "hub:org/name", HF_HUB_OFFLINE="1")).name == NEW


def test_a_model_that_was_renamed(client: Client) -> None:
    client.hub.moved["name"] = "org/name"
    assert Path(client.had("model", "hub:name")).name == NEW


def test_a_connection_that_breaks_half_way_is_resumed(client: Client, tmp_path: Path) -> None:
    client.hub.cuts["model.safetensors"] = Cut(WEIGHTS // 2)
    folder = client.had("model", "hub:org/name")
    assert any(asked.endswith("?signature=made-up bytes=65536-") for asked in client.hub.asked)
    assert (Path(folder) / "model.safetensors").read_bytes() == (tmp_path / "new" / "model.safetensors").read_bytes()


def test_a_connection_that_stays_broken_is_one_line_and_leaves_nothing_half_written(
    client: Client, tmp_path: Path
) -> None:
    client.hub.cuts["model.safetensors"] = Cut(WEIGHTS // 2, times=99)
    text = client.told("model", "hub:org/name")
    assert text == "the download of 'org/name' broke off (RemoteProtocolError): run again, it resumes"
    assert "model.safetensors" not in client.cached()
    offline = client.told("model", "hub:org/name", HF_HUB_OFFLINE="1")  # what is there does not pass for whole
    assert offline.startswith("model 'hub:org/name' is not cached and HF_HUB_OFFLINE is set")
    client.hub.cuts.clear()
    folder = client.had("model", "hub:org/name")
    assert (Path(folder) / "model.safetensors").read_bytes() == (tmp_path / "new" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("status", [0, 503])
def test_a_hub_that_goes_silent_behind_the_configuration_is_a_broken_download(client: Client, status: int) -> None:
    client.hub.failing["/tree/"] = status
    text = client.told("model", "hub:org/name")
    assert text.startswith("the download of 'org/name' broke off (")
    assert text.endswith("): run again, it resumes")
    client.hub.failing.clear()
    assert Path(client.had("model", "hub:org/name")).name == NEW


def test_what_the_hub_does_not_have(client: Client) -> None:
    for name, shown in (("org/gone", "'org/gone' at revision 'main'"), ("org/name@v9", "'org/name' at revision 'v9'")):
        assert client.told("model", f"hub:{name}") == (
            f"the Hub shows no model {shown}: check the name, or log in if it is private"
        )


def test_a_gated_model_and_a_gated_text_name_the_terms(client: Client, tmp_path: Path) -> None:
    """The Hub lists a gated repository's files to everybody and refuses the first of them."""
    client.hub.repositories["models"]["org/name"].gated = True
    text = client.told("model", "hub:org/name")
    assert text == "the Hub model 'hub:org/name' is gated: accept its terms on its page and run 'hf auth login'"
    folders.text(tmp_path / "text")
    client.hub.repositories["datasets"]["org/rows"] = Repository.of(tmp_path / "text", gated=True)
    text = client.told("text", "hub:org/rows/wikitext-2-raw-v1")
    assert text == (
        "the Hub dataset 'org/rows' at revision 'main' is gated: accept its terms on its page and run 'hf auth login'"
    )


def test_a_hub_out_of_order_and_a_token_out_of_date(client: Client) -> None:
    client.hub.failing["/revision/"] = 500
    assert "is not cached and the Hub answers with status 500: connect, or" in client.told("model", "hub:org/name")
    client.hub.failing["/revision/"] = 401
    client.hub.token_error = "Invalid credentials in Authorization header"
    assert "takes no token of yours for the model 'org/name'" in client.told("model", "hub:org/name", HF_TOKEN="hf_x")


WIKITEXT = parse_text(corpora.WIKITEXT_2)


def rows_of(printed: str) -> list[str]:
    return printed.partition(" ")[2].replace("~", "\n").split("|")


def test_the_text_is_read_and_then_serves_without_network(client: Client, tmp_path: Path) -> None:
    folders.stock(client.hub, tmp_path / "stock")
    printed = client.had("text", "wikitext-2")
    assert printed.split()[0] == WIKITEXT.commit
    assert rows_of(printed) == [row.strip() if not row.strip() else row for row in folders.rows()]
    client.hub.asked.clear()
    assert client.had("text", "wikitext-2", HF_HUB_OFFLINE="1") == printed
    assert client.had("text", "wikitext-2", HF_ENDPOINT="http://127.0.0.1:9") == printed
    assert client.hub.asked == []


def test_a_text_that_breaks_off_is_one_line_and_the_next_session_has_it(client: Client, tmp_path: Path) -> None:
    folders.stock(client.hub, tmp_path / "stock")
    parquet = next((tmp_path / "stock").rglob("*.parquet"))
    client.hub.cuts[parquet.name] = Cut(parquet.stat().st_size // 2, times=99)
    text = client.told("text", "wikitext-2")
    assert text.startswith("the text Salesforce/wikitext, wikitext-2-raw-v1, test cannot be had: ")
    assert not any(name.endswith(".parquet") for name in client.cached())
    client.hub.cuts.clear()
    assert client.had("text", "wikitext-2").split()[0] == WIKITEXT.commit


def test_a_text_of_another_commit_never_passes_for_the_pinned_one(client: Client, tmp_path: Path) -> None:
    """Where the Hub goes silent midway, `datasets` takes any copy that it has."""
    folders.stock(client.hub, tmp_path / "stock")
    served = client.hub.repositories["datasets"][WIKITEXT.repository]
    served.commits[OLD], served.branches["main"] = served.commits[WIKITEXT.commit], OLD
    client.had("text", f"hub:{WIKITEXT.repository}/{WIKITEXT.config}")
    client.hub.failing["/resolve/"] = 0
    text = client.told("text", "wikitext-2")
    assert "is cached at another revision than b08601e04326, and the Hub broke off: run again" in text


def test_a_text_with_damaged_pages_is_one_line(client: Client, tmp_path: Path) -> None:
    folders.text(tmp_path / "text")
    parquet = next((tmp_path / "text").rglob("*.parquet"))
    whole = parquet.read_bytes()
    parquet.write_bytes(whole[:64] + bytes(256) + whole[320:])
    client.hub.repositories["datasets"]["org/rows"] = Repository.of(tmp_path / "text")
    text = client.told("text", f"hub:org/rows/{WIKITEXT.config}")
    assert text.startswith(f"the text org/rows, {WIKITEXT.config}, test cannot be read (DatasetGenerationError: ")
