"""Generated Triton for GPUs: emitter, tile table, cache of modules, launch functions."""
