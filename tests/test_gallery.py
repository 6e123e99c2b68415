"""The page of the networks says what the code says."""

import re
from xml.etree import ElementTree

import pytest

from benchmarks import drawing, gallery
from flax_nets import registry


def test_up_to_date(capsys):
    """All words and names; figures counted anew for one variant of each file."""
    first = [next(iter(registry.module(file).VARIANTS)) for file in registry.FILES]
    assert gallery.main(["--check", "--only", *first]) == 0, capsys.readouterr().err


def test_every_variant_has_its_row():
    variants = {name for file in registry.FILES for name in registry.module(file).VARIANTS}
    for path in gallery.PAGES.values():
        rows = gallery.believed(path.read_text("utf-8"))
        assert {name for name, figures in rows.items() if figures[1][0].isdigit()} == variants


@pytest.mark.parametrize("change", ["416,520", "torch_ref", "LeCun"])
def test_a_change_is_noticed(change, tmp_path, monkeypatch, capsys):
    pages = {}
    for language, path in gallery.PAGES.items():
        text = path.read_text("utf-8")
        pages[language] = tmp_path / path.name
        pages[language].write_text(text.replace(change, "7", 1), "utf-8")
    monkeypatch.setattr(gallery, "PAGES", pages)
    assert gallery.main(["--check", "--only", "lenet5"]) == 1
    assert "networks.md is out of date" in capsys.readouterr().err


def test_largest_errors(tmp_path, monkeypatch):
    file = tmp_path / "parity.jsonl"
    file.write_text(
        '{"job": "torch_ref/a", "eval": {"outputs": 2e-15, "gradients": 3e-13,'
        ' "input_gradient": 4e-13}, "equal": true}\n'
        '{"job": "timm/a", "equal": false, "error": "killed"}\n'
    )
    monkeypatch.setattr(gallery.parity, "OUT", file)
    measured = gallery.errors()
    assert gallery.worst(["torch_ref/a", "timm/a"], measured, "en") == "2e-15 / 4e-13"
    assert gallery.worst(["timm/a"], measured, "en") == "not measured yet"


def test_distances_in_float32(tmp_path, monkeypatch):
    file = tmp_path / "float32.jsonl"
    file.write_text(
        '{"job": "timm/a", "ours": 3e-7, "theirs": 2e-7, "equal": true}\n'
        '{"job": "timm/b", "equal": false, "error": "killed"}\n'
    )
    monkeypatch.setattr(gallery.parity, "OUT32", file)
    assert gallery.worst(["timm/a", "timm/b"], gallery.distances(), "en") == "3e-07 / 2e-07"


def test_the_page_of_parity(tmp_path, monkeypatch):
    """Written from what has been measured, failures included; nothing is run."""
    for name, row in (
        (
            "OUT",
            '{"job": "timm/resnet50", "parameters": 7, "eval": {"outputs": 2e-15, "gradients": '
            '3e-13, "input_gradient": 4e-13}, "equal": true}\n'
            '{"job": "timm/vgg11", "equal": false, "error": "flax: killed"}\n'
            '{"job": "torch_ref/vgg11", "parameters": 7, "train": {"outputs": 2e-12, "gradients": '
            '3e-13, "input_gradient": 4e-13, "statistics": 0}, "itself": {"outputs": 3e-12, '
            '"gradients": 0, "input_gradient": 0, "statistics": 0}, "equal": true}\n',
        ),
        ("OUT32", '{"job": "timm/resnet50", "ours": 3e-7, "theirs": 2e-7, "equal": true}\n'),
        ("PAGE", ""),
    ):
        monkeypatch.setattr(gallery.parity, name, tmp_path / name)
        (tmp_path / name).write_text(row)
    monkeypatch.setattr("sys.argv", ["parity", "--table"])
    assert gallery.parity.main() == 0
    page = (tmp_path / "PAGE").read_text()
    assert "| timm | resnet50 | 7 | 2e-15 | 3e-13 | 4e-13 | - | 3.0e-07 / 2.0e-07 |" in page
    assert "| timm | vgg11 | failed: flax: killed |" in page
    assert "| torch_ref | vgg11 | 7 | 2e-12 (3e-12) | 3e-13 | 4e-13 | 0e+00 | - |" in page
    assert "3 of " in page and "2 of them within the limits" in page


@pytest.mark.parametrize("itself", [{}, {"outputs": 1e-12}, {"outputs": 3e-12}])
def test_pytorch_against_itself_is_the_measure_in_train_mode_only(itself):
    row = {"train": {"outputs": 2e-12, "gradients": 1e-10}, "itself": itself}
    assert gallery.parity.equal(row) == (itself == {"outputs": 3e-12})
    assert not gallery.parity.equal(row | {"eval": {"outputs": 2e-12}})


def test_a_drawing_shows_every_box_once():
    svg = drawing.blocks('Block: "x" > ({conv 3x3|BN} x 2 ; ) + > (A ; B) concatenate > "y"')
    texts = re.findall(r">\s*([^<>]+?)\s*</text>", svg)
    assert texts == ["Block", "x", "x 2", "conv 3x3", "BN", "+", "A", "B", "concatenate", "y"]
    root = ElementTree.fromstring(svg)
    assert float(root.get("width")) > 0 and float(root.get("height")) > 0


@pytest.mark.parametrize("text", ["x > (a ; b", "x > (a ; b) > y", "x > {a > b}", "a ) > b"])
def test_a_drawing_that_makes_no_sense_is_refused(text):
    with pytest.raises(ValueError):
        drawing.parse(text)


@pytest.mark.parametrize("file", [*registry.FILES, *gallery.MODULES])
def test_the_code_shown_has_the_same_methods_in_both_files(file):
    """Whole classes or functions, in lines short enough for two to stand beside each other."""
    for name in gallery.IDEAS[file]["code"]:
        where, name = name.rpartition(".")[0] or file, name.rpartition(".")[2]
        both = [gallery.pieces(room, where, name) for room in gallery.ROOMS]
        assert not any('"""' in piece for side in both for piece in side)
        theirs, ours = ([n for p in side for n in re.findall(r"def (\w+)", p)] for side in both)
        theirs = ["__call__" if name == "forward" else name for name in theirs]
        assert [n for n in theirs if n in ours or n[0] != "_"] == ours
        lines = [line for side in both for piece in side for line in piece.splitlines()]
        assert max(map(len, lines)) <= 1.3 * gallery.COLUMNS
