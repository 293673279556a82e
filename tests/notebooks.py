# SPDX-License-Identifier: Apache-2.0
"""Run the notebooks with the installed package, on the model inside it; needs dsv4[notebooks].

    python tests/notebooks.py [NUMBER...] [--pictures] [--limit SECONDS]

Each runs in a kernel of its own, in the folder `notebooks`; nothing is written.  Ends with status 1
if a cell fails or writes to standard error, or if all of them together take longer than the limit.
--pictures writes the plots of cells tagged `picture:NAME` to notebooks/pictures/NAME.png.
"""

import argparse
import base64
import os
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
MOST_BYTES = 150_000  # of a picture


def execute(path: Path) -> Any:
    """The notebook with its outputs; CellExecutionError with the cell and its traceback."""
    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources=where).execute()
    return notebook


def complaints(notebook: Any) -> list[str]:
    """What cells wrote to standard error."""
    return [output.text for cell in notebook.cells for output in cell.get("outputs", [])
            if output.output_type == "stream" and output.name == "stderr"]


def pictures(notebook: Any) -> dict[str, bytes]:
    """PNG by name, of the cells that are tagged."""
    found = {}
    for cell in notebook.cells:
        for tag in cell.metadata.get("tags", []):
            data = [output.data["image/png"] for output in cell.outputs
                    if "image/png" in output.get("data", {})]
            if tag.startswith("picture:"):
                (found[tag.removeprefix("picture:")],) = map(base64.b64decode, data)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="run the notebooks")
    parser.add_argument("numbers", nargs="*", metavar="NUMBER", help="such as 01; all by default")
    parser.add_argument("--pictures", action="store_true")
    parser.add_argument("--limit", type=float, default=300, metavar="SECONDS")
    options = parser.parse_args()
    os.environ["PYTHONSAFEPATH"] = "1"  # kernels start in a folder that is none of the package
    failed, began = [], time.perf_counter()
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        if options.numbers and path.name[:2] not in options.numbers:
            continue
        start = time.perf_counter()
        try:
            notebook = execute(path)
            told = complaints(notebook)
        except CellExecutionError as error:
            notebook, told = None, [str(error)]
        print(f"{path.name:32} {time.perf_counter() - start:6.1f} s", flush=True)
        if told:
            failed.append(path.name)
            print(*told, sep="\n")
        if options.pictures and notebook is not None:
            for name, data in pictures(notebook).items():
                if len(data) > MOST_BYTES:
                    failed.append(f"{name}: {len(data)} bytes, at most {MOST_BYTES}")
                (NOTEBOOKS / "pictures" / f"{name}.png").write_bytes(data)
    seconds = time.perf_counter() - began
    print(f"together {seconds:.1f} s (limit {options.limit:.0f})")
    if seconds > options.limit:
        failed.append("the limit of time")
    if failed:
        print("FAILED:", ", ".join(failed))
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
