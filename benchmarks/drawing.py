"""Drawings of blocks as SVG, from one line of text each.

    x > (conv 3x3|BN, ReLU > conv 3x3|BN ; ) + > ReLU

is a residual block: `>` puts one thing behind the other, `( ; )` side by side, and what follows the
bracket joins them: `+` and `*` draw a circle, a word a bar. Nothing between `;` and `)` is the
bare stream. `|` breaks a line within a box, `{...} x 3` frames what is repeated, and a word in
quotes stands without a box.
"""

from __future__ import annotations

import dataclasses
import html
import re
from collections.abc import Sequence
from typing import Protocol

HEIGHT, LINE, GAP, LANE, MARGIN = 30, 14, 22, 14, 16
COLOURS = (  # the first word found in a box decides: fill and border
    (r"pool$|pool \d|mean|\bmax|trained", "#fde6d2", "#d08a4a"),
    (r"conv|depthwise|patches", "#dcebfa", "#5a8fc2"),
    (r"dense|linear|MLP|x W", "#dff2df", "#62a566"),
    (r"^norm|^BN", "#ececec", "#8c8c8c"),
    (r"ReLU|sigmoid|softmax", "#fff6cc", "#c9a92e"),
    (r"", "#efe6f7", "#9473b5"),
)
INK = "#333333"


class Part(Protocol):
    """Something with a stream through it, from left to right at height 0."""

    @property
    def size(self) -> tuple[float, float, float]:
        """Width, and how far it reaches above and below the stream."""

    def draw(self, x: float, y: float) -> str:
        """SVG, where the stream enters at (x, y)."""


def width_of(text: str) -> float:
    return 6.9 * len(text)


def line(*points: tuple[float, float]) -> str:
    path = " ".join(f"{x:g},{y:g}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{INK}" stroke-width="1.4"/>'


def arrow(*points: tuple[float, float]) -> str:
    """A line with a head at its last point."""
    (x, y), (before_x, before_y) = points[-1], points[-2]
    dx, dy = (x > before_x) - (x < before_x), (y > before_y) - (y < before_y)
    back = (x - 6 * dx, y - 6 * dy)
    head = ((x, y), (back[0] - 3 * dy, back[1] - 3 * dx), (back[0] + 3 * dy, back[1] + 3 * dx))
    corners = " ".join(f"{a:g},{b:g}" for a, b in head)
    return line(*points[:-1], back) + f'<polygon points="{corners}" fill="{INK}"/>'


def words(x: float, y: float, text: str, extra: str = "") -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" text-anchor="middle" dominant-baseline="central" {extra}>'
        f"{html.escape(text)}</text>"
    )


@dataclasses.dataclass(frozen=True)
class Box:
    lines: tuple[str, ...]

    @property
    def size(self) -> tuple[float, float, float]:
        half = (HEIGHT + LINE * (len(self.lines) - 1)) / 2
        return max(map(width_of, self.lines)) + 16, half, half

    def draw(self, x: float, y: float) -> str:
        width, half, _ = self.size
        fill, border = next(
            (fill, border)
            for pattern, fill, border in COLOURS
            if any(re.search(pattern, line) for line in self.lines[:1])
        )
        rectangle = (
            f'<rect x="{x:g}" y="{y - half:g}" width="{width:g}" height="{2 * half:g}" rx="5" '
            f'fill="{fill}" stroke="{border}"/>'
        )
        top = y - LINE * (len(self.lines) - 1) / 2
        return rectangle + "".join(
            words(x + width / 2, top + LINE * i, text) for i, text in enumerate(self.lines)
        )


@dataclasses.dataclass(frozen=True)
class Word:
    text: str

    @property
    def size(self) -> tuple[float, float, float]:
        return width_of(self.text) + 10, LINE / 2, LINE / 2

    def draw(self, x: float, y: float) -> str:
        return words(x + self.size[0] / 2, y, self.text, 'font-style="italic"')


