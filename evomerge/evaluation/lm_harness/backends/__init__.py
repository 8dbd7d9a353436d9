"""What answers the requests of lm-eval's tasks: the compiled scorer, or lm-eval's own HFLM on the same model."""
