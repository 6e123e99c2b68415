"""The benchmarks of speed: that they measure what they say. Never how long anything takes."""

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from benchmarks import compile, growth, networks, operations, startup, throughput, timing
from benchmarks import convert as checkpoints
from flax_nets import cli, registry
from flax_nets.inspect import bench

ROOT = Path(__file__).parent.parent
COMMAND = ["bench", "--model", "lenet5", "--rounds", "2", "--batch-size", "2"]


@pytest.mark.parametrize("train", [False, True])
def test_the_command(train, capsys):
    assert cli.main([*COMMAND, "--json", *(["--train"] if train else [])]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["mode"] == ("training" if train else "inference")
    assert (told["batch_size"], told["image_size"], told["dtype"]) == (2, 32, "float32")
    auto, xla = told["forms"]["auto"], told["forms"]["xla"]
    assert told["ratios"] == {"xla": pytest.approx(auto["ms"] / xla["ms"])}
    weights = 4 * 61_706
    for row in (auto, xla):
        assert row["images_per_second"] == pytest.approx(2e3 / row["ms"])
        assert row["rounds"] == 2 and not row["cached"] and row["compile_seconds"] > 0
        assert row["memory"] > (2 * weights if train else weights)  # training has a momentum


def test_the_command_for_people(capsys):
    assert cli.main([*COMMAND, "--lowering", "cpu", "--dtype", "bfloat16"]) == 0
    head, columns, row = capsys.readouterr().out.splitlines()
    assert head.startswith("lenet5, inference: 2 images of 32 x 32 a step, bfloat16")
    assert len(columns.split("  ")) > 4 and row.split()[0] == "cpu"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "the following arguments are required: --model"),
        (["--model", "lenet6"], "did you mean 'lenet5'"),
        (["--model", "lenet5", "--batch-size", "0"], "batch_size: got 0, expected at least 1"),
        (["--model", "lenet5", "--rounds", "0"], "rounds: got 0"),
        (["--model", "lenet5", "--image-size", "-1"], "image_size: got -1"),
        (["--model", "lenet5", "--image-size", "48"], "another size than the network takes"),
        (["--model", "lenet5", "--lowering", "fast"], "invalid choice: 'fast'"),
        (["--model", "lenet5", "--dtype", "float8"], "invalid choice: 'float8'"),
    ],
)
def test_mistakes(arguments, words, capsys):
    assert cli.main(["bench", *arguments]) == 2
    printed = capsys.readouterr()
    assert words in printed.err and len(printed.err.splitlines()) == 1 and not printed.out


def test_a_side_that_is_too_slow_is_called_once(monkeypatch):
    calls = []
    monkeypatch.setattr(bench, "BUDGET", 0.0)
    found = bench.in_turns({"slow": lambda: calls.append(1)}, rounds=3)
    assert len(calls) == len(found["slow"]) == 1


def test_sides_take_turns(monkeypatch):
    calls = []
    monkeypatch.setattr(bench, "TURN", 0.0)
    monkeypatch.setattr(bench, "BUDGET", 1e9)
    found = bench.in_turns({name: lambda name=name: calls.append(name) for name in "ab"}, rounds=3)
    assert "".join(calls) == "aabb" + "ab" * (bench.SETTLING + 3)
    assert {name: len(values) for name, values in found.items()} == {"a": 3, "b": 3}


def test_what_is_compiled_is_kept_by_the_command_alone(tmp_path):
    """By a process of its own, where nothing says otherwise; and found by the next one."""

    def run(**environment):
        code = "import sys; from flax_nets import cli; sys.exit(cli.main())"
        lowest = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", code, *COMMAND, "--lowering", "auto", "--json"],
            env={"FLAX_NETS_HOME": str(tmp_path), **lowest, **environment},
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0 and not done.stderr, done.stderr
        return json.loads(done.stdout)["forms"]["auto"]["cached"]

    assert not run(JAX_ENABLE_COMPILATION_CACHE="0")
    assert not list(tmp_path.glob("compiled/*/*"))
    assert not run()
    assert list(tmp_path.glob("compiled/*/*"))
    assert run()
    assert jax.config.jax_compilation_cache_dir is None  # of this process, by the commands above


