"""The README says what is: its op table is the generated one, its Python example runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"


def test_op_table_is_the_generated_one():
    table = subprocess.run([sys.executable, "-m", "ldmfast.ops", "--markdown"], text=True, capture_output=True,
                           check=True, cwd=README.parent).stdout.strip()
    assert table.count("\n") >= 7 and table in README.read_text(), "run python -m ldmfast.ops --markdown"


def test_python_example_runs(tmp_path, monkeypatch):
    code = re.search(r"```python\n(.*?)```", README.read_text(), re.S).group(1)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    from PIL import Image

    with Image.open(tmp_path / "circle.png") as image:
        assert image.size == (64, 64) and len(set(image.getdata())) > 50


def test_every_solver_is_listed():
    """tcd was added to the registry and not to the README."""
    from ldmfast.samplers.registry import SOLVERS

    listed = re.search(r"\nSolvers: `([^`]*)`", README.read_text()).group(1).split()
    assert sorted(listed) == sorted(SOLVERS)
