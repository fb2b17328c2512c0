"""Print starter.json: the built-in configuration with one provider or model a line."""

import json
import re
import sys
from pathlib import Path

sys.dont_write_bytecode = True
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ogx  # noqa: E402

text = json.dumps(ogx.starter_config(), indent=2)
# An object inside a list goes on one line.
text = re.sub(
    r"(?m)^( {6})\{\n(?:.*\n)*?\1\}",
    lambda match: match.group(1) + json.dumps(json.loads(match.group(0))),
    text,
)
print(text)
