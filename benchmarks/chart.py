"""A chart of grouped bars as SVG text: the same bytes on every machine, so that it can be checked."""

from __future__ import annotations

from html import escape

COLORS = {
    "Transformers": "#b9bec5",
    "Transformers + flash-linear-attention": "#e0a458",
    "Transformers, compiled": "#7d8590",
    "patched": "#8fc1ea",
    "patched, cuda_graph=True": "#1f6fb4",
}
BAR, GAP, COLUMN = 12, 10, 420  # height of a bar, room between groups, width of a column
LEFT, RIGHT, TOP, LEGEND = 70, 48, 84, 260  # room for labels, for values, for the head; width of a legend's entry
Column = tuple[str, list[tuple[str, dict[str, float]]]]  # a heading, and groups: a label, and bars by name


def bars(title: str, columns: list[Column], note: str) -> str:
    """Horizontal bars from 0, columns side by side, all on one scale."""
    longest = max(value for _, groups in columns for _, sides in groups for value in sides.values())
    scale = (COLUMN - LEFT - RIGHT) / longest
    parts, bottom = [], 0.0
    for number, (heading, groups) in enumerate(columns):
        x, y = 10.0 + number * COLUMN, float(TOP)
        parts.append(_text(x, y, heading, "bold"))
        y += 10
        for label, sides in groups:
            parts.append(_text(x, y + BAR * len(sides) / 2 + 4, label))
            for name in (name for name in COLORS if name in sides):
                parts.append(_bar(x + LEFT, y, sides[name] * scale, COLORS[name]))
                parts.append(_text(x + LEFT + sides[name] * scale + 5, y + BAR - 3, f"{sides[name]:.2f}x"))
                y += BAR
            y += GAP
        bottom = max(bottom, y)
    drawn = [name for name in COLORS if any(name in sides for _, groups in columns for _, sides in groups)]
    for number, name in enumerate(drawn):
        x, y = 10 + LEGEND * (number % 3), 30 + 18 * (number // 3)
        parts += [_bar(x, y, 12, COLORS[name]), _text(x + 18, y + 10, name)]
    parts += [_text(10, 18, title, "bold"), _text(10, bottom + 10, note)]
    width, height = 10 + max(COLUMN * len(columns), LEGEND * min(3, len(drawn))), bottom + 20
    size = f'width="{width}" height="{height:.0f}" viewBox="0 0 {width} {height:.0f}"'
    frame = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">'
    return "\n".join([frame, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>", ""])


def _bar(x: float, y: float, width: float, color: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{BAR - 2}" fill="{color}"/>'


def _text(x: float, y: float, text: str, weight: str = "normal") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-weight="{weight}">{escape(text)}</text>'
