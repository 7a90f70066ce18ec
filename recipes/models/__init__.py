"""Base models: loading, tokenizers, quantization, what a run needs."""