@dataclasses.dataclass(frozen=True)
class Series:
    parts: tuple[Part, ...]

    @property
    def size(self) -> tuple[float, float, float]:
        if not self.parts:
            return 0, 0, 0
        widths, above, below = zip(*(part.size for part in self.parts), strict=True)
        return sum(widths) + GAP * (len(widths) - 1), max(above), max(below)

    def draw(self, x: float, y: float) -> str:
        drawn = []
        for i, part in enumerate(self.parts):
            if i:
                drawn.append(arrow((x, y), (x + GAP, y)))
                x += GAP
            drawn.append(part.draw(x, y))
            x += part.size[0]
        return "".join(drawn)


@dataclasses.dataclass(frozen=True)
class Frame:
    """A part that is repeated, and the words that say how often."""

    inner: Series
    label: str

    @property
    def size(self) -> tuple[float, float, float]:
        width, above, below = self.inner.size
        return max(width + 20, width_of(self.label) + 20), above + 22, below + 8

    def draw(self, x: float, y: float) -> str:
        width, above, below = self.size
        frame = (
            f'<rect x="{x:g}" y="{y - above:g}" width="{width:g}" height="{above + below:g}" '
            f'rx="8" fill="none" stroke="#999999" stroke-dasharray="4 3"/>'
        )
        inside = self.inner.size[0]
        start = x + (width - inside) / 2
        stream = line((x, y), (start, y)) + line((start + inside, y), (x + width, y))
        label = words(x + width / 2, y - above + 10, self.label, 'font-size="11"')
        return frame + stream + label + self.inner.draw(start, y)


@dataclasses.dataclass(frozen=True)
class Side:
    """Branches side by side, and what joins them again."""

    branches: tuple[Series, ...]
    join: str

    @property
    def centres(self) -> list[float]:
        """Heights of the branches; the stream goes on at 0."""
        found: list[float] = []
        for i, branch in enumerate(self.branches):
            _, above, _ = branch.size
            above = max(above, LINE / 2)
            before = self.branches[i - 1].size[2] if i else 0
            found.append(found[-1] + max(before, LINE / 2) + LANE + above if i else 0.0)
        skips = any(not branch.parts for branch in self.branches)
        middle = 0.0 if skips else found[-1] / 2
        return [y - middle for y in found]

    @property
    def join_width(self) -> float:
        return 22 if self.join in "+*" else 24

    @property
    def size(self) -> tuple[float, float, float]:
        inside = max(branch.size[0] for branch in self.branches)
        centres = self.centres
        above = max(b.size[1] - y for b, y in zip(self.branches, centres, strict=True))
        below = max(b.size[2] + y for b, y in zip(self.branches, centres, strict=True))
        if self.join not in "+*":
            spare = (width_of(self.join) + 12 - centres[-1] + centres[0]) / 2
            above, below = max(above, spare - centres[0]), max(below, spare + centres[-1])
        return 2 * GAP + 10 + inside + self.join_width, above, below + 4

    def draw(self, x: float, y: float) -> str:
        centres = [y + c for c in self.centres]
        inside = max(branch.size[0] for branch in self.branches)
        split, start, end = x + 10, x + 10 + GAP, x + 10 + GAP + inside
        join = end + GAP
        drawn = [line((x, y), (split, y)), line((split, centres[0]), (split, centres[-1]))]
        circle = self.join in "+*"
        for branch, height in zip(self.branches, centres, strict=True):
            width = branch.size[0]
            if branch.parts:
                drawn.append(arrow((split, height), (start, height)))
                drawn.append(branch.draw(start, height))
            from_x = start + width if branch.parts else split
            if not circle or height == y:
                drawn.append(arrow((from_x, height), (join, height)))
            else:
                side = 11 if height > y else -11
                drawn.append(arrow((from_x, height), (join + 11, height), (join + 11, y + side)))
        if circle:
            sign = {"+": "+", "*": "\u00d7"}[self.join]
            drawn.append(
                f'<circle cx="{join + 11:g}" cy="{y:g}" r="11" fill="#ffffff" stroke="{INK}"/>'
                + words(join + 11, y, sign, 'font-size="17"')
            )
        else:
            spare = max(15, (width_of(self.join) + 12 - centres[-1] + centres[0]) / 2)
            top, bottom = centres[0] - spare, centres[-1] + spare
            middle = (top + bottom) / 2
            turn = f'transform="rotate(-90 {join + 12:g} {middle:g})"'
            drawn.append(
                f'<rect x="{join:g}" y="{top:g}" width="24" height="{bottom - top:g}" rx="5" '
                f'fill="#ffffff" stroke="{INK}"/>' + words(join + 12, middle, self.join, turn)
            )
        return "".join(drawn)


