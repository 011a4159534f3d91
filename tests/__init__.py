"""The suite; `tests/tiny_qwen.py` makes a checkpoint of random weights for it."""
