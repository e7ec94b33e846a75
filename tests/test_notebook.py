"""The notebook runs, and shows the outputs that it has now."""

import re
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "examples/tour.ipynb"


def executed(path: Path):
    """A notebook with its outputs, run from its folder by this Python, with this clone."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute(cwd=str(path.parent))
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times
        if cell.get("outputs"):  # a print may come in several parts
            text = "".join(output["text"] for output in cell.outputs)
            cell.outputs = [nbformat.v4.new_output("stream", text=text)]
    return notebook


def printed(notebook) -> list[str]:
    return [cell.outputs[0].text for cell in notebook.cells if cell.get("outputs")]


@pytest.mark.slow
def test_the_tour_prints_what_it_shows(monkeypatch):
    import nbformat

    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[1]))
    shown, now = printed(nbformat.read(NOTEBOOK, as_version=4)), printed(executed(NOTEBOOK))
    number = r"\d+\.\d+"  # torch's random numbers are the same everywhere, roundings may differ
    assert [re.sub(number, "#", text) for text in now] == [re.sub(number, "#", t) for t in shown]
    for text, before in zip(now, shown, strict=True):
        numbers = [[float(n) for n in re.findall(number, t)] for t in (text, before)]
        assert numbers[0] == pytest.approx(numbers[1], abs=0.11)


def test_the_tour_is_committed_with_small_outputs():
    import nbformat

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert NOTEBOOK.stat().st_size < 20_000


if __name__ == "__main__":  # python tests/test_notebook.py: run it, and keep the outputs
    import nbformat

    nbformat.write(executed(NOTEBOOK), NOTEBOOK)
