"""The embedded demo model: a small Qwen2.5-VL reranker with its own tokenizer, and the code that trained it.

tokenizer.py   the byte-level BPE with Qwen's control tokens
data.py        images, captions and text pairs; splits; augmentation
model.py       the configuration, the batched vision tower, packed rows and their scores
tasks.py       listwise rows: what is asked, what is right, what is wrong
train.py       the stages, from random weights to an export
evaluate.py    nDCG@10 and R@1 by task and language
weights/       the result: safetensors, tokenizer, configuration
"""
