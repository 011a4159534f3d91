"""The embedded demo model: a small Qwen2.5-VL reranker with its own tokenizer, and the code that trained it.

tokenizer.py    the byte-level BPE with Qwen's control tokens
data.py         images, captions and text pairs; what is held out
views.py        random views of images: ground, place, colour, noise
scenes.py       composed pictures with made captions
passages.py     composed passages, and questions
model.py        the configuration, the batched vision tower, packed rows and their scores
align.py        stage "vision": images and words into one space
comparator.py   weights under which the language model compares, before it learns to compare better
tasks.py        listwise rows: what is asked, what is right, what is wrong
listwise.py     stage "listwise": views, mix and loss
calibration.py  stage "calibrate": scores become probabilities; how far they are
workers.py      gradients on several cores
train.py        the stages, from random weights to an export
questions.py    rows of the validation split
bm25.py         the baseline for texts
evaluate.py     nDCG@10 and R@1 by split, task, pairing and language
pictures.py     ten rankings and the reliability, drawn
weights/        the result: safetensors, tokenizer, configuration
"""
