"""Parents with different tokenizers: the output's tokenizer, and every parent's rows in its numbering.

* `alignment`: the output's vocabulary, and the tables of parents aligned to it by token.
* `row_plan`: where each row of an output table comes from.
* `embedding_tables`: which tensors have one row a token, and how many.
* `tokenizer_files`: the tokens of parents, and the output's tokenizer made from their files.
"""
