"""LeNet-5 (LeCun et al. 1998, "Gradient-based learning applied to document recognition"), the twin.

`LeNet5` is the form that everybody trains today; `LeNet5_1998` is section II of the paper.
"""

import torch
import torch.nn.functional as F
from torch import nn

ACTIVATIONS = {"tanh": torch.tanh, "sigmoid": torch.sigmoid, "relu": F.relu}


class LeNet5(nn.Module):
    """Images [N, in_channels, 32, 32] -> logits [N, num_classes]; 61,706 parameters."""

    def __init__(self, num_classes=10, in_channels=1, activation="tanh", dropout=0.0):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 6, 5)
        self.pool1 = nn.AvgPool2d(2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.pool2 = nn.AvgPool2d(2)
        self.conv3 = nn.Conv2d(16, 120, 5)
        self.fc1 = nn.Linear(120, 84)
        self.dropout = nn.Dropout(dropout)
        self.fc2 = nn.Linear(84, num_classes) if num_classes else nn.Identity()
        self.activation = ACTIVATIONS[activation]

    def forward(self, x):
        x = self.pool1(self.activation(self.conv1(x)))  # [N, 6, 14, 14]
        x = self.pool2(self.activation(self.conv2(x)))  # [N, 16, 5, 5]
        x = self.activation(self.conv3(x))  # [N, 120, 1, 1]
        x = torch.flatten(x, 1)
        x = self.activation(self.fc1(x))
        return self.fc2(self.dropout(x))


def scaled_tanh(x):
    """1.7159 tanh(2x/3), Appendix A: f(1) = 1 and f(-1) = -1."""
    return 1.7159 * torch.tanh(2 / 3 * x)


class SubSampling(nn.Module):
    """Layers S2 and S4: the sum of each 2x2 times a trained coefficient, plus a trained bias."""

    def __init__(self, channels):
        super().__init__()
        self.coefficient = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))
        nn.init.uniform_(self.coefficient, -2.4 / 4, 2.4 / 4)
        nn.init.uniform_(self.bias, -2.4 / 4, 2.4 / 4)

    def forward(self, x):
        x = F.avg_pool2d(x, 2) * 4
        return x * self.coefficient[:, None, None] + self.bias[:, None, None]


# Table I: which maps of S2 each of the 16 maps of C3 sees; 60 links.
CONNECTIONS = (
    (0, 1, 2),
    (1, 2, 3),
    (2, 3, 4),
    (3, 4, 5),
    (0, 4, 5),
    (0, 1, 5),
    (0, 1, 2, 3),
    (1, 2, 3, 4),
    (2, 3, 4, 5),
    (0, 3, 4, 5),
    (0, 1, 4, 5),
    (0, 1, 2, 5),
    (0, 1, 3, 4),
    (1, 2, 4, 5),
    (0, 2, 3, 5),
    (0, 1, 2, 3, 4, 5),
)


class SparseConv(nn.Module):
    """Layer C3: 5x5 kernels for the links of a table alone, 25 * 60 + 16 = 1,516 parameters.

    `weight` is [links, 5, 5], the links in the order of the table.
    """

    def __init__(self, connections=CONNECTIONS):
        super().__init__()
        self.links = [(i, j) for i, row in enumerate(connections) for j in row]
        self.in_channels = 1 + max(j for _, j in self.links)
        self.weight = nn.Parameter(torch.empty(len(self.links), 5, 5))
        self.bias = nn.Parameter(torch.empty(len(connections)))
        with torch.no_grad():
            for k, (i, _) in enumerate(self.links):
                nn.init.uniform_(self.weight[k], *fan_in_bound(25 * len(connections[i])))
            for i, row in enumerate(connections):
                nn.init.uniform_(self.bias[i : i + 1], *fan_in_bound(25 * len(row)))

    def forward(self, x):
        kernel = self.weight.new_zeros(len(self.bias), self.in_channels, 5, 5)
        rows, columns = zip(*self.links, strict=True)
        kernel = kernel.index_put((torch.tensor(rows), torch.tensor(columns)), self.weight)
        return F.conv2d(x, kernel, self.bias)


