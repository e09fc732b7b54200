"""Draws passes.svg: the passes over memory of a bottleneck's forward pass, eager and fused.

    python docs/passes.py

Bars are what a pass reads and writes, in units of one tensor of the bottleneck's width; its input and output have four.
"""

from pathlib import Path

EAGER = [
    ("conv 1×1", 4, 1), ("batch norm: statistics", 1, 0), ("batch norm: normalise", 1, 1), ("ReLU", 1, 1),
    ("conv 3×3", 1, 1), ("batch norm: statistics", 1, 0), ("batch norm: normalise", 1, 1), ("ReLU", 1, 1),
    ("conv 1×1", 1, 4), ("batch norm: statistics", 4, 0), ("batch norm: normalise", 4, 4),
    ("add", 8, 4), ("ReLU", 4, 4),
]  # fmt: skip
FUSED = [
    ("conv 1×1 + statistics", 4, 1),
    ("norm + ReLU + conv 3×3 + statistics", 1, 1),
    ("norm + ReLU + moments", 1, 0),
    ("norm + ReLU + conv 1×1 + norm + add + ReLU", 5, 4),
]
UNIT, ROW, TOP, WIDTH = 14, 26, 74, 900
READ, WRITTEN, INK, FAINT = "#3b6ea8", "#d9822b", "#1f2933", "#7b8794"


def drawn(passes: list[tuple[str, int, int]], left: int, names: int) -> list[str]:
    """A column: each pass with its name and its bars, from ``left``, bars ``names`` further on."""
    parts = []
    for i, (name, read, written) in enumerate(passes):
        y, x = TOP + i * ROW, left + names
        parts.append(f'<text x="{x - 8}" y="{y + 13}" text-anchor="end">{name}</text>')
        for count, color in ((read, READ), (written, WRITTEN)):
            if count:
                parts.append(f'<rect x="{x}" y="{y}" width="{count * UNIT - 2}" height="17" fill="{color}"/>')
            x += count * UNIT
    return parts


def picture() -> str:
    """The picture as SVG."""
    units = {name: sum(read + written for _, read, written in passes)
             for name, passes in (("eager", EAGER), ("fused", FUSED))}  # fmt: skip
    height = TOP + len(EAGER) * ROW + 14
    below = TOP + len(FUSED) * ROW + 40
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
        f' font-family="Helvetica, Arial, sans-serif" font-size="13" fill="{INK}">',
        "<title>A bottleneck's forward pass in training: eager PyTorch and fusedres</title>",
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="16" y="30" font-size="17" font-weight="bold">eager PyTorch: {len(EAGER)} passes</text>',
        f'<text x="16" y="50" fill="{FAINT}">{units["eager"]} units of memory traffic</text>',
        f'<text x="400" y="30" font-size="17" font-weight="bold">fusedres: {len(FUSED)} passes</text>',
        f'<text x="400" y="50" fill="{FAINT}">{units["fused"]} units of memory traffic (moments form)</text>',
        *drawn(EAGER, 16, 160),
        *drawn(FUSED, 400, 330),
        f'<rect x="400" y="{below}" width="17" height="17" fill="{READ}"/>',
        f'<text x="424" y="{below + 13}">read</text>',
        f'<rect x="474" y="{below}" width="17" height="17" fill="{WRITTEN}"/>',
        f'<text x="498" y="{below + 13}">written</text>',
        f'<text x="400" y="{below + 42}" fill="{FAINT}">A bottleneck with identity shortcut, training, forward.</text>',
        f'<text x="400" y="{below + 60}" fill="{FAINT}">Unit: a tensor as wide as its middle layer. Input and output:'
        " four.</text>",
        f'<text x="400" y="{below + 78}" fill="{FAINT}">The output of the last convolution is never in memory.</text>',
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("passes.svg").write_text(picture())
