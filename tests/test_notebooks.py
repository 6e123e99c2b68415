"""The notebooks, executed from start to end on eight simulated devices, with small settings."""

import os
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient

from benchmarks.compare import twin
from flax_nets import registry

FOLDER = Path(__file__).parent.parent / "notebooks"
SMALL = {
    "train_on_tpu": "EPOCHS, BATCH = 2, 64",
    "convert_and_finetune": (
        'MODEL, WEIGHTS, SIDE, COUNT, EPOCHS, BATCH = "resnet18", "resnet18.pth", 48, 64, 4, 16'
    ),
    "tour_of_the_networks": 'NAMES = ["lenet5", "resnet20_cifar", "mobilenet_v3_small"]',
}


def test_every_notebook_is_run():
    assert sorted(SMALL) == sorted(path.stem for path in FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("name", SMALL)
def test_it_runs_from_start_to_end(name, tmp_path, monkeypatch):
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    (settings,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", ())]
    names = settings.source  # each setting that the test makes smaller is one of the notebook's
    changed = SMALL[name].partition(" = ")[0].split(", ")
    assert all(f"{setting} = " in names for setting in changed)
    settings.source += f"\n{SMALL[name]}"

    torch.save(twin(registry.resolve("resnet18")).float().state_dict(), tmp_path / "resnet18.pth")
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    monkeypatch.setenv("PYTHONPATH", os.fspath(FOLDER.parent))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": os.fspath(tmp_path)}}
    ).execute()

    printed = "".join(
        output.text
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if output.output_type == "stream" and output.name == "stdout"
    )
    if name == "train_on_tpu":
        assert "8 x cpu" in printed
        assert "equal: every stage within 1e-12" in printed
    if name == "convert_and_finetune":
        accuracy = float(printed.partition("held out: ")[2].partition("%")[0])
        assert accuracy > 80
