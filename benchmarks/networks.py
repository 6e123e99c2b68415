"""The page of the networks, `docs/networks.md`, and its Chinese form, written from the code.

    python -m benchmarks.networks                       # write both
    python -m benchmarks.networks --check               # exit code 1 where they are out of date
    python -m benchmarks.networks --check --only 'vit*' # other networks' figures are believed

Names, aliases, papers, sizes, parameters and multiply-adds come from the networks themselves, the
largest errors from `benchmarks/results/parity.jsonl`, which `python -m benchmarks.parity` writes.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import json
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence

ROOT = pathlib.Path(__file__).parent.parent
NAMES = ROOT / "tests" / "data" / "names.txt"
PARITY = ROOT / "benchmarks" / "results" / "parity.jsonl"
PAGES = {"en": ROOT / "docs" / "networks.md", "zh": ROOT / "docs" / "networks.zh-CN.md"}

# Whose checkpoints fit, where neither torchvision nor timm has the network.
AUTHORS = {
    "cbam": ("*", "Jongchan/attention-module"),
    "shufflenet": ("shufflenet_v1*", "megvii-model/ShuffleNet-Series"),
}
# Variants from the second paper that their file's docstring cites.
SECOND_PAPER = ("shufflenet_v2*", "deit_*", "xception?[0-9]", "xception[0-9][0-9]")

# File -> (title, the idea in two sentences, the same in Chinese).
IDEAS = {
    "lenet": (
        "LeNet-5",
        "A small kernel slides over the image, so that every place shares the same few weights, and "
        "sub-sampling makes the answer indifferent to small shifts. Convolution, sub-sampling and "
        "dense layers are trained together from pixels to digits.",
        "小卷积核在整幅图像上滑动，各处共享同一组权重；下采样使结果对微小平移不敏感。"
        "卷积、下采样与全连接层从像素到数字类别一起训练。",
    ),
    "alexnet": (
        "AlexNet",
        "A deep convolutional network, trained on two GPUs with ReLU, dropout and augmented images, "
        "won ImageNet 2012 by a wide margin. Response normalisation and overlapping pooling helped "
        "a little, and the split over two GPUs became the grouped convolution.",
        "用 ReLU、dropout 和数据增强在两块 GPU 上训练的深层卷积网络，以很大优势赢得 ImageNet 2012。"
        "局部响应归一化与重叠池化略有帮助，而跨两块 GPU 的拆分就是后来的分组卷积。",
    ),
    "nin": (
        "Network in Network",
        "A small multilayer perceptron, which is to say 1x1 convolutions, takes the place of the linear "
        "filter at each position. Averaging one map per class replaces the dense layers and most of "
        "their parameters.",
        "在每个位置上，用一个小的多层感知机（即 1x1 卷积）代替线性滤波器。"
        "对每个类别的特征图取全局平均，取代了全连接层及其大部分参数。",
    ),
    "vgg": (
        "VGG",
        "Stacked 3x3 convolutions see as far as one large kernel, with fewer parameters and more "
        "nonlinearities between. With all else kept plain, depth alone lowers the error from 11 to "
        "19 layers.",
        "多个 3x3 卷积叠加，与一个大卷积核的感受野相同，但参数更少、非线性更多。"
        "其余部分保持简单，仅靠把深度从 11 层增加到 19 层就能降低误差。",
    ),
    "googlenet": (
        "GoogLeNet",
        "An Inception module looks at its input at several scales side by side and concatenates what "
        "it sees, with 1x1 convolutions that first reduce the channels. Two auxiliary classifiers "
        "bring gradient into the middle of the network while it trains.",
        "Inception 模块以多个尺度并行观察输入并把结果拼接起来，先用 1x1 卷积减少通道数。"
        "训练时，两个辅助分类器把梯度送入网络中部。",
    ),
    "highway": (
        "Highway network",
        "A learned gate decides, unit by unit, how much of a layer's input is transformed and how "
        "much is carried on unchanged. Gates that start mostly closed let plain SGD train networks of "
        "a hundred layers.",
        "可学习的门逐单元地决定：一层的输入有多少被变换，有多少原样传递。"
        "门在初始时大多关闭，于是普通 SGD 就能训练上百层的网络。",
    ),
    "resnet": (
        "ResNet",
        "Blocks learn what to add to their input instead of a new representation, and an identity "
        "shortcut carries the rest. So deeper networks stop being harder to train, and 152 layers "
        "beat 34.",
        "每个块只学习要加到输入上的残差，而不是全新的表示；恒等捷径传递其余部分。"
        "于是更深的网络不再更难训练，152 层胜过 34 层。",
    ),
    "inception_v3": (
        "Inception-v3",
        "Large kernels are factorised: a 5x5 into two 3x3, a 7x7 into a 1x7 and a 7x1. Label smoothing "
        "and a batch-normalised auxiliary head regularise the training.",
        "大卷积核被分解：5x5 变成两个 3x3，7x7 变成 1x7 与 7x1。"
        "标签平滑和带批归一化的辅助分类头对训练起正则化作用。",
    ),
    "squeezenet": (
        "SqueezeNet",
        "A Fire module squeezes its input to few channels with 1x1 convolutions and expands it again "
        "with a mixture of 1x1 and 3x3. Down-sampling late keeps the maps large, and AlexNet's accuracy "
        "is reached with a fiftieth of its parameters.",
        "Fire 模块先用 1x1 卷积把输入压缩到少数通道，再用 1x1 与 3x3 的混合扩展。"
        "较晚的下采样保持特征图较大，以约五十分之一的参数达到 AlexNet 的精度。",
    ),
    "inception_v4": (
        "Inception-v4 and Inception-ResNet-v2",
        "One uniform design of stem, Inception blocks and reduction blocks replaces the grown "
        "architecture of version 3. Its sibling adds residual connections around the blocks, which "
        "makes training much faster.",
        "以统一的 stem、Inception 块和缩减块取代第三版逐步积累出的结构。"
        "其姊妹网络在各块外加上残差连接，训练明显加快。",
    ),
    "densenet": (
        "DenseNet",
        "Each layer receives the concatenated outputs of all layers before it within its block, and adds "
        "a few channels of its own. Features are reused, gradients reach every layer directly, and "
        "fewer parameters suffice.",
        "块内的每一层都接收其之前所有层输出的拼接，并只添加少量自己的通道。"
        "特征得到重复利用，梯度直达每一层，所需参数更少。",
    ),
    "xception": (
        "Xception",
        "If channels and space can be treated entirely apart, an Inception module becomes a depthwise "
        "separable convolution. A residual stack of these, with as many parameters as Inception-v3, "
        "is more accurate.",
        "若通道相关与空间相关可以完全分开处理，Inception 模块就变成深度可分离卷积。"
        "由它们组成的残差堆叠，以与 Inception-v3 相当的参数量获得更高精度。",
    ),
    "resnext": (
        "ResNeXt",
        "A residual block sums many narrow paths of the same shape, which is one grouped convolution. "
        "Their number, the cardinality, is a better thing to increase than depth or width.",
        "残差块把许多形状相同的窄路径相加，等价于一个分组卷积。"
        "增加路径数（基数 cardinality）比增加深度或宽度更有效。",
    ),
    "mobilenet_v1": (
        "MobileNet",
        "A convolution is split into a depthwise one, per channel, and a pointwise 1x1, at an eighth or "
        "a ninth of the cost for 3x3 kernels. Two multipliers, of width and of resolution, trade "
        "accuracy for time.",
        "把卷积拆成逐通道的深度卷积和 1x1 逐点卷积，对 3x3 卷积核而言开销降为八分之一到九分之一。"
        "宽度与分辨率两个乘子可在精度与速度之间取舍。",
    ),
    "shufflenet": (
        "ShuffleNet",
        "Grouped 1x1 convolutions save most of a small network's work, and shuffling the channels lets "
        "the groups exchange what they know. Version 2 designs for measured time instead: equal "
        "widths, few groups, and a channel split at each block.",
        "分组 1x1 卷积节省了小网络的大部分计算，通道混洗（channel shuffle）让各组交换信息。"
        "第二版转而面向实测时间设计：等宽、少分组，并在每个块处拆分通道。",
    ),
    "senet": (
        "Squeeze-and-Excitation",
        "A block averages each channel over the image, and two small dense layers turn the averages "
        "into a gate per channel. It plugs into any network, for a little more cost and clearly less "
        "error.",
        "模块先对每个通道在整幅图像上取平均，再由两个小全连接层把平均值变为每通道的门。"
        "它可插入任何网络，开销略增而误差明显下降。",
    ),
    "mobilenet_v2": (
        "MobileNet-v2",
        "An inverted residual expands a narrow stream, filters it depthwise, and projects it back; the "
        "shortcut joins the narrow ends. The projection has no activation, since a ReLU loses too much "
        "where there are few channels.",
        "倒残差先扩展窄的主干，做深度卷积，再投影回去；捷径连接的是窄的两端。"
        "投影之后没有激活函数，因为通道少时 ReLU 会丢失太多信息。",
    ),
    "cbam": (
        "CBAM",
        "Attention is applied to channels first, from average- and max-pooled descriptions through a "
        "shared MLP, and then to places, by a 7x7 convolution over two pooled maps. Like SE, it is a "
        "module for other networks.",
        "先做通道注意力：平均池化与最大池化的描述经过共享的 MLP；再做空间注意力：对两张池化图做 7x7 卷积。"
        "与 SE 一样，它是供其他网络使用的模块。",
    ),
    "mobilenet_v3": (
        "MobileNet-v3",
        "A search for the latency of phones chooses the blocks, some with squeeze-and-excitation. "
        "Hard-swish, cheap to compute, is used in the later half, and the last stage is rearranged to "
        "save time.",
        "以手机延迟为目标的搜索选出各个块，其中一些带有 squeeze-and-excitation。"
        "后半部分使用计算便宜的 hard-swish，最后阶段被重新安排以节省时间。",
    ),
    "vit": (
        "Vision Transformer",
        "An image is cut into patches of 16x16 pixels, each a token, and a standard Transformer encoder "
        "reads them together with a class token and learned positions. Trained on enough data it needs no "
        "convolution.",
        "把图像切成 16x16 像素的图块，每块是一个 token；标准 Transformer 编码器把它们与类别 token 和"
        "可学习的位置编码一起处理。有足够的训练数据时，它不需要卷积。",
    ),
}

TEXT = {
    "en": {
        "head": "# The networks\n\n"
        "[中文](networks.zh-CN.md) | written by `python -m benchmarks.networks`: change that, not this "
        "page.\n\n"
        "Parameters are the numbers that are trained, auxiliary heads included. Multiply-adds are those "
        "of convolutions and matrix products for one image of the given size, in eval mode. "
        "*Checkpoints of* tells whose names `convert` recognises; `torch_ref` is our own PyTorch twin, "
        "which every network has. *Largest error* is that of outputs and of gradients against PyTorch in "
        "float64 at full depth, over all references measured; [design](design.md) defines it.\n",
        "index": ("network", "year", "paper", "variants", "largest error"),
        "rows": (
            "name",
            "aliases",
            "year",
            "input",
            "parameters",
            "multiply-adds",
            "checkpoints of",
            "largest error",
        ),
        "unmeasured": "not measured yet",
        "paper": "Paper: {}. Files: {}.",
    },
    "zh": {
        "head": "# 网络一览\n\n"
        "[English](networks.md) | 由 `python -m benchmarks.networks` 生成：请修改该脚本，不要直接改本页。\n\n"
        "*参数*为参与训练的数的个数，含辅助分类头。*乘加*为评估模式下、给定尺寸的一幅图像在卷积与矩阵乘法中的"
        "乘加次数。*检查点来源*说明 `convert` 认识谁的命名；`torch_ref` 是我们自己的 PyTorch 孪生实现，"
        "每个网络都有。*最大误差*为 float64、完整深度下与 PyTorch 相比的输出误差与梯度误差，取所有已测参照中的最大值；"
        "定义见 [design](design.md)（英文）。\n",
        "index": ("网络", "年份", "论文", "变体数", "最大误差"),
        "rows": ("名称", "别名", "年份", "输入", "参数", "乘加", "检查点来源", "最大误差"),
        "unmeasured": "尚未测量",
        "paper": "论文：{}。文件：{}。",
    },
}


@dataclasses.dataclass(frozen=True)
class Paper:
    """As a docstring cites it: `link` is an address, or a title in quotes."""

    authors: str
    year: str
    link: str

    def __str__(self) -> str:
        named = f"{self.authors} {self.year}"
        return f"[{named}]({self.link})" if self.link.startswith("http") else f"{named}, {self.link}"


def papers(file: str) -> list[Paper]:
    """The papers in the docstring of a file of networks, in its order."""
    from flax_nets import registry

    text = " ".join((registry.module(file).__doc__ or "").split())
    cited = r'([A-Z][\w&. -]*?) (\d{4}), (https?://[^\s),]+|"[^"]+")'
    return [Paper(*match) for match in re.findall(cited, text)]


def libraries() -> dict[str, list[str]]:
    """Our name -> the names, with their library, that torchvision and timm have for it."""
    from flax_nets import registry

    found: dict[str, list[str]] = {}
    for job in sorted(NAMES.read_text().split(), reverse=True):  # torchvision first
        name = registry.resolve(job).name
        found.setdefault(registry.ALIASES.get(name, (name,))[0], []).append(job)
    return found


def sources(name: str, jobs: Sequence[str]) -> list[str]:
    """Whose checkpoints a variant loads."""
    from convert import dialects
    from flax_nets import registry

    spec = registry.resolve(name)
    found = list(dict.fromkeys(job.partition("/")[0] for job in jobs))
    pattern, authors = AUTHORS.get(spec.file, ("", ""))
    if not found:
        found = [authors if fnmatch.fnmatchcase(name, pattern) else "torch_ref"]
    others = [d.name for d in dialects.of(spec) if d.name not in ("native", *found)]
    return found + others


def figures(name: str) -> tuple[str, str, str]:
    """Input size, parameters and multiply-adds of a variant, as the table shows them."""
    from flax_nets import registry, summary
    from flax_nets.create import build

    found = summary(build(registry.resolve(name)))
    size = "x".join(map(str, found.input_shape))
    return size, f"{found.parameters:,}", f"{found.multiply_adds:,}"


def believed(page: str) -> dict[str, tuple[str, str, str]]:
    """The figures that a page has."""
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in page.splitlines()]
    return {r[0].strip("`"): (r[3], r[4], r[5]) for r in rows if len(r) == len(TEXT["en"]["rows"])}


def errors() -> dict[str, tuple[float, float]]:
    """Reference and name -> the largest errors of outputs and of gradients measured."""
    if not PARITY.exists():
        return {}
    found = {}
    for line in PARITY.read_text().splitlines():
        row = json.loads(line)
        modes = [row[mode] for mode in ("eval", "train") if mode in row]
        if modes:
            outputs = max(m["outputs"] for m in modes)
            gradients = max(max(m["gradients"], m["input_gradient"]) for m in modes)
            found[row["job"]] = outputs, gradients
    return found


def worst(jobs: Sequence[str], measured: Mapping[str, tuple[float, float]], language: str) -> str:
    """The largest errors of some jobs as "outputs / gradients"."""
    pairs = [measured[job] for job in jobs if job in measured]
    if not pairs:
        return TEXT[language]["unmeasured"]
    return " / ".join(f"{max(values):.0e}" for values in zip(*pairs, strict=True))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Of Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def page(language: str, known: Mapping[str, tuple[str, str, str]]) -> str:
    """The whole page; `known` has the figures of all variants."""
    from flax_nets import registry

    text, references, measured = TEXT[language], libraries(), errors()
    index, sections = [], []
    for file in registry.FILES:
        title, *ideas = IDEAS[file]
        cited, rows, every = papers(file), [], []
        variants = registry.module(file).VARIANTS
        for name in variants:
            second = any(fnmatch.fnmatchcase(name, pattern) for pattern in SECOND_PAPER)
            jobs = references.get(name, [])
            aliases = [alias for alias, (ours, _) in registry.ALIASES.items() if ours == name]
            every += (compared := [f"torch_ref/{name}", *jobs])
            rows.append(
                (
                    f"`{name}`",
                    ", ".join(f"`{alias}`" for alias in aliases),
                    cited[int(second)].year,
                    *known[name],
                    ", ".join(sources(name, jobs)),
                    worst(compared, measured, language),
                )
            )
        anchor = "-".join(re.findall(r"[\w-]+", title.lower()))
        index.append(
            (
                f"[{title}](#{anchor})",
                cited[0].year,
                str(cited[0]),
                str(len(variants)),
                worst(every, measured, language),
            )
        )
        files = ", ".join(
            f"[`{room}/{file}.py`](../{room}/{file}.py)"
            for room in ("flax_nets/models", "torch_ref")
        )
        idea = ideas[language == "zh"]
        origin = text["paper"].format("; ".join(map(str, cited)), files)
        sections.append(f"## {title}\n\n{idea}\n\n{origin}\n\n{table(text['rows'], rows)}")
    return "\n".join([text["head"], table(text["index"], index), *sections])


def main(argv: Sequence[str] | None = None) -> int:
    """Write the pages, or with --check compare them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.networks", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    parser.add_argument(
        "--only", nargs="*", default=["*"], help="whose figures are counted; others' are believed"
    )
    args = parser.parse_args(argv)
    from flax_nets import registry

    present = {lang: path.read_text("utf-8") if path.exists() else "" for lang, path in PAGES.items()}
    known = believed(present["en"])
    for file in registry.FILES:
        for name in registry.module(file).VARIANTS:
            if name not in known or any(fnmatch.fnmatchcase(name, p) for p in args.only):
                known[name] = figures(name)
    made = {language: page(language, known) for language in PAGES}
    stale = [PAGES[language].name for language in PAGES if made[language] != present[language]]
    if args.check:
        for name in stale:
            print(f"docs/{name} is out of date: python -m benchmarks.networks", file=sys.stderr)
        return 1 if stale else 0
    for language, path in PAGES.items():
        path.write_text(made[language], "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
