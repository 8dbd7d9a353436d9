"""Parents with different tokenizers: the output's tokenizer, and every parent's rows in its numbering."""
