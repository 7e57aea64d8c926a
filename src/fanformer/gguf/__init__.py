"""GGUF: the format, its tokenizer, the engine that runs a file on ggml, and how a folder is written as one."""
