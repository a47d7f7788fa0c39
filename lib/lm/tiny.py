"""The language model and the instruction data that ship with the book, in `data/length`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from lib.allowed import one_of
from lib.lm.sft import Example
from lib.lm.text import encode_prompts, encode_responses

FOLDER = Path(__file__).parents[2] / "data" / "length"
PAIRS = FOLDER / "responses.parquet"
POLICY = FOLDER / "policy"
SPLITS = ("train", "validation", "test")
VOCABULARY, POSITIONS, WIDTH = 2048, 256, 128
CAP = 96  # response tokens that fine-tuning samples at most, EOS included
EOS, PAD, USER, ASSISTANT = "<|endoftext|>", "<|padding|>", "<|user|>", "<|assistant|>"
# Each turn opens with a token of its own, so that no text merges across the border.
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ '" + ASSISTANT + "' + message['content'] + '" + EOS + "' }}"
    "{% else %}{{ '" + USER + "' + message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '" + ASSISTANT + "' }}{% endif %}"
)


def pairs(split: str, path: Path = PAIRS) -> pd.DataFrame:
    """The instruction/response pairs of a split whose response ended by itself.

    Columns: prompt, response, topic, template, split. The splits share no topic.
    Raises: ValueError for an unknown split.
    """
    one_of("split", split, SPLITS)
    table = pd.read_parquet(path)
    keep = (table["split"] == split) & ~table["capped"]
    return table[keep].drop(columns="capped").reset_index(drop=True)


def train_tokenizer(texts: Iterable[str]):
    """A byte-level BPE of 2,048 entries with the chat template: any text round-trips.

    EOS and padding are tokens of their own; nothing is added in front of a text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[EOS, PAD, USER, ASSISTANT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token=EOS, pad_token=PAD, model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False)  # fmt: skip
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def encode(tokenizer, prompts: Sequence[str], responses: Sequence[str]) -> list[Example]:
    """Pairs as token ids by the conventions of `lib.lm.text`.

    Pairs are left out whose response, EOS included, has more than `CAP` tokens or whose prompt
    leaves no room for such a response.
    """
    heads = encode_prompts(tokenizer, prompts, POSITIONS - CAP)
    bodies = encode_responses(tokenizer, [responses[kept] for kept in heads.kept], CAP)
    rows = zip(heads.ids, bodies.ids, bodies.capped, strict=True)
    return [Example(head, body) for head, body, capped in rows if not capped]


def examples(tokenizer, split: str, path: Path = PAIRS) -> list[Example]:
    """The pairs of a split as token ids: what supervised fine-tuning reads."""
    table = pairs(split, path)
    return encode(tokenizer, list(table["prompt"]), list(table["response"]))


def policy_config(tokenizer, width: int = WIDTH):
    """Pythia's architecture, 4 layers of 4 heads: 1.3 million parameters at width 128.

    Rotary positions on a quarter of each head, attention and MLP in parallel, embeddings untied.
    Initial weights have standard deviation sqrt(2 / (5 width)), as Pythia's: at this width the
    usual 0.02 learns more slowly.
    """
    from transformers import GPTNeoXConfig

    return GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=4 * width,
        max_position_embeddings=POSITIONS,
        initializer_range=math.sqrt(2 / (5 * width)),
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def new_policy(tokenizer, seed: int, width: int = WIDTH):
    """The untrained policy of a seed and width, in float32, ready to be fine-tuned and to sample.

    Its generation settings draw from the policy's own distribution: temperature 1, nothing cut.
    """
    import torch
    from transformers import GenerationConfig, GPTNeoXForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = GPTNeoXForCausalLM(policy_config(tokenizer, width))
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=CAP,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)  # fmt: skip
    return model