def test_networks_end_to_end(tmp_path, capsys):
    out, docs = tmp_path / "networks.jsonl", tmp_path / "docs"
    arguments = ["--only", "lenet5", "--rounds", "2", "--threads", "1", "--out", str(out)]
    assert timing.main(networks.BENCHMARK, [*arguments, "--write", str(docs)]) == 0
    printed = capsys.readouterr()
    assert "[1/1] lenet5" in printed.err and "| lenet5 (torch_ref) |" in printed.out
    (row,) = map(json.loads, out.read_text().splitlines())
    for mode in networks.MODES:
        ms = row[mode]["ms"]
        assert set(ms) == {"ours", "plain", *timing.LAYOUTS}
        better = min(ms[layout] for layout in timing.LAYOUTS)
        assert ms[row[mode]["layout"]] == better
        assert row[mode]["torch"] == pytest.approx(ms["ours"] / better)
        assert row[mode]["plain"] == pytest.approx(ms["ours"] / ms["plain"])
    page = (docs / "performance.md").read_text()
    assert "| lenet5 (torch_ref) |" in page and timing.versions() in page
    assert (docs / "performance.png").read_bytes()[:4] == b"\x89PNG"

    before = out.read_text()  # what has been measured is not measured again
    assert timing.main(networks.BENCHMARK, [*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [row]
    assert out.read_text() == before


def test_a_table_for_each_machine():
    """Of what was measured twice the last, whatever the number of rounds."""

    def row(job, rounds, ms, machine="one"):
        return dict(job=job, machine=machine, threads=2, rounds=rounds, ms=ms)

    rows = [row("a", 3, 1), row("a", 9, 2), row("b", 5, 3), row("a", 3, 4, machine="other")]
    text = timing.sections(rows, lambda own: " ".join(f"{r['job']}{r['ms']}" for r in own))
    setting = "2 threads for each framework; medians of"
    expected = [f"one; {setting} 5 to 9 rounds.", "a2 b3", f"other; {setting} 3 rounds.", "a4"]
    assert text.split("\n\n") == expected


def test_loading_of_checkpoints(monkeypatch):
    def here(code):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, {})
        return json.loads(printed.getvalue())

    monkeypatch.setattr(timing, "python", here)
    row = {"job": "lenet5", **checkpoints.measure("lenet5", rounds=1)}
    assert row["bytes"] == 4 * 61_706
    assert all(f"{side} {what}" in row["medians"] for side in ("ours", "torch") for what in WHAT)
    row["medians"] = dict.fromkeys(row["medians"], 1.0) | {"ours load": 2.0, "copy load": 0.5}
    assert "| 2000 / 1000 / 500, 2.00 | **4.00** |" in checkpoints.table([row])


WHAT = (*checkpoints.WHAT, "memory")
MODULES = (networks, operations, throughput, growth, compile, startup, checkpoints)
BENCHMARKS = [module.BENCHMARK for module in MODULES]


@pytest.mark.parametrize("benchmark", BENCHMARKS)
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only", "lenet6"], "--only lenet6: matches none of"),
        (["--rounds", "0"], "--rounds 0"),
        (["--threads", "0"], "--threads 0"),
    ],
)
def test_mistakes_of_benchmarks(benchmark, arguments, words, capsys, tmp_path):
    out = tmp_path / "out.jsonl"
    with pytest.raises(SystemExit) as ended:
        timing.main(benchmark, [*arguments, "--out", str(out)])
    assert ended.value.code == 2 and not out.exists()
    assert words in capsys.readouterr().err


def test_compiling(monkeypatch):
    """Ours and plain in turns, then by the cache."""
    asked = []

    def here(code, **more):
        asked.append((code, "JAX_COMPILATION_CACHE_DIR" in more))
        return compile.seconds("lenet5", "xla" if "xla" in code else "auto")

    monkeypatch.setattr(timing, "python", here)
    row = {"job": "lenet5", **compile.measure("lenet5", rounds=1)}
    assert [kept for _, kept in asked] == [True, True, False, False, False, False]
    assert min(row["ours"], row["theirs"], row["again"]) > 0
    row |= {"ours": 1.5, "theirs": 3, "again": 0.5}
    assert "| lenet5 | **1.50 s** | 12 s | 3.00 s | 0.50 | 0.50 s |" in compile.table([row])


