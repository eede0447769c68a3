"""A chart of grouped bars as SVG text: the same bytes on every machine, so that it can be checked."""

from __future__ import annotations

from html import escape

COLORS = {"Transformers": "#b9bec5", "Transformers with flash-linear-attention": "#e0a458", "patched": "#1f6fb4"}
BAR, GAP, ROW = 14, 12, 700  # height of a bar, room between groups, width of the longest bar's row
LEFT, RIGHT, TOP = 90, 70, 62
Group = tuple[str, str, dict[str, float]]  # a heading, a label, and bars by name


def bars(title: str, groups: list[Group], note: str) -> str:
    """Horizontal bars from 0; a heading is written where it changes."""
    longest = max(value for _, _, sides in groups for value in sides.values())
    scale = (ROW - LEFT - RIGHT) / longest
    parts: list[str] = []
    y, heading = TOP, ""
    for of, label, sides in groups:
        if of != heading:
            heading, y = of, y + 18
            parts.append(_text(10, y, of, "bold"))
            y += 10
        middle = y + BAR * len(sides) / 2 + 4
        parts.append(_text(10, middle, label))
        for name in (name for name in COLORS if name in sides):
            width = sides[name] * scale
            parts.append(f'<rect x="{LEFT}" y="{y}" width="{width:.1f}" height="{BAR - 2}" fill="{COLORS[name]}"/>')
            parts.append(_text(LEFT + width + 6, y + BAR - 4, f"{sides[name]:.2f}x"))
            y += BAR
        y += GAP
    x = 10
    for name, color in COLORS.items():
        parts.append(f'<rect x="{x}" y="34" width="12" height="12" fill="{color}"/>')
        parts.append(_text(x + 18, 44, name))
        x += 48 + 7 * len(name)
    parts += [_text(10, 20, title, "bold"), _text(10, y + 8, note)]
    size = f'width="{ROW}" height="{y + 20}" viewBox="0 0 {ROW} {y + 20}"'
    frame = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">'
    return "\n".join([frame, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>", ""])


def _text(x: float, y: float, text: str, weight: str = "normal") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-weight="{weight}">{escape(text)}</text>'
