"""The recipe of the arith-moe checkpoint: problems, tokenizer, training and evaluation."""
