"""Tokens: masks, tokenizers and the sampled-token baseline. No kernel knows them."""
