"""Train the demo model: `python -m models.demo.train --data ../shared/data/train`.

Stages, each of a fixed number of views or rows, so that a seed repeats a run whatever the machine does besides:
    vision     images and words into one space (align.py); 56, 84, then 112 px
    listwise   the language model is written down as a comparator of the two (comparator.py), and learns from there on
               packed rows over fixed visual tokens (listwise.py)
    calibrate  a factor and an offset make scores of held-out rows probabilities (calibration.py)

A run that is started again goes on from its last checkpoint; a `--views` other than before only moves the schedule.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from models.demo import align, calibration, comparator, data, evaluate, listwise, tasks
from models.demo.model import (
    MAX_PIXELS,
    UNIT,
    Model,
    Packer,
    Row,
    autocast,
    build_model,
    count_parameters,
    encode_images,
    save_export,
    score_rows,
)
from models.demo.muon import Muon
from models.demo.tokenizer import save_tokenizer, train_tokenizer
from models.demo.views import augment_images
from models.demo.workers import Workers

HERE = Path(__file__).parent
WEIGHTS = HERE / "weights"
SIDES = ((56, 0.12), (84, 0.62), (112, 1.0))  # pixels of a view's side, until which share of the stage
SHAPES = tuple(
    (high, wide)
    for high in range(UNIT, MAX_PIXELS // UNIT + 1, UNIT)
    for wide in range(UNIT, MAX_PIXELS // UNIT + 1, UNIT)
    if 0.5 < high * wide / MAX_PIXELS <= 1.0 and max(high, wide) <= 4 * min(high, wide)
)
"""What the service makes of large pictures of any shape: views of the whole limit, but for what rounding takes."""
ODD = 0.3  # share of the last steps that have one of these shapes
RATES = {"vision": (2e-3, 1e-3, 2e-3), "listwise": (1.5e-4, 1.5e-4, 1e-4)}  # of Muon, of AdamW, of the table
SAVE_EVERY_S, EVALUATE_EVERY_S, LOG_EVERY_STEPS = 120.0, 420.0, 20
PAUSE_S = 20.0  # a step that took longer was stopped in between, and counts as this long


@dataclass(slots=True)
class Run:
    """Where a run stands; `save` and `resume` carry it over a restart."""

    folder: Path
    model: Model
    corpus: data.Corpus
    packer: Packer
    tokenizer: Tokenizer
    seed: int
    workers: Workers
    device: str = "cpu"
    rate: float = 1.0  # factor on the learning rates of the vision stage
    steps: int = 0  # of the present stage
    limit_s: float = float("inf")  # of the present stage
    extra: align.Temperature = field(default_factory=align.Temperature)
    stage: str = "vision"
    step: int = 0
    elapsed_s: float = 0.0
    optimizers: list[torch.optim.Optimizer] = field(default_factory=list)
    _saved_at: float = 0.0
    _tick: float = 0.0

    def start(self, stage: str, steps: int) -> None:
        """Begin a stage of `steps`, or continue it where its checkpoint left it."""
        if self.stage != stage:
            self.stage, self.step, self.elapsed_s = stage, 0, 0.0
        self.steps = steps
        for name, parameter in self.model.named_parameters():
            sees = "visual" in name or "embed_tokens" in name
            parameter.requires_grad_(sees if stage == "vision" else name.startswith(comparator.LEARNING))
        self._tick = self._saved_at = time.monotonic()
        if stage == "calibrate":
            return
        self.optimizers = build_optimizers(self)
        path = self.folder / "optimizer.pt"
        if self.step and path.exists():
            for optimizer, state in zip(self.optimizers, torch.load(path, weights_only=True), strict=True):
                optimizer.load_state_dict(state)

    @property
    def share(self) -> float:
        """How much of the stage is over: of its steps, or of its time where that is nearer to its end."""
        return max(self.step / self.steps, self.elapsed_s / self.limit_s)

    def list_parameters(self) -> list[nn.Parameter]:
        """Everything that may learn."""
        return [*self.model.parameters(), *self.extra.parameters()]

    def advance(self) -> None:
        """One step along the gradients: 50 of warm-up, the full rate until half of the stage, then straight down."""
        rate = min(1.0, (self.step + 1) / 50) * min(1.0, max(0.02, (1.0 - self.share) / 0.5))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base"] * rate
        nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.grad is not None], 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        self.spend()
        if self._tick - self._saved_at > SAVE_EVERY_S:
            self.save()
            self._saved_at = self._tick

    def spend(self) -> None:
        """Count the time since the last step as the stage's, but for time in which the process was stopped."""
        now = time.monotonic()
        self.elapsed_s += min(now - self._tick, PAUSE_S)
        self._tick = now

    def log(self, **values: Any) -> None:
        """One line of JSON in the log, one line with an ETA on the terminal."""
        line = {"stage": self.stage, "step": self.step, "elapsed_s": round(self.elapsed_s, 1), **values}
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        left = (1.0 / self.share - 1.0) * self.elapsed_s / 60 if self.share else float("inf")
        print(f"{json.dumps(line)}  ETA {left:.1f} min", flush=True)

    def save(self) -> None:
        """Write everything to new files first, then rename: a killed run loses no older state."""
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"model.{k}": v.detach().clone() for k, v in self.model.named_parameters()}
        tensors |= {f"extra.{k}": v.detach().clone() for k, v in self.extra.named_parameters()}
        state = {"stage": self.stage, "step": str(self.step), "elapsed_s": str(self.elapsed_s)}
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
    vision = run.stage == "vision"
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
    rates = RATES[run.stage]
    if vision:
        rates = (rates[0] * run.rate, rates[1] * run.rate, rates[2] * run.rate)
    muon = Muon(matrices, lr=rates[0], weight_decay=0.05)
    groups = [{"params": others, "lr": rates[1]}, {"params": table, "lr": rates[2]}]
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0 if vision else 0.01)
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["base"] = group["lr"]
    return [muon, adam]


