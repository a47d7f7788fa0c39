"""Causal language models as a problem for `lib.finetune`: any that transformers loads."""
