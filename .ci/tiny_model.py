"""Write a tiny language model that says fixed things, for llama.cpp and for transformers.

    .servers/venv/bin/python .ci/tiny_model.py FOLDER

FOLDER/tiny.gguf and, where transformers is installed, FOLDER/hub (a cache of Hugging Face's form
with the repository ogx/tiny) hold the same Qwen2 model of one layer; FOLDER/tiny.jinja is its chat
template, which refuses nothing. It is a Markov chain: attention and feed-forward are zero, so the
next token depends on the last one alone. Each piece of a line in LINES is one token, which leads to
the next piece. The chat template ends the prompt with the token of the line that the conversation
asks for: by a word in the last user message, or by what a tool answered. Like Qwen3.5's, it refuses
a system message after the first. Where a grammar forbids the next piece (when a call is demanded),
a general preference begins a call and closes its strings and objects at once.
"""

import importlib.util
import json
import pydoc_data.topics
import sys
from itertools import pairwise
from pathlib import Path

import gguf
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

END, START = "<|im_end|>", "<|im_start|>"
CALL = '\n<tool_call>\n{"name": "'
SHELL = '", "arguments": {"command": "echo $((6*7))-from-the-shell", "description": "Compute'
WRITE = '", "arguments": {"file_path": "notes.txt", "content": "One note.\\n"}}\n</tool_call>\n'
AGENT = ('", "arguments": {"description": "Say it", "prompt": "An errand: say it.", '
         '"subagent_type": "general-purpose", "run_in_background": false}}\n</tool_call>\n')
# Every text piece occurs once in all lines; bytes become byte tokens, for half-written characters.
LINES = {
    "hello": ["Hello", " from a tiny", " model ", "\U0001f600".encode(), " with bytes."],
    "think": ["<think>\nLet me", " ponder this.", "\n</think>\n\nThought", " through."],
    "weather": ["I look.", CALL + "weather", '", "arguments": {"city": "Os',
                'lo"}}\n</tool_call>'],
    "shell": ["On it.", CALL + "Bash", SHELL[:30], SHELL[30:50], SHELL[50:],
              '"}}\n</tool_call>\n'],
    "saw42": ["The shell", " says", " 42."],
    "write": ["I write.", CALL + "Write", WRITE],
    "agent": ["I ask.", CALL + "Agent", AGENT],
    "load": ["I load.", CALL + "ToolSearch", '", "arguments": {"query": "select:NotebookEdit,WebF',
             'etch"}}\n</tool_call>\n'],
    "answered": ["The tool", " has", " answered."],
    "endless": ["on and on", " and on and on", ", then"],
}  # fmt: skip
WORDS = {"THINK-FIRST": "think", "ASK-WEATHER": "weather", "RUN-SHELL": "shell",
         "WRITE-NOTES": "write", "ASK-AGENT": "agent", "LOAD-TOOLS": "load",
         "TALK-ON": "endless"}  # fmt: skip
PREFERENCE = {END: 9.0, CALL: 7.0, '"': 5.0, "}": 4.0, "]": 3.0, "{": 2.0, "0": 2.0, "\\": -2.0}
SPACES = "ĠĊĉč"  # as byte-level tokens spell them
WINDOW, FEED_FORWARD = 131_072, 32