def parse(text: str) -> Series:
    """The description of a drawing -> its parts. Raises ValueError where it makes no sense."""
    tokens = re.findall(r'[>(){};]|"[^"]*"|[^>(){};"]+', text)
    series, rest = _series([t.strip() for t in tokens if t.strip()])
    if rest:
        raise ValueError(f"{rest[0]!r} closes nothing in {text!r}")
    return series


def _series(tokens: list[str]) -> tuple[Series, list[str]]:
    parts: list[Part] = []
    while tokens and tokens[0] not in ");}":
        token, *tokens = tokens
        if token == "(":
            branches = []
            while True:
                branch, tokens = _series(tokens)
                branches.append(branch)
                close, *tokens = tokens or [""]
                if close != ";":
                    break
            join, *tokens = tokens or [""]
            if close != ")" or not join or join in "(){};>":
                raise ValueError(f"branches end in ) and what joins them, got {close} {join}")
            parts.append(Side(tuple(branches), join))
        elif token == "{":
            inner, tokens = _series(tokens)
            close, label = (*tokens[:2], "", "")[:2]
            tokens = tokens[2:]
            if close != "}" or not label:
                raise ValueError("a frame ends in } and the words that say how often")
            parts.append(Frame(inner, label))
        elif token.startswith('"'):
            parts.append(Word(token.strip('"')))
        elif token != ">":
            parts.append(Box(tuple(line.strip() for line in token.split("|"))))
    return Series(tuple(parts)), tokens


def page(width: float, height: float, inside: str) -> str:
    """A whole SVG file, on white so that it can be read on a dark page too."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" font-family="Helvetica, Arial, sans-serif" '
        f'font-size="12.5" fill="{INK}">'
        f'<rect width="100%" height="100%" rx="8" fill="#ffffff"/>{inside}</svg>\n'
    ).replace("><", ">\n<")


def blocks(description: str) -> str:
    """SVG of a description: one drawing per line, after its name and a colon if it has one."""
    drawn, y, widest = [], float(MARGIN), 0.0
    for text in filter(None, map(str.strip, description.strip().splitlines())):
        name, text = re.match(r"(?:([^>{};\"]*): )?(.*)", text).groups()
        if name:
            y += LINE
            drawn.append(
                f'<text x="{MARGIN}" y="{y - 2:g}" font-weight="bold">{html.escape(name)}</text>'
            )
            y += 8
        part = parse(text)
        width, above, below = part.size
        drawn.append(part.draw(MARGIN, y + above))
        y += above + below + MARGIN
        widest = max(widest, width, width_of(name or "") + 10)
    return page(widest + 2 * MARGIN, y, "".join(drawn))


def grids(patterns: Sequence[tuple[str, Sequence[Sequence[bool]]]], cell: int = 12) -> str:
    """SVG of tables of yes and no, side by side under their names."""
    drawn, x, tallest = [], float(MARGIN), 0
    for name, rows in patterns:
        width = max(len(rows[0]) * cell, width_of(name))
        drawn.append(words(x + width / 2, MARGIN + 6, name, 'font-weight="bold"'))
        left = x + (width - len(rows[0]) * cell) / 2
        for i, row in enumerate(rows):
            for j, marked in enumerate(row):
                drawn.append(
                    f'<rect x="{left + j * cell:g}" y="{MARGIN + 20 + i * cell:g}" '
                    f'width="{cell}" height="{cell}" stroke="#c8c8c8" '
                    f'fill="{"#5a8fc2" if marked else "#ffffff"}"/>'
                )
        tallest = max(tallest, len(rows) * cell)
        x += width + 24
    return page(x - 24 + MARGIN, tallest + 20 + 2 * MARGIN, "".join(drawn))