def train_vision(run: Run, views: int, batch: int, least_side: int, *, compiled: bool) -> None:
    """Align images with words; the side grows with the stage."""
    run.start("vision", views // batch)
    aligner = align.Aligner(run.corpus, run.packer, run.tokenizer.get_vocab_size(), run.seed, run.device)
    encode = torch.compile(encode_images, dynamic=False) if compiled else encode_images
    part_size = batch // run.workers.count

    def look(part: int, shape: tuple[int, int]) -> tuple[Tensor, tuple[float, float]]:
        rng = np.random.default_rng((run.seed, run.step, part))
        gen = torch.Generator().manual_seed(int(rng.integers(2**62)))
        images = rng.choice(run.corpus.train_images, part_size, p=aligner.weights)
        pixels, partner = augment_images(run.corpus, images, *shape, gen, device=run.device)
        see = encode if shape[0] == shape[1] else encode_images  # a shape costs the compiler half a minute
        with autocast(run.device):
            tokens = see(run.model, pixels)
        loss, accuracy = aligner.compute_loss(run.model, tokens, images, partner, run.extra.scale, rng)
        return loss, (loss.item(), accuracy)

    told, evaluated, losses, hits = time.monotonic(), time.monotonic(), [], []
    while run.share < 1.0:
        side = max(least_side, next(side for side, until in SIDES if run.share < until))
        shape, roll = ((side, side), random.Random(run.seed * 1_000_003 + run.step).random())
        if side == 112 and roll < ODD:
            shape = SHAPES[int(roll / ODD * len(SHAPES))]
        parts = [functools.partial(look, part, shape) for part in range(run.workers.count)]
        results = run.workers.backward(run.list_parameters(), parts)
        run.advance()
        losses.append(float(np.mean([loss for loss, _ in results])))
        hits.append(float(np.mean([accuracy for _, accuracy in results])))
        if run.step % LOG_EVERY_STEPS == 0:
            rate = len(losses) * batch / (time.monotonic() - told)
            run.log(loss=round(float(np.mean(losses)), 4), acc=round(float(np.mean(hits)), 4), side=side,
                    images_per_s=round(rate, 1), scale=round(run.extra.scale.exp().item(), 1))  # fmt: skip
            told, losses, hits = time.monotonic(), [], []
        if time.monotonic() - evaluated > EVALUATE_EVERY_S or run.share >= 1.0:
            with run.workers.together():
                run.log(**align.evaluate_alignment(run.model, run.corpus, run.packer, side))
            evaluated = told = time.monotonic()
    run.save()


def train_listwise(run: Run, rows: int) -> None:
    """Write the comparator, then teach the language model over fixed visual tokens."""
    run.start("listwise", rows // listwise.ROWS)
    if run.step == 0:
        listwise.scale_visual_tokens(run.model, run.corpus)
        means = listwise.sample_means(run.model, run.corpus, run.packer, run.seed)
        comparator.write_comparator(run.model, run.packer, means, run.seed)
    began = time.monotonic()
    images = listwise.choose_images(run.corpus, run.seed)
    families = listwise.draw_families(run.corpus, run.seed)
    with run.workers.together():
        scenes = [scene for family in families for scene in family]
        views = listwise.Views(run.model, run.corpus, images, scenes, run.seed)
    run.log(views=len(images), views_s=round(time.monotonic() - began, 1))
    drawer = tasks.Tasks(run.corpus, images, families)

    def draw(step: int) -> list[Row]:
        rng = random.Random(run.seed * 1_000_003 + step)
        names = rng.choices(list(listwise.MIX), list(listwise.MIX.values()), k=listwise.ROWS)
        return [drawer.make(name, rng, listwise.CANDIDATES, listwise.HARD) for name in names]

    def rank(row: Row) -> tuple[Tensor, tuple[Tensor, float, float]]:
        packed = run.packer.pack([row], views.measure).to(run.device)
        with autocast(run.device):
            margins = score_rows(run.model, packed, views.gather(packed), run.packer.answers)
        loss, right = listwise.compute_list_loss(margins, packed.labels)
        return loss, (margins.detach()[packed.labels == 0], loss.item(), right[0])

    if run.step == 0:
        with torch.no_grad():
            comparator.scale_answers(run.model, torch.cat([rank(row)[1][0] for row in draw(0)]))
        with run.workers.together():
            run.log(**evaluate.score_briefly(run.model, run.corpus, run.packer))
    run.spend()
    hits, told, evaluated = listwise.Meter(), time.monotonic(), time.monotonic()
    while run.share < 1.0:
        drawn = draw(run.step)
        results = run.workers.backward(run.list_parameters(), [functools.partial(rank, row) for row in drawn])
        run.advance()
        for row, (_, loss, right) in zip(drawn, results, strict=True):
            hits.add(row.task, loss, right)
        if run.step % LOG_EVERY_STEPS == 0:
            rate = listwise.ROWS * listwise.CANDIDATES * LOG_EVERY_STEPS / (time.monotonic() - told)
            run.log(**hits.take(), pairs_per_s=round(rate, 1))
            told = time.monotonic()
        if time.monotonic() - evaluated > EVALUATE_EVERY_S or run.share >= 1.0:
            with run.workers.together():
                run.log(**evaluate.score_briefly(run.model, run.corpus, run.packer))
            evaluated = told = time.monotonic()
    run.save()


def calibrate(run: Run) -> None:
    """Fold the factor and the offset into the weights under which scores of held-out rows are probabilities."""
    run.start("calibrate", 1)
    if run.step:
        return
    rows = calibration.draw_checked(run.corpus, 0, fitted=True)
    with run.workers.together():
        states = evaluate.collect_states(run.model, run.corpus, run.packer, rows)
    answer = evaluate.find_answer(run.model, run.packer)
    factor, offset = calibration.fit([(one @ answer).tolist() for one in states])
    spread = calibration.fold(run.model, torch.cat(states), factor, offset, run.packer.answers)
    run.step = 1
    run.log(factor=round(factor, 3), offset=round(offset, 3), offset_spread=round(spread, 3))
    run.save()


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
        "--views", type=int, default=900_000, help="images of the vision stage (default: 900,000)"
    )
    parser.add_argument(
        "--rows", type=int, default=16_000, help="rows of the listwise stage (default: 16,000)"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=float("inf"),
        help="end a stage after so long, its schedule shortened (a seed then does not repeat it)",
    )
    parser.add_argument(
        "--start",
        type=Path,
        help="weights to start from: the checkpoint.safetensors of another run, or a folder of exported ones",
    )
    parser.add_argument("--rate", type=float, default=1.0,
                        help="factor on the vision stage's learning rates; 0.5 from trained weights (default: 1)")  # fmt: skip
    parser.add_argument("--scale", type=float, default=13.5,
                        help="inverse temperature that vision begins with; 20 from trained weights (default: 13.5)")  # fmt: skip
    parser.add_argument(
        "--least-side", type=int, default=56, help="no smaller views than this, in px (default: 56)"
    )
    parser.add_argument("--stages", default="vision,listwise,calibrate", help="which stages to run, in order")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument(
        "--compile", action="store_true", help="compile the vision stage: twice as fast, needs a C++ compiler"
    )
    parser.add_argument("--batch", type=int, default=192, help="images of a vision step (default: 192)")
    parser.add_argument("--seed", type=int, default=1, help="seed of weights, views and rows (default: 1)")
    parser.add_argument("--workers", type=int, default=2, help="cores to use; 1 on a GPU (default: 2)")
    parser.add_argument(
        "--export", action="store_true", help="write the checkpoint to models/demo/weights and stop"
    )
    chosen = parser.parse_args(arguments)
    workers = Workers(chosen.workers)
    corpus = data.load_corpus(chosen.data, chosen.run, with_pixels=not chosen.export)
    tokenizer = load_tokenizer(corpus)
    model = build_model(tokenizer, chosen.seed).to(chosen.device)
    at, device = chosen.run, chosen.device
    run = Run(at, model, corpus, Packer(tokenizer), tokenizer, chosen.seed, workers, device, chosen.rate)
    run.limit_s = chosen.minutes * 60
    run.extra.to(chosen.device)
    checkpoint = chosen.run / "checkpoint.safetensors"
    if checkpoint.exists():
        run.resume(checkpoint)
    elif chosen.start and chosen.start.is_dir():
        model.load_state_dict(Model.from_pretrained(chosen.start, dtype=torch.float32).state_dict())
    elif chosen.start:
        run.resume(chosen.start)
        run.stage, run.step, run.elapsed_s = "vision", 0, 0.0
    if run.stage == "vision" and run.step == 0:
        run.extra.scale.data.fill_(math.log(chosen.scale))
    print(f"{count_parameters(model):,} parameters; at stage {run.stage}, step {run.step}", flush=True)
    if chosen.export:
        save_export(model, WEIGHTS)
        return 0
    stages = chosen.stages.split(",")
    for stage in stages[stages.index(run.stage) if run.stage in stages else 0 :]:
        if stage == "vision":
            train_vision(run, chosen.views, chosen.batch, chosen.least_side, compiled=chosen.compile)
        elif stage == "listwise":
            train_listwise(run, chosen.rows)
        elif stage == "calibrate":
            calibrate(run)
        else:
            parser.error(f"no such stage: {stage}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
