"""The page of the networks says what the code says."""

import pytest

from benchmarks import networks
from flax_nets import registry


def test_up_to_date(capsys):
    """All words and names; figures counted anew for one variant of each file."""
    first = [next(iter(registry.module(file).VARIANTS)) for file in registry.FILES]
    assert networks.main(["--check", "--only", *first]) == 0, capsys.readouterr().err


def test_every_variant_has_its_row():
    variants = {name for file in registry.FILES for name in registry.module(file).VARIANTS}
    for path in networks.PAGES.values():
        rows = networks.believed(path.read_text("utf-8"))
        assert {name for name, figures in rows.items() if figures[1][0].isdigit()} == variants


@pytest.mark.parametrize("change", ["416,520", "torch_ref", "LeCun"])
def test_a_change_is_noticed(change, tmp_path, monkeypatch, capsys):
    pages = {}
    for language, path in networks.PAGES.items():
        text = path.read_text("utf-8")
        pages[language] = tmp_path / path.name
        pages[language].write_text(text.replace(change, "7", 1), "utf-8")
    monkeypatch.setattr(networks, "PAGES", pages)
    assert networks.main(["--check", "--only", "lenet5"]) == 1
    assert "networks.md is out of date" in capsys.readouterr().err


def test_largest_errors(tmp_path, monkeypatch):
    file = tmp_path / "parity.jsonl"
    file.write_text(
        '{"job": "torch_ref/a", "eval": {"outputs": 2e-15, "gradients": 3e-13,'
        ' "input_gradient": 4e-13}, "equal": true}\n'
        '{"job": "timm/a", "equal": false, "error": "killed"}\n'
    )
    monkeypatch.setattr(networks, "PARITY", file)
    measured = networks.errors()
    assert networks.worst(["torch_ref/a", "timm/a"], measured, "en") == "2e-15 / 4e-13"
    assert networks.worst(["timm/a"], measured, "en") == "not measured yet"
