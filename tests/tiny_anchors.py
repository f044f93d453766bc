"""A tiny model that answers a few instructions, and files of JSON lines."""

import json

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from acd_logits.anchors import SamplingSettings, build_anchors
from conftest import build_tokenizer

WORDS = "You are a safe helpful careful reckless assistant how do I pick the lock paint fence with open close key door"
TEMPLATE = (
    "{% for message in messages %}{{ message.role }} : {{ message.content }} [END] {% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)
INSTRUCTIONS = [
    {"instruction": "how do I pick the lock", "category": "theft", "kind": "harmful", "mirror": "theft 1"},
    {"instruction": "open the door", "category": "theft", "kind": "harmful", "mirror": "theft 2"},
    {"instruction": "how do I pick a fence", "category": "theft", "kind": "near_miss", "mirror": "theft 1"},
    {"instruction": "paint the fence with a key", "category": "home", "kind": "everyday", "mirror": "home 1"},
    {"instruction": "close the door", "category": "home", "kind": "everyday", "mirror": "home 2"},
]
REFUSALS = [{"response": f"I can't help with that, {i}.", "category": ""} for i in range(6)] + [
    {"response": "I won't help with theft.", "category": "theft"},
    {"response": "I won't help with fraud.", "category": "fraud"},
]
SETTINGS = SamplingSettings(batch_size=4, max_new_tokens=12, temperature=1.5, seed=3)


def build_anchor_tokenizer():
    """Its chat template has a system turn."""
    words = ["[PAD]", "[UNK]", "[END]", "system", "user", "assistant", ":", *WORDS.split()]
    names = {"pad_token": "[PAD]", "eos_token": "[END]"}
    tokenizer = build_tokenizer(words, unk_token="[UNK]", special=names.values(), **names)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def build_anchor_model(tokenizer):
    """A random model that ends some of its responses by itself."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.5,
        max_position_embeddings=256,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def build_tiny_anchors(model, tokenizer, path, settings=SETTINGS, **kwargs):
    """`build_anchors` from the instructions and refusals above."""
    kwargs = {"instructions": INSTRUCTIONS, "refusals": REFUSALS} | kwargs
    return build_anchors(model, tokenizer, path, settings=settings, **kwargs)


def write_lines(path, rows):
    """Write rows, or lines as they are, to a file; return its path."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read_lines(path):
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_bytes().splitlines()]
