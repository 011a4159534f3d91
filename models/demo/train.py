"""Train the demo model: `python -m models.demo.train --data ../shared/data/train`.

Stages, each with a share of the budget:
    vision     images and words into one space (align.py); 56, 84, then 112 px
    polish     the same again from a lower rate; 84, then 112 px
    listwise   the language model is written down as a comparator of the two (comparator.py), and learns from there on
               packed rows over fixed visual tokens (listwise.py)
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from models.demo import align, comparator, data, evaluate, listwise, tasks
from models.demo.model import (
    Model,
    Packer,
    build_model,
    count_parameters,
    encode_images,
    save_export,
    score_rows,
)
from models.demo.tokenizer import save_tokenizer, train_tokenizer

HERE = Path(__file__).parent
WEIGHTS = HERE / "weights"
SHARES = {"vision": 0.64, "polish": 0.20, "listwise": 0.16}
SIDES = {
    "vision": ((56, 0.35), (84, 0.88), (112, 1.0)),
    "polish": ((84, 0.75), (112, 1.0)),
}  # until which share
SAVE_EVERY_S, EVALUATE_EVERY_S, LOG_EVERY_STEPS = 120.0, 360.0, 20


@dataclass(slots=True)
class Run:
    """Where a run stands; `save` and `resume` carry it over a restart."""

    folder: Path
    model: Model
    corpus: data.Corpus
    packer: Packer
    tokenizer: Tokenizer
    seed: int
    budget_s: float
    extra: align.Temperature = field(default_factory=align.Temperature)
    stage: str = "vision"
    step: int = 0
    elapsed_s: float = 0.0
    optimizers: list[torch.optim.Optimizer] = field(default_factory=list)
    _saved_at: float = 0.0
    _tick: float = 0.0

    def start(self, stage: str) -> None:
        """Begin a stage, or continue it where its checkpoint left it."""
        if self.stage != stage:
            self.stage, self.step, self.elapsed_s = stage, 0, 0.0
        for name, parameter in self.model.named_parameters():
            sees = "visual" in name or "embed_tokens" in name
            parameter.requires_grad_(sees == (stage in SIDES))
        self.optimizers = build_optimizers(self)
        path = self.folder / "optimizer.pt"
        if self.step and path.exists():
            for optimizer, state in zip(self.optimizers, torch.load(path, weights_only=True), strict=True):
                optimizer.load_state_dict(state)
        self._tick = self._saved_at = time.monotonic()

    def advance(self, loss: Tensor) -> float:
        """One optimizer step at the schedule's rate; returns the share of the stage that is over."""
        share = self.elapsed_s / self.budget_s
        rate = min(1.0, (self.step + 1) / 50) * min(1.0, max(0.02, (1.0 - share) / 0.45))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base"] * rate
            optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.grad is not None], 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        self.spend()
        if self._tick - self._saved_at > SAVE_EVERY_S:
            self.save()
            self._saved_at = self._tick
        return self.elapsed_s / self.budget_s

    def spend(self) -> None:
        """Count the time since the last step as the stage's."""
        now = time.monotonic()
        self.elapsed_s += now - self._tick
        self._tick = now

    def log(self, **values: Any) -> None:
        """One line of JSON in the log, one line with an ETA on the terminal."""
        line = {"stage": self.stage, "step": self.step, "elapsed_s": round(self.elapsed_s, 1), **values}
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        left = max(0.0, self.budget_s - self.elapsed_s) / 60
        print(f"{json.dumps(line)}  ETA {left:.1f} min", flush=True)

    def save(self) -> None:
        """Write everything to new files first, then rename: a killed run loses no older state."""
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"model.{k}": v.detach().clone() for k, v in self.model.named_parameters()}
        tensors |= {f"extra.{k}": v.detach().clone() for k, v in self.extra.named_parameters()}
        state = {
            "stage": self.stage,
            "step": str(self.step),
            "elapsed_s": str(self.elapsed_s),
        }
        partial = self.folder / "checkpoint.partial"
        save_file(tensors, partial, metadata=state)
        optimizer = self.folder / "optimizer.partial"
        torch.save([o.state_dict() for o in self.optimizers], optimizer)
        optimizer.replace(self.folder / "optimizer.pt")
        partial.replace(self.folder / "checkpoint.safetensors")

    def resume(self, path: Path) -> None:
        """Take weights and place from a checkpoint."""
        from safetensors import safe_open

        tensors = load_file(path)
        with torch.no_grad():
            for prefix, module in (("model", self.model), ("extra", self.extra)):
                for name, parameter in module.named_parameters():
                    parameter.copy_(tensors[f"{prefix}.{name}"])
        with safe_open(path, "pt") as opened:
            state = opened.metadata()
        self.stage, self.step = state["stage"], int(state["step"])
        self.elapsed_s = float(state["elapsed_s"])


