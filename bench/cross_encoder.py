"""sentence-transformers' `CrossEncoder` over a Qwen2.5-VL checkpoint, for bench/peers.py. Runs in an environment of
its own, which needs sentence-transformers >= 6, pillow and torchvision; nothing of Pericarp is imported.

    python bench/cross_encoder.py CHECKPOINT TEMPLATE

Left-padded batches, sorted by length, through its `LogitScore` path: z_yes - z_no of the last position. One JSON
object per line. First it says {"ready": true}; then each line of `{"dtype", "batch", "threads", "body"}` on
stdin, with a rerank request as body, is answered with `{"scores", "ms"}`. What is timed is what a caller in the
same process would wait for: base64 and JPEG, the processor, the forward passes.
"""

from __future__ import annotations

import base64
import importlib
import io
import json
import sys
import time
from pathlib import Path
from typing import Any

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def load(checkpoint: str, template: str, dtype: str) -> Any:
    """A CrossEncoder whose scores are sigmoids."""
    torch = importlib.import_module("torch")
    library = importlib.import_module("sentence_transformers")
    bodies = importlib.import_module("sentence_transformers.base.modules")
    heads = importlib.import_module("sentence_transformers.cross_encoder.modules")
    body = bodies.Transformer(
        checkpoint,
        transformer_task="any-to-any",
        model_kwargs={"dtype": getattr(torch, DTYPES[dtype]), "attn_implementation": "sdpa"},
        processor_kwargs={"chat_template": template},
    )
    yes, no = (body.tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no"))
    head = heads.LogitScore(true_token_id=yes, false_token_id=no)
    return library.CrossEncoder(modules=[body, head], device="cpu", activation_fn=torch.nn.Sigmoid())


def read(document: str | dict[str, Any]) -> Any:
    """A text, or the image of a document of one image part."""
    if isinstance(document, str):
        return document
    (part,) = document["content"]
    encoded = part["image_url"]["url"].partition(",")[2]
    image: Any = importlib.import_module("PIL.Image")
    return image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB")


def main() -> int:
    checkpoint, template = sys.argv[1:]
    torch = importlib.import_module("torch")
    models = {dtype: load(checkpoint, Path(template).read_text(), dtype) for dtype in DTYPES}
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        ask = json.loads(line)
        body = json.loads(ask["body"])
        torch.set_num_threads(ask["threads"])
        began = time.perf_counter()
        pairs = [(body["query"], read(document)) for document in body["documents"]]
        scores = models[ask["dtype"]].predict(pairs, batch_size=ask["batch"], show_progress_bar=False)
        ms = (time.perf_counter() - began) * 1000
        print(json.dumps({"scores": [float(score) for score in scores], "ms": ms}), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
