"""An MCP server for Claude Code on stdio. Its one tool, `send`, answers with the arguments that it
got; its schema is valid, and full of what one provider or another refuses."""

import json
import sys

LONG = "Sends a letter. " + "It goes out at once and is not to be called back. " * 40
TOOL = {"name": "send", "description": LONG, "inputSchema": {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object", "required": ["to"], "additionalProperties": False,
    "properties": {
        "to": {"type": "string", "pattern": r"^(?!\.)(?!.*\.\.)[\w.]+@\w+\.\p{L}{2,}$"},
        "copies": {"type": "array", "description": "further addresses"},
        "when": {"type": ["string", "null"], "format": "date-time", "default": None},
        "kind": {"$ref": "#/$defs/kind"},
        "weight": {"type": "number", "anyOf": [{"minimum": 1}, {"const": 0}]},
    },
    "$defs": {"kind": {"type": "string", "enum": ["letter", "parcel"]}},
}}

for line in sys.stdin:
    asked = json.loads(line)
    if asked.get("method") == "initialize":
        result = {"protocolVersion": asked["params"]["protocolVersion"],
                  "capabilities": {"tools": {}}, "serverInfo": {"name": "post", "version": "1"}}
    elif asked.get("method") == "tools/list":
        result = {"tools": [TOOL]}
    elif asked.get("method") == "tools/call":
        told = "sent " + json.dumps(asked["params"]["arguments"], sort_keys=True)
        result = {"content": [{"type": "text", "text": told}]}
    else:
        result = {}
    if "id" in asked:
        print(json.dumps({"jsonrpc": "2.0", "id": asked["id"], "result": result}), flush=True)
