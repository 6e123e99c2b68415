"""`flax-nets plan`: what is read from a compiled step, and from the text of one for a TPU."""

import json
import pathlib

import numpy as np
import pytest

from flax_nets import cli
from flax_nets.inspect import plan

# In the form that the TPU compiler prints: tiles and memory spaces in the layouts, an asynchronous
# collective with a tuple of two arrays, and a fusion's computation with its own instructions.
TEXT = """
HloModule jit_step, is_scheduled=true

%fused (param_0: bf16[4,32,32,3], param_1: bf16[3,3,3,64]) -> bf16[4,32,32,64] {
  %param_0 = bf16[4,32,32,3]{3,0,2,1:T(8,128)(2,1)} parameter(0)
  %param_1 = bf16[3,3,3,64]{3,2,1,0:T(4,128)(2,1)S(1)} parameter(1)
  ROOT %convolution.1 = bf16[4,32,32,64]{3,0,2,1:T(8,128)(2,1)} convolution(%param_0, %param_1), \
window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f, metadata={op_name="jit(step)/conv"}
}

ENTRY %main (param.1: f32[64]) -> f32[64] {
  %copy.2 = bf16[4,32,32,3]{3,0,2,1:T(8,128)(2,1)} copy(%batch), metadata={op_name="image"}
  %copy.3 = f32[3,3,3,64]{3,2,1,0:T(4,128)} copy(%kernel), metadata={op_name="kernel"}
  %copy.4 = s32[]{:T(128)S(6)} copy(%step)
  %transpose.1 = bf16[32,4,1,1]{1,0,3,2} transpose(%pooled), dimensions={1,0,2,3}
  %all-reduce = f32[64]{0:T(128)S(1)} all-reduce(%sums), channel_id=1, to_apply=%add
  %all-reduce-start = (f32[64]{0}, bf16[10,2]{1,0}) all-reduce-start(%a, %b), to_apply=%add
  %all-reduce-done = (f32[64]{0}, bf16[10,2]{1,0}) all-reduce-done(%all-reduce-start)
}
"""


def test_reading_the_text_of_a_module_for_a_tpu():
    found = list(plan.instructions(TEXT))
    convolution = next(i for i in found if i.opcode == "convolution")
    assert convolution.shape == (4, 32, 32, 64)
    assert convolution.layout == (3, 0, 2, 1)
    assert convolution.operands == ("param_0", "param_1")
    assert plan.collectives(found) == {"all-reduce": (2, 64 * 4 + 64 * 4 + 20 * 2)}
    # arrays of images with three axes and more, not kernels, counters or pooled features
    assert list(plan.moved_activations(found, images=4)) == [("copy", "bf16[4,32,32,3]", "image")]
    waste = plan.padding(found, lanes=128)
    assert waste["memory"] == pytest.approx(128 * 16 / (64 * 4) - 1)  # tiles of 16 images x 128
    assert waste["arithmetic"] == pytest.approx(128 / 3 * 128 / 64 - 1)


def test_reading_the_text_of_a_module_for_a_gpu():
    text = """
  %cudnn-conv.1 = (bf16[4,32,32,64]{3,2,1,0}, u8[0]{0}) custom-call(%a, %b), window={size=3x3}, \
dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward", backend_config={}
  %gemm.1 = (bf16[64,64]{1,0}, s8[512]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm"
  %transpose.1 = bf16[4,3,3,8]{3,2,1,0} transpose(%kernel), metadata={op_name="kernel"}
  %copy.1 = bf16[4,3,3,9]{3,0,2,1} copy(%x), metadata={op_name="x"}
"""
    found = list(plan.instructions(text))
    assert plan.convolutions(found) == {"bf16": 1}
    params = {"kernel": np.zeros((3, 3, 8, 4))}  # as many channels as images
    assert list(plan.moved_activations(found, 4, params)) == [("copy", "bf16[4,3,3,9]", "x")]


def test_the_step_compiled_for_the_devices_there_are(capsys):
    command = ["plan", "--model", "lenet5", "--topology", "local", "--batch-size", "4"]
    assert cli.main([*command, "--dtype", "float32", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["memory"]["weights"] == 4 * 61706
    assert told["memory"]["optimizer"] >= 4 * 61706  # the momentum, one number for each weight
    assert told["memory"]["total"] >= told["memory"]["weights"] + told["memory"]["optimizer"]
    products = 3 * 416_520 - 117_600  # forward, kernels', inputs' (not that of the image)
    assert 1.5 * 2 * 4 * products > told["flops"] > 2 * 4 * products
    assert told["fits"] is None and told["images_per_second"] is None
    assert set(told["convolutions"]) == {"f32"}  # those that a CPU does not take as products


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "lenet6"], "lenet5"),
        (["--model", "lenet5", "--topology", "v9:2x2"], "v5e:2x2"),
        (["--model", "lenet5", "--topology", "v5e"], "expected local, or chips"),
        (["--model", "lenet5", "--topology", "local", "--batch-size", "0"], "do not divide"),
        (["--topology", "local"], "--model"),
    ],
)
def test_mistakes(arguments, words, capsys):
    assert cli.main(["plan", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_one_of_each_family():
    from flax_nets import registry

    files = {registry.resolve(name).file for name in plan.NETWORKS}
    assert files == set(registry.FILES)


def test_the_table_has_a_row_for_each(monkeypatch, capsys):
    monkeypatch.setattr(plan, "NETWORKS", ("lenet5", "lenet5_1998"))
    command = ["plan", "--all", "--topology", "local", "--batch-size", "4", "--dtype", "float32"]
    assert cli.main(command) == 0
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 4 and len({row.count("|") for row in rows}) == 1
    assert [row.split()[1] for row in rows[2:]] == ["lenet5", "lenet5_1998"]
    assert cli.main(["plan", "--model", "lenet5", *command[2:]]) == 0
    assert capsys.readouterr().out.startswith("lenet5, a training step of 4 images in float32")


def test_a_table_goes_on_where_it_was(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(plan, "NETWORKS", ("lenet5",))
    kept = tmp_path / "new" / "plans.jsonl"
    command = ["plan", "--all", "--topology", "local", "--batch-size", "4", "--dtype", "float32"]
    command += ["--out", str(kept)]
    assert cli.main(command) == 0
    table = capsys.readouterr().out

    def compile_anew(*args):
        raise ValueError("compiled anew")

    monkeypatch.setattr(plan, "plan", compile_anew)
    assert cli.main(command) == 0
    assert capsys.readouterr().out == table
    monkeypatch.setattr(plan, "compiler", lambda topology: "jax 0.0.0")
    assert cli.main(command) == 2
    assert "compiled anew" in capsys.readouterr().err
    kept.write_text('{"network": "lenet5"}\n')
    assert cli.main(command) == 2
    assert "line 1: expected a plan" in capsys.readouterr().err
    assert kept.read_text() == '{"network": "lenet5"}\n'


def test_the_page_shows_the_plans_that_were_made():
    root = pathlib.Path(__file__).parent.parent
    page = (root / "docs" / "tpu.md").read_text().splitlines()
    lines = (root / "benchmarks" / "results" / "plan.jsonl").read_text().splitlines()
    for line in lines:
        made = plan.Plan.from_dict(json.loads(line))
        assert plan.row(made) in page
        assert made.fits and set(made.convolutions) == {"bf16"}
