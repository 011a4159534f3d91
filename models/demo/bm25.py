"""BM25 (Robertson and Zaragoza, 2009) over a handful of texts: the baseline that a text reranker is measured against."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

K1, B = 1.2, 0.75


def split_words(text: str) -> list[str]:
    """Lower-case words; Chinese, which has no spaces, as single characters and pairs of them."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    for run in re.findall(r"[\u4e00-\u9fff]+", text):
        words += [*run, *(run[at : at + 2] for at in range(len(run) - 1))]
    return words


def score_texts(query: str, texts: Sequence[str]) -> list[float]:
    """BM25 of each text, with document frequencies of these texts alone."""
    documents = [Counter(split_words(text)) for text in texts]
    lengths = [sum(document.values()) for document in documents]
    mean = max(1.0, sum(lengths) / len(lengths))
    scores = [0.0] * len(texts)
    for word in set(split_words(query)):
        found = sum(word in document for document in documents)
        weight = math.log(1 + (len(texts) - found + 0.5) / (found + 0.5))
        for at, (document, length) in enumerate(zip(documents, lengths, strict=True)):
            count = document[word]
            scores[at] += weight * count * (K1 + 1) / (count + K1 * (1 - B + B * length / mean))
    return scores