TEMPLATE = """\
{%- macro said(m) -%}
{%- if m.content is string -%}{{ m.content }}
{%- elif m.content -%}{%- for part in m.content -%}{{ part.text }}{%- endfor -%}{%- endif -%}
{%- endmacro -%}
{%- if tools -%}
{{- '<|im_start|>system\\n# Tools\\n<tools>' -}}
{%- for tool in tools -%}{{- '\\n' + (tool | tojson) -}}{%- endfor -%}
{{- '\\n</tools>\\nCall one within <tool_call></tool_call>.<|im_end|>\\n' -}}
{%- endif -%}
{%- set ns = namespace(line='hello') -%}
{%- for m in messages -%}
{%- if m.role == 'system' and not loop.first -%}
{{- raise_exception('System message must be at the beginning.') -}}
{%- endif -%}
{{- '<|im_start|>' + m.role + '\\n' -}}
{%- if m.reasoning_content -%}
{{- '<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' -}}
{%- endif -%}
{{- said(m) -}}
{%- if m.role == 'user' -%}
{%- set ns.line = 'hello' -%}
{%- for word, line in WORDS.items() -%}
{%- if word in said(m) -%}{%- set ns.line = line -%}{%- endif -%}
{%- endfor -%}
{%- elif m.role == 'tool' -%}
{%- set ns.line = 'saw42' if '42-from-the-shell' in said(m) else 'answered' -%}
{%- elif m.role == 'assistant' and m.tool_calls -%}
{%- for call in m.tool_calls -%}
{{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' -}}
{{- call.function.arguments | tojson -}}
{{- '}\\n</tool_call>' -}}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n<|' + ns.line + '|>' -}}
{%- endif -%}
""".replace("WORDS", json.dumps(WORDS))
# How transformers reads an answer; its own form for Qwen doesn't expect the line's token.
RESPONSE = {
    "start_anchor_pattern": r"<\|im_start\|>assistant\n<\|\w+\|>",
    "defaults": {"role": "assistant"},
    "fields": {
        "reasoning_content": {"open": "<think>", "close": "</think>", "content": "text"},
        "tool_calls": {
            "open_pattern": r"\s*<tool_call>", "close": "</tool_call>", "repeats": True,
            "content": "json", "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"\s*<\|im_end\|>", "content": "text"},
    },
}  # fmt: skip


def trained_tokenizer() -> Tokenizer:
    """Byte-level BPE with the usual words of English prose, so that prompts aren't too long."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=3000, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(pydoc_data.topics.topics.values(), trainer)
    texts = [CALL, *(one for line in LINES.values() for one in line if isinstance(one, str))]
    assert not any(tokenizer.token_to_id(text) for text in texts)
    tokenizer.add_special_tokens([START, END, *(f"<|{name}|>" for name in LINES)])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in texts])
    return tokenizer


def chains(tokenizer: Tokenizer) -> list[tuple[int, int]]:
    """(token, next token) for every token that has one."""
    pairs: list[tuple[int, int]] = []
    for name, pieces in LINES.items():
        line = [tokenizer.token_to_id(f"<|{name}|>")]
        for piece in pieces:
            text = piece.decode() if isinstance(piece, bytes) else piece
            line += tokenizer.encode(text, add_special_tokens=False).ids
        line.append(line[1] if name == "endless" else tokenizer.token_to_id(END))
        pairs += pairwise(line)
    assert len({token for token, _ in pairs}) == len(pairs), "a token with two next tokens"
    return pairs


def weights(tokenizer: Tokenizer, width: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings: one dimension that is always set, one more for each token of a line. Output: the
    next token by the latter, the general preference by the former."""
    size, pairs = tokenizer.get_vocab_size(), chains(tokenizer)
    assert len(pairs) < width
    embedding = np.zeros((size, width), np.float32)
    output = np.zeros((size, width), np.float32)
    embedding[:, 0] = 1
    tails = {text: -2.0 for text in tokenizer.get_vocab()  # grammars allow any number of them
             if text.strip(SPACES)[:1] in ("", ",")}
    for text, value in {**PREFERENCE, **tails}.items():
        output[tokenizer.token_to_id(text), 0] = value
    for state, (token, following) in enumerate(pairs, 1):
        embedding[token, state] = 1
        output[following, state] = 20
    return embedding, output


def write_transformers(hub: Path, tokenizer: Tokenizer, embedding: np.ndarray,
                       output: np.ndarray) -> None:
    import torch
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=len(embedding), hidden_size=embedding.shape[1], intermediate_size=FEED_FORWARD,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=WINDOW, eos_token_id=tokenizer.token_to_id(END),
        tie_word_embeddings=False,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        parameter.data.fill_(1 if "norm" in name else 0)
    model.model.embed_tokens.weight.data = torch.from_numpy(embedding)
    model.lm_head.weight.data = torch.from_numpy(output)
    repository, revision = hub / "models--ogx--tiny", "0" * 40
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs/main").write_text(revision)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END,
                                   clean_up_tokenization_spaces=False)
    fast.chat_template, fast.response_template = TEMPLATE, RESPONSE
    fast.save_pretrained(repository / "snapshots" / revision)
    model.save_pretrained(repository / "snapshots" / revision)


