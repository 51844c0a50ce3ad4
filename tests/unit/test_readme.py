"""The README's tree is the code's own: a line a file. `python tests/unit/test_readme.py` writes it."""

import ast
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
WIDTH = 96  # characters of a line behind the file name
SPLIT = re.compile(r"(?s)(## What is where\n\n```text\n)(.*?)(```\n)")


def summary(path: Path) -> str:
    """The first sentence of a module's docstring."""
    text = " ".join((ast.get_docstring(ast.parse(path.read_text())) or "").split())
    sentence = re.split(r"(?<=[.])(?<!et al[.])\s", text)[0].removesuffix(".")
    if len(sentence) <= WIDTH:
        return sentence
    clause = re.match(rf".{{20,{WIDTH}}}(?=[:;,] )", sentence)
    return clause[0] if clause else sentence[:WIDTH].rsplit(" ", 1)[0] + " ..."


def tree() -> str:
    """harness/ with a line a file."""
    lines = ["harness/"]
    paths = sorted((ROOT / "harness").rglob("*.py"), key=lambda path: (len(path.parts) > len(ROOT.parts) + 2, path))
    folder = ROOT / "harness"
    for path in paths:
        if path.parent != folder:
            folder = path.parent
            lines.append(f"  {folder.relative_to(ROOT / 'harness')}/")
        indent = "  " if path.parent == ROOT / "harness" else "    "
        if path.name != "__init__.py":
            lines.append(f"{indent}{path.name:<24}{summary(path)}")
    return "\n".join(lines) + "\n"


def test_the_tree_is_the_codes_own() -> None:
    found = SPLIT.search(README.read_text())
    assert found
    assert found[2].startswith(tree()), "run: python tests/unit/test_readme.py"


def test_the_readme_opens_with_the_two_commands() -> None:
    text = README.read_text()
    block = text.split("```console\n")[1].split("```")[0]
    assert [line.split("#")[0].split("&&")[-1].split()[1:] for line in block.splitlines()] == [
        ["run", "-e", "report"],
        ["run"],
    ]


def test_every_dependency_is_locked() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    locked = {
        re.split(r"[=<>\[]", line)[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    }
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    assert {re.split(r"[=<>\[]", item)[0].lower().replace("_", "-") for item in wanted} <= locked


if __name__ == "__main__":
    text = README.read_text()
    rest = SPLIT.search(text)
    after = rest[2].partition("tests/")[1:] if rest else ("", "")
    README.write_text(SPLIT.sub(lambda match: match[1] + tree() + "".join(after) + match[3], text))
