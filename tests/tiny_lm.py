"""A GPT-NeoX policy of a few kB with a byte-level tokenizer, as a folder in the hub's format."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GPTNeoXForSequenceClassification,
    PreTrainedTokenizerFast,
)

from lib.lm.policy import has_dtype

EOS, PAD, TURN = "<eos>", "<pad>", "<turn>"
TEMPLATE = (
    "{% for m in messages %}{{ '<turn>' + m['role'] + '\n' + m['content'] + '<turn>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<turn>assistant\n' }}{% endif %}"
)
SIZE = 264  # embedding rows: 256 bytes, the special tokens, and room to spare


def half_of(device: str) -> str:
    """The dtype of 16 bits in which a device multiplies itself: not bfloat16 on a T4."""
    return "bfloat16" if has_dtype(torch.device(device), "bfloat16") else "float16"


def tiny_tokenizer(
    *,
    eos: str | None = EOS,
    pad: str | None = PAD,
    template: str | None = None,
    side: str = "right",
) -> PreTrainedTokenizerFast:
    """One token a byte (ids 0 to 255), then EOS 256, PAD 257, TURN 258, whichever are named."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens([EOS, PAD, TURN])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token=eos, pad_token=pad, padding_side=side
    )
    tokenizer.chat_template = template
    return tokenizer


def tiny_config(*, hidden: int = 16, layers: int = 1, vocab: int = SIZE, **more) -> GPTNeoXConfig:
    """Width 16, one layer, two heads, 256 positions; `more` overrides any field."""
    fields = dict(
        vocab_size=vocab, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=2,
        intermediate_size=2 * hidden, max_position_embeddings=256, bos_token_id=None,
        eos_token_id=256, pad_token_id=257,
    )  # fmt: skip
    return GPTNeoXConfig(**(fields | more))


def save_tiny_policy(folder: Path, *, seed: int = 0, tokenizer=None, **config) -> Path:
    """A randomly initialised policy and its tokenizer, saved in `folder`, which is returned."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        GPTNeoXForCausalLM(tiny_config(**config)).save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return Path(folder)


def save_tiny_reward_model(folder: Path, *, seed: int = 0, tokenizer=None, **config) -> Path:
    """As `save_tiny_policy`, with one score in place of the vocabulary's logits."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = GPTNeoXForSequenceClassification(tiny_config(num_labels=1, **config))
        model.save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return Path(folder)
