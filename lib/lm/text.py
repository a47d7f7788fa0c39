"""stub"""
def encode_prompts(tokenizer, prompts, max_tokens=None):
    return [tokenizer(p)["input_ids"] for p in prompts]
