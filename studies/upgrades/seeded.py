"""A wheel of the installed bitsandbytes in which the scales of LLM.int8 are 1% too large: a fault that must be found.

`python -m studies.upgrades.seeded DIR` writes DIR/bitsandbytes-VERSION+seeded-py3-none-any.whl.
"""

from __future__ import annotations

import sys
import zipfile
from importlib.metadata import distribution
from pathlib import Path

FILE = "bitsandbytes/nn/modules.py"
LINE = (
    "        CB, SCB, _ = bnb.functional.int8_vectorwise_quant(B)\n"  # where a weight is quantized, activations are not
)
SEEDED = LINE + "        SCB = SCB * 1.01\n"


def wheel(folder: Path, label: str = "seeded") -> Path:
    """Write the wheel; SystemExit where the installed release quantizes weights in another line."""
    installed = distribution("bitsandbytes")
    version = f"{installed.version}+{label}"
    path = folder / f"bitsandbytes-{version}-py3-none-any.whl"
    info = f"bitsandbytes-{version}.dist-info"
    names = []
    with zipfile.ZipFile(path, "w") as archive:
        for file in installed.files or ():
            name = str(file)
            if not name.startswith("bitsandbytes/") or "__pycache__" in name or "_cuda" in name or "_rocm" in name:
                continue  # other devices' libraries are large and never loaded here
            data = Path(str(installed.locate_file(file))).read_bytes()
            if name == FILE:
                if data.count(LINE.encode()) != 1:
                    sys.exit(
                        f"{FILE} of bitsandbytes {installed.version} quantizes weights in another line than {LINE!r}"
                    )
                data = data.replace(LINE.encode(), SEEDED.encode())
            archive.writestr(name, data)
            names.append(name)
        metadata = (installed.read_text("METADATA") or "").replace(
            f"Version: {installed.version}", f"Version: {version}", 1
        )
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: seeded\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        listed = [*names, f"{info}/METADATA", f"{info}/WHEEL", f"{info}/RECORD"]
        archive.writestr(f"{info}/RECORD", "".join(f"{name},,\n" for name in listed))
    return path


if __name__ == "__main__":
    print(wheel(Path(sys.argv[1])))
