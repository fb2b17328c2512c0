// Tokens of OpenAI's vocabulary o200k_base, as npm's gpt-tokenizer counts them.
//
//     NODE_PATH=.clients/npm/node_modules node .ci/o200k.cjs
//
// Each line of stdin is a JSON text and is answered by a line with its number of tokens; a list of
// texts by that of all of them.
const { countTokens } = require("gpt-tokenizer/encoding/o200k_base");

const plain = { allowedSpecial: new Set(), disallowedSpecial: new Set() };
const count = (text) => countTokens(text, plain);
const lines = require("node:readline").createInterface({ input: process.stdin });

lines.on("line", (line) => {
  console.log([JSON.parse(line)].flat().reduce((sum, text) => sum + count(text), 0));
});