def test_counting_operations_takes_the_cpu_backend(monkeypatch):
    def unknown(platform):
        raise RuntimeError(f"Unknown backend {platform}")

    monkeypatch.setattr("jax.devices", unknown)
    with pytest.raises(ValueError, match=r"add cpu to JAX_PLATFORMS \(cuda,cpu\)"):
        bench.operations(jax.numpy.sin, jax.numpy.ones(3))


def test_throughput(monkeypatch):
    """Each side with the same numbers and as many images; torch.compile is asked for."""
    compiled = []
    monkeypatch.setattr("torch.compile", lambda network: compiled.append(network) or network)
    row = {"job": "lenet5", **throughput.measure("lenet5", rounds=1)}
    assert len(compiled) == len(networks.MODES)
    for mode in networks.MODES:
        took = row[mode]["seconds"]
        assert list(took) == [f"{way} float32" for way in ("ours", *throughput.TORCH)]
        assert min(took.values()) > 0
    products = 416_520 * row["images"]  # of the forward pass
    assert 2 * products < row["inference"]["operations"] < 3 * products
    assert row["train"]["operations"] > 2 * row["inference"]["operations"]
    assert throughput.table([row]).count("| CPU |") == 2

    row["device"], row["images"] = "NVIDIA H100 80GB HBM3", 128
    seconds = dict(zip(took, (2.0, 8.0, 4.0, 16.0), strict=True))
    row["train"] = {"seconds": seconds, "operations": 989e12}
    line = throughput.table([row, {"job": "resnet50", "error": "why"}])
    assert "| 64 / 16 / 32 / 8 | **0.50** | 50% |" in line
    assert "| resnet50 | failed: why |" in line


def test_growth(monkeypatch):
    monkeypatch.setattr(networks, "measure", lambda *arguments, **named: (arguments, named))
    seen = {job: growth.measure(job, 3) for job in growth.jobs()}
    assert seen["resnet50, images: 16"] == (("resnet50", 3), {"images": 16})
    assert seen["resnet50, pixels: 64"] == (("resnet50", 3), {"side": 64})
    assert seen["depth: resnet101"] == (("resnet101", 3), {})
    _, batch = networks.ours("resnet18", 2, 40)
    assert batch["image"].shape == (2, 40, 40, 3) and batch["label"].shape == (2,)


def test_a_job_that_fails_is_told_and_tried_again(tmp_path, capsys, monkeypatch):
    failing = timing.Benchmark("nowhere", "", lambda: ["job"], lambda *_: {}, networks.table)
    arguments = ["--out", str(tmp_path / "out.jsonl")]
    assert timing.main(failing, arguments) == 1
    assert "failed: " in capsys.readouterr().out
    monkeypatch.setattr(timing, "child", lambda *_: {m: FIGURES for m in networks.MODES})
    assert timing.main(failing, arguments) == 0
    assert "| job | 1 / 2 / 4 | **0.50** | 0.25 | 1 / 2 / 4 |" in capsys.readouterr().out


FIGURES = {
    "ms": {"ours": 1.0, "plain": 4.0, "NCHW": 2.0, "channels_last": 3.0},
    "layout": "NCHW",
    "torch": 0.5,
    "plain": 0.25,
}


def test_geometric_means():
    half = {**FIGURES, "torch": 2.0}
    rows = [
        {"job": name, **{mode: figures for mode in networks.MODES}}
        for name, figures in (("a", FIGURES), ("b", half))
    ]
    assert networks.table(rows).splitlines()[-1].count(" 1.00 |") == 2


def test_there_is_a_network_of_each_family():
    *names, attention = networks.jobs()
    assert attention == networks.TRANSFORMER
    assert {registry.resolve(name).file for name in names} == set(registry.FILES)
