#!/usr/bin/env python3
"""Draws .docs/architecture.svg from ogx.py itself:   make docs

A box for each section in the file's order, with the words of the map at its beginning and its
length; what is above the line does no I/O.
"""

from __future__ import annotations

import html
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINE = "Above this line nothing does I/O"
STYLE = """
    text { font: 13px ui-monospace, Menlo, Consolas, monospace; fill: #1f2328 }
    .name { font-weight: bold } .size { fill: #656d76; text-anchor: end }
    rect { fill: #f6f8fa; stroke: #d0d7de } line { stroke: #bc4c00; stroke-dasharray: 6 4 }
    .line { fill: #bc4c00 }
    @media (prefers-color-scheme: dark) {
      text { fill: #e6edf3 } .size { fill: #8d96a0 } rect { fill: #161b22; stroke: #30363d }
      line { stroke: #f0883e } .line { fill: #f0883e }
    }"""


def sections(source: str) -> list[tuple[str, str, int]]:
    """(name, its words, its lines) of each section, and of the line between them."""
    parts = re.split(r"(?m)^# ======== (.+?) =+$", source)
    words = dict(re.findall(r"(?m)^    ([A-Z][A-Za-z ]*?)  +(\S.*)$", parts[0]))
    return [(name, words.get(name, ""), text.count("\n"))
            for name, text in zip(parts[1::2], parts[2::2])]


def architecture(source: str) -> str:
    rows, y = list[str](), 10
    for name, words, lines in sections(source):
        if name == LINE:
            rows.append(f'  <line x1="10" x2="790" y1="{y + 10}" y2="{y + 10}"/>\n'
                        f'  <text class="line" x="20" y="{y + 28}">{LINE}; what is below '
                        "connects, waits, reads and writes</text>")
            y += 40
            continue
        rows.append(f'  <rect x="10" y="{y}" width="780" height="24" rx="4"/>\n'
                    f'  <text class="name" x="20" y="{y + 17}">{html.escape(name)}</text>\n'
                    f'  <text x="140" y="{y + 17}">{html.escape(words)}</text>\n'
                    f'  <text class="size" x="780" y="{y + 17}">{round(lines, -1)} lines</text>')
        y += 28
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 {y + 6}" role="img">\n'
            f"  <title>The sections of ogx.py; each uses only those above it</title>\n"
            f"  <style>{STYLE}\n  </style>\n" + "\n".join(rows) + "\n</svg>\n")


if __name__ == "__main__":
    source = (ROOT / "ogx.py").read_text(encoding="utf-8")
    (ROOT / ".docs/architecture.svg").write_text(architecture(source), encoding="utf-8")
