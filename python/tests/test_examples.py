"""The notebook, and the guide's examples."""

import json
import re

import pytest
from conftest import REPOSITORY

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")


def test_the_notebook_runs(monkeypatch, capsys):
    matplotlib = pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    matplotlib.use("agg")
    monkeypatch.chdir(REPOSITORY)
    notebook = json.loads((REPOSITORY / "python/examples/compare.ipynb").read_text())
    names: dict = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)  # noqa: S102
    results = names["results"]
    assert len(results) == 11
    # More atoms, more bytes, nearer predictions.
    assert results[0][1] < results[5][1] and results[0][2] > results[5][2]
    assert "of FP16" in capsys.readouterr().out


def test_the_guide_is_right(monkeypatch, tmp_path, capsys):
    guide = (REPOSITORY / "docs/PYTHON.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", guide, re.S)
    assert len(blocks) == 4 and all(block.count("\n") < 20 for block in blocks)
    (tmp_path / "models").symlink_to(REPOSITORY / "models")
    prose = (REPOSITORY / "README.md").read_text() + (REPOSITORY / "docs/METHOD.md").read_text()
    (tmp_path / "text.txt").write_text(prose)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(blocks[0], names)  # noqa: S102
    assert "of FP16" in capsys.readouterr().out
    exec(blocks[2], names)  # noqa: S102
    capsys.readouterr()
    exec(blocks[3], names)  # noqa: S102
    assert capsys.readouterr().out.count("[") == 2
    # As it stands, but for its effort.
    import lexico

    learn = lexico.learn

    def few(*arguments, effort, **options):
        return learn(*arguments, effort=effort, tokens=1024, context=128, vectors=2048, **options)

    monkeypatch.setattr(lexico, "learn", few)
    exec(blocks[1], names)  # noqa: S102
    assert lexico.Dictionaries.load("dictionary.safetensors").max_sparsity(additive=True) == 32