def build_optimizers(run: Run) -> list[torch.optim.Optimizer]:
    """Muon for hidden matrices, AdamW for embeddings, the patch kernel, biases, norms and the temperature."""
    vision = run.stage in SIDES
    matrices: list[Tensor] = []
    others, table = list(run.extra.parameters()), []
    for name, parameter in run.model.named_parameters():
        if not parameter.requires_grad:
            continue
        if "embed_tokens" in name:
            table.append(parameter)
        elif parameter.ndim == 2:
            matrices.append(parameter)
        else:
            others.append(parameter)
    rates = {"vision": (2e-3, 1e-3, 2e-3), "listwise": (2e-4, 2e-4, 1e-4), "polish": (1e-3, 5e-4, 1e-3)}[
        run.stage
    ]
    muon = torch.optim.Muon(
        matrices, lr=rates[0], weight_decay=0.05, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    groups = [{"params": others, "lr": rates[1]}, {"params": table, "lr": rates[2]}]
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0 if vision else 0.01)
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["base"] = group["lr"]
    return [muon, adam]


def train_vision(run: Run, stage: str, batch: int) -> None:
    """Align images with words; the side grows with the stage."""
    run.start(stage)
    aligner = align.Aligner(run.corpus, run.packer, run.tokenizer.get_vocab_size(), run.seed)
    share = run.elapsed_s / run.budget_s
    told, evaluated, losses, hits = time.monotonic(), time.monotonic(), [], []
    while share < 1.0:
        rng = np.random.default_rng((run.seed, run.step))
        gen = torch.Generator().manual_seed(run.seed * 1_000_003 + run.step)
        side = next(side for side, until in SIDES[stage] if share < until)
        shape = (side, side)
        if side > 56 and rng.random() < 0.2:
            shape = (side, side - 28) if rng.random() < 0.5 else (side - 28, side)
        images = rng.choice(run.corpus.train_images, batch, p=aligner.weights)
        pixels = data.augment_images(run.corpus, images, *shape, gen)
        with torch.autocast("cpu", torch.bfloat16):
            tokens = encode_images(run.model, pixels)
        loss, accuracy = aligner.compute_loss(run.model, tokens, images, run.extra.scale, rng)
        share = run.advance(loss)
        losses.append(loss.item())
        hits.append(accuracy)
        if run.step % LOG_EVERY_STEPS == 0:
            rate = len(losses) * batch / (time.monotonic() - told)
            run.log(loss=round(float(np.mean(losses)), 4), acc=round(float(np.mean(hits)), 4), side=side,
                    images_per_s=round(rate, 1), scale=round(float(run.extra.scale.exp()), 1))  # fmt: skip
            told, losses, hits = time.monotonic(), [], []
        if time.monotonic() - evaluated > EVALUATE_EVERY_S or share >= 1.0:
            run.log(
                **align.evaluate_alignment(
                    run.model, run.corpus, run.packer, max(side, 84) if side > 56 else 56
                )
            )
            evaluated = told = time.monotonic()
    run.save()


