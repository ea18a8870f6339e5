"""Plots as SVG text: axes with points, intervals, lines and bars; nothing else. A plot is a list of strings.

Positions are pixels, y downwards; data become pixels through an Axes. Text has the colour of the page (`currentColor`), so
that a plot in a dark page is read as well; the white sheet behind it is of class `paper`, which a page may hide.

Usage: a = Axes((60, 30, 400, 300), (0, 10), (0, 1), "title", "t", "loss"); a.line(t, loss); text = svg(480, 360, a.marks)
"""

import math
from html import escape

COLOURS = ("#0b62c4", "#d1561a", "#1d8a4b", "#8f3fb0", "#b8860b", "#c22455", "#4a5a6a", "#00868f")


def svg(width, height, marks):
    """The file of a plot, or of several: marks of all of them."""
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="system-ui, sans-serif" font-size="13">'
    sheet = '<rect class="paper" width="100%" height="100%" fill="#fff"/>'
    return "\n".join([opening, sheet, *marks, "</svg>\n"])


def text(x, y, words, anchor="start", colour="currentColor", turn=0):
    """Words at a point: anchor start, middle or end; turn: degrees, clockwise."""
    turned = f' transform="rotate({turn} {x:.1f} {y:.1f})"' if turn else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}"{turned}>{escape(words)}</text>'


def stroke(points, colour, width=1.5):
    """A line through pixels."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"/>'


def ticks(low, high, wanted=5):
    """Round numbers from low to high, about as many as wanted: a step of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((power * k for k in (1, 2, 5, 10)), key=lambda s: abs(s - rough))
    return [round(step * i, 12) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def limits(values, room=0.06):
    """(low, high) around values, with some room."""
    low, high = min(values), max(values)
    spare = room * (high - low) or abs(high) or 1
    return low - spare, high + spare


class Axes:
    """A plot of data in a box (left, top, width, height) of pixels; x, y: (low, high). What is drawn gathers in `marks`."""

    def __init__(self, box, x, y, title="", x_title="", y_title="", y_ticks=None):
        self.box, self.x, self.y = box, x, y
        left, top, width, height = box
        self.marks = [text(left, top - 10, title)]
        for v in ticks(*x):
            at, _ = self.place(v, y[0])
            self.marks.append(stroke([(at, top), (at, top + height)], "#8884", 1))
            self.marks.append(text(at, top + height + 16, f"{v:g}", "middle"))
        for v in ticks(*y) if y_ticks is None else y_ticks:
            _, at = self.place(x[0], v)
            self.marks.append(stroke([(left, at), (left + width, at)], "#8884", 1))
            self.marks.append(text(left - 6, at + 4, f"{v:g}", "end"))
        self.marks.append(text(left + width / 2, top + height + 34, x_title, "middle"))
        self.marks.append(text(left - 48, top + height / 2, y_title, "middle", turn=-90))

    def place(self, x, y):
        """The pixel of a point."""
        left, top, width, height = self.box
        u, v = ((a - low) / (high - low) for a, (low, high) in ((x, self.x), (y, self.y)))
        return left + u * width, top + (1 - v) * height

    def line(self, xs, ys, colour=COLOURS[0], width=1.5):
        self.marks.append(stroke([self.place(x, y) for x, y in zip(xs, ys, strict=True)], colour, width))

    def dot(self, x, y, colour=COLOURS[0], radius=4):
        x, y = self.place(x, y)
        self.marks.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}"/>')

    def bar(self, x, end, y, below, colour):
        (x, y), (end, below) = self.place(x, y), self.place(end, below)
        place = f'x="{min(x, end):.1f}" y="{y:.1f}" width="{abs(end - x):.1f}" height="{below - y:.1f}"'
        self.marks.append(f'<rect {place} fill="{colour}" fill-opacity="0.6"/>')

    def label(self, x, y, words, shift=(8, 4), anchor="start", colour="currentColor"):
        x, y = self.place(x, y)
        self.marks.append(text(x + shift[0], y + shift[1], words, anchor, colour))