def write_gguf(path: Path, tokenizer: Tokenizer, embedding: np.ndarray, output: np.ndarray) -> None:
    out, width = gguf.GGUFWriter(path, "qwen2"), embedding.shape[1]
    out.add_name("tiny")
    out.add_context_length(WINDOW)
    out.add_embedding_length(width)
    out.add_block_count(1)
    out.add_feed_forward_length(FEED_FORWARD)
    out.add_head_count(2)
    out.add_head_count_kv(1)
    out.add_layer_norm_rms_eps(1e-6)
    parsed = json.loads(tokenizer.to_str())
    kinds = {one["id"]: gguf.TokenType.CONTROL if one["special"] else gguf.TokenType.USER_DEFINED
             for one in parsed["added_tokens"]}
    ids = range(tokenizer.get_vocab_size())
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("qwen2")
    out.add_token_list([tokenizer.id_to_token(token) for token in ids])
    out.add_token_types([kinds.get(token, gguf.TokenType.NORMAL) for token in ids])
    out.add_token_merges([" ".join(pair) for pair in parsed["model"]["merges"]])
    out.add_eos_token_id(tokenizer.token_to_id(END))
    out.add_add_bos_token(False)
    out.add_chat_template(TEMPLATE)
    half = width // 2  # of two heads, which share one key and value
    zeros = {"attn_q.weight": (width, width), "attn_q.bias": (width,),
             "attn_k.weight": (half, width), "attn_k.bias": (half,),
             "attn_v.weight": (half, width), "attn_v.bias": (half,),
             "attn_output.weight": (width, width), "ffn_gate.weight": (FEED_FORWARD, width),
             "ffn_up.weight": (FEED_FORWARD, width), "ffn_down.weight": (width, FEED_FORWARD)}
    out.add_tensor("token_embd.weight", embedding)
    out.add_tensor("output.weight", output)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        out.add_tensor(f"{name}.weight", np.ones(width, np.float32))
    for name, shape in zeros.items():
        out.add_tensor(f"blk.0.{name}", np.zeros(shape, np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def milder_template() -> str:
    """The template as Qwen2.5 has it: a system message may stand anywhere, and tools follow the
    first."""
    def block(begin: str) -> str:
        end = "{%- endif -%}\n"
        at = TEMPLATE.index(begin)
        return TEMPLATE[at : TEMPLATE.index(end, at) + len(end)]

    tools = block("{%- if tools -%}")
    refusal = block("{%- if m.role == 'system' and not loop.first")
    ended = "{{- '<|im_end|>\\n' -}}\n"
    mild = TEMPLATE.replace(tools, "", 1).replace(refusal, "", 1)
    assert mild.count(ended) == 1
    return mild.replace(ended, f"{ended}{{%- if loop.first -%}}{tools}{{%- endif -%}}\n")


def main(folder: Path) -> None:
    tokenizer = trained_tokenizer()
    embedding, output = weights(tokenizer)
    write_gguf(folder / "tiny.gguf", tokenizer, embedding, output)
    (folder / "tiny.jinja").write_text(milder_template())
    if importlib.util.find_spec("transformers"):
        write_transformers(folder / "hub", tokenizer, embedding, output)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
