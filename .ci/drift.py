#!/usr/bin/env python3
"""What the newest SDKs and the newest Claude Code know, and ogx.py doesn't.

    make drift                              installs them into .dev/drift, and compares
    python3 .ci/drift.py SITE CLAUDE        a folder of Python packages, and Claude Code's program
    python3 .ci/drift.py SITE CLAUDE --accept    writes what is new into .ci/known_names.txt

Compared are names: types of blocks, events and tools, fields of requests, betas, endpoints,
variables. A name is known if ogx.py says it, or .ci/known_names.txt does, where those stand that
need nothing, or nothing yet. New ones are printed with where they are used; the exit status is 1
then.
"""

from __future__ import annotations

import argparse
import mmap
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KNOWN = ROOT / ".ci/known_names.txt"
# Kind of name -> where it stands in a package, and its pattern there.
PACKAGES = {
    "anthropic: type": ("anthropic/types/**/*.py", r"type: (?:Required\[)?Literal\[([^\]]+)\]"),
    "anthropic: field": ("anthropic/types/**/message_create_params.py", r"(?m)^    (\w+): "),
    "anthropic: beta": ("anthropic/types/anthropic_beta_param.py", r'("[\w-]+-20\d\d-\d\d-\d\d")'),
    "anthropic: endpoint": ("anthropic/resources/**/*.py", r'("/v1/[^"?]+)'),
    "openai: chat type": ("openai/types/chat/*.py", r"type: (?:Required\[)?Literal\[([^\]]+)\]"),
    "openai: chat field": ("openai/types/chat/completion_create_params.py", r"(?m)^    (\w+): "),
    "openai: responses type": ("openai/types/responses/*.py",
                               r"type: (?:Required\[)?Literal\[([^\]]+)\]"),
    "openai: responses field": ("openai/types/responses/response_create_params.py",
                                r"(?m)^    (\w+): "),
}
PROGRAM = {
    "claude code: variable": rb"\b((?:CLAUDE_CODE|ANTHROPIC)_[A-Z0-9_]{3,60})\b",
    "claude code: beta": rb"\"([a-z][a-z0-9-]{3,50}-20\d\d-\d\d-\d\d)\"",
    "claude code: endpoint": rb"[\"'`](/v1/[a-z_]+(?:/[a-z_]+)*)\b",
}


def names_in(site: Path, program: Path) -> Iterator[tuple[str, str, str]]:
    """(kind, name, where) of all that is found."""
    for kind, (files, pattern) in PACKAGES.items():
        for path in sorted(site.glob(files)):
            for found in re.findall(pattern, path.read_text(encoding="utf-8")):
                for name in re.findall(r"[^\s\",]+", found):
                    yield kind, name, str(path.relative_to(site))
    with program.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for kind, expression in PROGRAM.items():
            for match in re.finditer(expression, data):
                yield kind, match[1].decode(), program.name


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("site", type=Path)
    parser.add_argument("program", type=Path)
    parser.add_argument("--accept", action="store_true")
    options = parser.parse_args()
    source = (ROOT / "ogx.py").read_text(encoding="utf-8")
    known = set(KNOWN.read_text(encoding="utf-8").splitlines()) if KNOWN.exists() else set()
    said = set(re.findall(r"[\w/{}-]+", source))
    new = dict[tuple[str, str], str]()
    for kind, name, where in names_in(options.site, options.program):
        if name not in said and f"{kind}\t{name}" not in known:
            new.setdefault((kind, name), where)
    if options.accept:
        rows = sorted({*known, *map("\t".join, new)})
        KNOWN.write_text("\n".join(rows) + "\n", encoding="utf-8")
        return 0
    for (kind, name), where in sorted(new.items()):
        print(f"{kind}  {name}  ({where})")
    print(f"drift: {len(new)} new names", file=sys.stderr)
    return int(bool(new))


if __name__ == "__main__":
    sys.exit(main())