class RadialBasis(nn.Module):
    """The output layer: minus the squared distance of 84 features to each class's fixed code."""

    def __init__(self, codes):
        super().__init__()
        self.codes = codes

    def forward(self, x):
        codes = torch.tensor(self.codes, dtype=x.dtype, device=x.device)
        return -torch.sum((x[:, None, :] - codes) ** 2, -1)


# Figure 3's kind of code: the ten digits as bitmaps, 7 pixels wide and 12 high, drawn by us.
DIGITS = """
..###.. ...#... .#####. ####### .....#. ####### ...###. ####### ..###.. ..###..
.#...#. ..##... #.....# ......# ....##. #...... ..#.... ......# .#...#. .#...#.
#.....# .#.#... ......# .....#. ...#.#. #...... .#..... ......# #.....# #.....#
#.....# ...#... ......# ....#.. ..#..#. #...... #...... .....#. #.....# #.....#
#.....# ...#... .....#. ...###. .#...#. #.####. #...... .....#. .#...#. #.....#
#.....# ...#... ....#.. .....#. #....#. ##....# #.####. ....#.. ..###.. .#...##
#.....# ...#... ...#... ......# #....#. ......# ##....# ....#.. .#...#. ..###.#
#.....# ...#... ..#.... ......# ####### ......# #.....# ...#... #.....# ......#
#.....# ...#... .#..... ......# .....#. ......# #.....# ...#... #.....# ......#
#.....# ...#... #...... ......# .....#. ......# #.....# ..#.... #.....# .....#.
.#...#. ...#... #...... #....#. .....#. #.....# .#...#. ..#.... .#...#. ....#..
..###.. .#####. ####### .####.. .....#. .#####. ..###.. ..#.... ..###.. .###...
"""


def code_vectors(drawing):
    """Bitmaps of "#" and "." side by side -> for each a vector of +1 and -1, row by row."""
    bitmaps = zip(*(line.split() for line in drawing.strip().splitlines()), strict=True)
    return tuple(tuple(1.0 if p == "#" else -1.0 for p in "".join(b)) for b in bitmaps)


CODES = code_vectors(DIGITS)


def fan_in_bound(fan_in):
    """Uniform within 2.4 / fan_in (section II-B and Appendix A)."""
    return -2.4 / fan_in, 2.4 / fan_in


class LeNet5_1998(nn.Module):
    """The network of the paper: 60,000 trained parameters, logits are minus squared distances.

    Images [N, 1, 32, 32] -> [N, 10].
    """

    def __init__(self, num_classes=10, in_channels=1, codes=CODES, dropout=0.0):
        super().__init__()
        self.c1 = nn.Conv2d(in_channels, 6, 5)
        self.s2 = SubSampling(6)
        self.c3 = SparseConv()
        self.s4 = SubSampling(16)
        self.c5 = nn.Conv2d(16, 120, 5)
        self.f6 = nn.Linear(120, 84)
        self.dropout = nn.Dropout(dropout)
        self.output = RadialBasis(codes[:num_classes]) if num_classes else nn.Identity()
        for module in (self.c1, self.c5, self.f6):
            fan_in = module.weight[0].numel()
            nn.init.uniform_(module.weight, *fan_in_bound(fan_in))
            nn.init.uniform_(module.bias, *fan_in_bound(fan_in))

    def forward(self, x):
        x = scaled_tanh(self.c1(x))  # [N, 6, 28, 28]
        x = scaled_tanh(self.s2(x))  # [N, 6, 14, 14]
        x = scaled_tanh(self.c3(x))  # [N, 16, 10, 10]
        x = scaled_tanh(self.s4(x))  # [N, 16, 5, 5]
        x = scaled_tanh(self.c5(x))  # [N, 120, 1, 1]
        x = scaled_tanh(self.f6(torch.flatten(x, 1)))
        return self.output(self.dropout(x))


NETWORK = "LeNet5"

VARIANTS = {
    "lenet5": dict(),
    "lenet5_1998": dict(network="LeNet5_1998"),
}
