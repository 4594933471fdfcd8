"""What a model costs in FLOPs and bytes, to run and to train."""