def train_listwise(run: Run) -> None:
    """Write the comparator, then teach the language model over fixed visual tokens."""
    run.start("listwise")
    if run.step == 0:
        listwise.scale_visual_tokens(run.model, run.corpus)
        means = listwise.sample_means(run.model, run.corpus, run.packer, run.seed)
        comparator.write_comparator(run.model, run.packer, means, run.seed)
    began = time.monotonic()
    images = listwise.choose_images(run.corpus, run.seed)
    views = listwise.Views(run.model, run.corpus, images, run.seed)
    run.log(views=len(images), views_s=round(time.monotonic() - began, 1))
    drawer = tasks.Tasks(run.corpus, images)

    def score(step: int) -> tuple[Tensor, Tensor, list[str]]:
        rng = random.Random(run.seed * 1_000_003 + step)
        names = rng.choices(list(listwise.MIX), list(listwise.MIX.values()), k=listwise.ROWS)
        rows = [drawer.make(name, rng, listwise.CANDIDATES, listwise.HARD) for name in names]
        packed = run.packer.pack(rows, views.measure)
        return score_rows(run.model, packed, views.gather(packed), run.packer.answers), packed.labels, names

    if run.step == 0:
        with torch.no_grad():
            margins, labels, _ = score(0)
        comparator.scale_answers(run.model, margins[labels == 0])
        run.log(**evaluate.score_briefly(run.model, run.corpus, run.packer))
    run.spend()
    share, hits, told, evaluated = run.elapsed_s / run.budget_s, Meter(), time.monotonic(), time.monotonic()
    while share < 1.0:
        margins, labels, names = score(run.step)
        loss, right = listwise.compute_list_loss(margins, labels)
        share = run.advance(loss)
        hits.add(loss.item(), float(np.mean(right)), dict(zip(names, right, strict=True)))
        if run.step % LOG_EVERY_STEPS == 0:
            rate = listwise.ROWS * listwise.CANDIDATES * LOG_EVERY_STEPS / (time.monotonic() - told)
            run.log(**hits.take(), pairs_per_s=round(rate, 1))
            told = time.monotonic()
        if time.monotonic() - evaluated > EVALUATE_EVERY_S or share >= 1.0:
            run.log(**evaluate.score_briefly(run.model, run.corpus, run.packer))
            evaluated = told = time.monotonic()
    run.save()


@dataclass(slots=True)
class Meter:
    """Means since the last report, of all rows and by task."""

    losses: list[float] = field(default_factory=list)
    hits: list[float] = field(default_factory=list)
    by_task: dict[str, list[float]] = field(default_factory=dict)

    def add(self, loss: float, accuracy: float, tasks: Mapping[str, float] = MappingProxyType({})) -> None:
        for task, hit in tasks.items():
            self.by_task.setdefault(task, []).append(hit)
        self.losses.append(loss)
        self.hits.append(accuracy)

    def take(self) -> dict[str, float]:
        means = {"loss": round(float(np.mean(self.losses)), 4), "acc": round(float(np.mean(self.hits)), 4)}
        means |= {task: round(float(np.mean(hits)), 3) for task, hits in sorted(self.by_task.items())}
        self.losses, self.hits, self.by_task = [], [], {}
        return means


def load_tokenizer(corpus: data.Corpus) -> Tokenizer:
    """The committed tokenizer, or a new one where there is none."""
    path = WEIGHTS / "tokenizer.json"
    if not path.exists():
        save_tokenizer(train_tokenizer(data.list_texts(corpus)), WEIGHTS)
    return Tokenizer.from_file(str(path))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m models.demo.train",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
    )
    parser.add_argument("--data", type=Path, default=HERE.parents[1].parent / "shared/data/train",
                        help="folder of image_text.jsonl.gz and the zips (default: ../shared/data/train)")  # fmt: skip
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="checkpoints and the log go here")
    parser.add_argument(
        "--budget-minutes", type=float, default=54.0, help="wall time of all stages (default: 54)"
    )
    parser.add_argument("--stages", default="vision,polish,listwise", help="which stages to run, in order")
    parser.add_argument("--batch", type=int, default=192, help="images of a vision step (default: 192)")
    parser.add_argument("--seed", type=int, default=1, help="seed of weights, views and rows (default: 1)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument(
        "--export", action="store_true", help="write the checkpoint to models/demo/weights and stop"
    )
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    corpus = data.load_corpus(chosen.data, chosen.run, with_pixels=not chosen.export)
    tokenizer = load_tokenizer(corpus)
    model = build_model(tokenizer, chosen.seed)
    run = Run(chosen.run, model, corpus, Packer(tokenizer), tokenizer, chosen.seed, 0.0)
    checkpoint = chosen.run / "checkpoint.safetensors"
    if checkpoint.exists():
        run.resume(checkpoint)
    print(f"{count_parameters(model):,} parameters; at stage {run.stage}, step {run.step}", flush=True)
    if chosen.export:
        save_export(model, WEIGHTS)
        return 0
    for stage in chosen.stages.split(","):
        run.budget_s = chosen.budget_minutes * 60 * SHARES[stage]
        if stage in SIDES:
            train_vision(run, stage, chosen.batch)
        elif stage == "listwise":
            train_listwise(run)
    return 0


if __name__ == "__main__":
    sys.exit(main())
