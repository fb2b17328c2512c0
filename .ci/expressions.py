"""The regular expressions of ogx.py, and what makes them slow: for test_ogx.py and for fuzz.py."""

from __future__ import annotations

import ast
import functools
import random
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ogx  # noqa: E402

# Expressions that take the square of their input, by how much of it they get at most.
CUT: dict[Any, int] = {
    "<title[^>]*>(.*?)</title>": 4000,  # of an odd answer's beginning
    r"(?s)<(script|style).*?</\1>|<[^>]+>": 4000,
}
WORDS = {"asked": "high", "effort": "high"}  # what stands in expressions for a moment
# What is given to re's functions by other names than the module's own.
LOCAL: dict[str, list[Any]] = {
    "Remedies: pattern": [f"(?i){row[0]}" for row in ogx.ROW_REMEDIES],
    "said": [*ogx.FAILURES],
    "pattern": [place for kind in ogx.PROVIDER_KINDS.values() for place, _, _ in kind.servers],
    "about": [rf"(?i)(?P<other>{ogx.OTHER_SUBJECTS})|tool|function|schema|grammar|regex|\$defs"],
    "stems": [row[0] for row in (*ogx.CODE_STATUSES, *ogx.STOP_REASONS)],
    "id_pattern": [row[1] for kind in ogx.PROVIDER_KINDS.values() for row in kind.more_lists],
    "signed": [kind.signed for kind in ogx.PROVIDER_KINDS.values()],
    "here": [here for kind in ogx.PROVIDER_KINDS.values() for _, here, _ in kind.servers],
    "kind.tool_ids": [ogx.NINE, ogx.FORTY],
    "provider.kind.native_models": [k.native_models for k in ogx.PROVIDER_KINDS.values()],
    "row.unsafe": [shell.unsafe for shell in ogx.SHELLS.values() if shell.unsafe],
    "self.PLAIN": [ogx.ChunkTemplate.PLAIN.pattern],
    "self.NOISE": [ogx.ChunkTemplate.NOISE.pattern],
}  # fmt: skip



@functools.lru_cache(maxsize=1)
def expressions() -> list[tuple[str, Any, int]]:
    """(method, pattern, how much it gets at most) of each regular expression in ogx.py, however
    it is used; 0: text of any length."""
    source = Path(ogx.__file__).read_text(encoding="utf-8")
    found, lines = set(), source.split("\n")
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        method, owner = node.func.attr, ast.unparse(node.func.value)
        if method not in ("search", "match", "fullmatch", "sub", "subn", "findall", "finditer",
                          "split"):  # fmt: skip
            continue
        if owner == "re":
            given = {ast.unparse(node.args[0])}
        elif isinstance(getattr(ogx, owner, None), re.Pattern) or owner in LOCAL:
            given = {owner}
        else:
            continue
        banner = next(line for line in lines[node.lineno :: -1] if line[:6] == "# ====")
        section, name = banner.split()[2], given.pop()
        values = LOCAL.get(f"{section}: {name}") or LOCAL.get(name)
        for value in values or [eval(name, {**vars(ogx), **WORDS})]:
            flags = getattr(value, "flags", 0)
            pattern = getattr(value, "pattern", value)
            letters = "".join(c for c, f in (("i", re.I), ("m", re.M), ("s", re.S)) if flags & f)
            prefix = f"(?{letters})" if letters and pattern[:2] not in ("(?", b"(?") else ""
            prefix = prefix.encode() if isinstance(pattern, bytes) else prefix
            pattern = prefix + pattern
            words = 2500 if section == "Remedies" else 0  # a refusal's, as refusal_from_body() cuts
            found.add((method, pattern, CUT.get(pattern, words)))
    assert {*CUT} <= {pattern for _, pattern, _ in found}
    return sorted(found, key=repr)


cpu_time = getattr(time, "thread_time", time.process_time)  # other threads are at work, too


def cpu(work: Callable[..., Any], *args: Any) -> float:
    began = cpu_time()
    work(*args)
    return cpu_time() - began


def worst_input(method: str, pattern: Any, limit: int, chance: random.Random | None = None,
                size: int = 6000) -> str:  # fmt: skip
    """A repeated piece over which an expression takes more than linear time, or long, where it
    gets `limit` characters at most; "" where there is none. With `chance` one piece is tried.
    What takes too little time for `size` characters isn't noticed."""
    text = pattern.decode("latin-1") if isinstance(pattern, bytes) else pattern
    words = re.findall(r"[^\\()\[\]{}*+?|^$.]{2,20}", re.sub(r"\\.|\(\?\w*", "|", text))[:6]
    pieces = [" ", "\n", "a", "0", "_", "/", '"', "\\", "<", "{", "1 ", *words]
    pieces += [a + b for a, b in zip(words, words[1:])]
    compiled = re.compile(pattern)

    def cost(piece: str, begin: str, size: int) -> float:
        data = begin + piece * (size // len(piece)) + "\x01"
        data += "}" * ("}" in text)
        data = data.encode("latin-1") if isinstance(pattern, bytes) else data
        if method in ("sub", "subn"):
            return cpu(compiled.sub, data[:0], data)
        if method in ("findall", "finditer", "split"):
            return cpu(compiled.findall, data)
        return cpu(getattr(compiled, method), data)

    size = limit or size
    begins = ["", '"', "{", "a:", *words[:3]]
    if chance:
        begins = ["".join(chance.choices(pieces + begins, k=chance.randrange(3)))]
        pieces = ["".join(chance.choices(pieces, k=chance.randrange(1, 4)))]
    for begin in begins:
        for piece in filter(None, pieces):
            if limit:
                bad = min(cost(piece, begin, size) for _ in range(2)) > 0.2
            else:
                bad = cost(piece, begin, size) > 0.001 and min(
                    cost(piece, begin, size) for _ in range(3)) > 9 * min(
                    cost(piece, begin, size // 4) for _ in range(5)) + 0.0005  # fmt: skip
            if bad:
                return f"{begin}{piece}"
    return ""
