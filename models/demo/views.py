"""Pixels for the vision tower: clean ones, and random views of a training image.

A view is drawn in two steps: `draw_changes` throws the dice (on the CPU, from one generator, so a seed repeats a run on
any device), `render_views` is the arithmetic. A picture then passes through a real JPEG now and then.
"""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from models.demo.data import PHOTOS, Corpus

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
SCENES = 0.1  # share of a batch that may show two things side by side
JPEGS = 0.1  # share of a batch that is compressed, at qualities of 8 to 60


class Changes(NamedTuple):
    """What happens to each of n images; every tensor's first side is n, but for the scenes'."""

    theta: Tensor  # [n, 2, 3] from the output to the source, in -1..1
    partner: Tensor  # [scenes], whose picture stands beside image i
    beside: Tensor  # [scenes, 2, 3], where
    oval: Tensor  # [n, 3]: half axes of what is kept of the view, and the power of its outline
    mix: Tensor  # [n, 3, 3] of colours
    tone: Tensor  # [n, 3]: gain, lift, gamma
    invert: Tensor  # [n] bool
    ground: Tensor  # [n, 3, 3]: colour, and how much of it is added downwards and to the right
    behind: Tensor  # [n], the photo behind a cut-out, or -1
    soften: Tensor  # [n] bool
    outline: Tensor  # [n] bool
    noise: Tensor  # [n], its standard deviation
    grain: Tensor  # [4, 3, height, width], shared
    box: Tensor  # [n, 6]: top, left, size, and a colour; nothing is hidden where the size is 0


def resize_images(pixels: NDArray[np.uint8], height: int, width: int) -> Tensor:
    """[images, SIDE, SIDE, 4] -> normalised RGB on white, [images, 3, height, width], bicubic with antialiasing."""
    rgba = torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2).float() / 255
    rgb = rgba[:, :3] * rgba[:, 3:] + (1 - rgba[:, 3:])
    rgb = functional.interpolate(rgb, (height, width), mode="bicubic", antialias=True).clamp(0, 1)
    return normalise(rgb)


def normalise(rgb: Tensor) -> Tensor:
    """RGB in 0..1 -> what the vision tower reads, [images, 3, height, width]."""
    mean, std = (torch.tensor(v, device=rgb.device).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (rgb - mean) / std


def augment_images(
    corpus: Corpus,
    images: NDArray[np.int64],
    height: int,
    width: int,
    gen: torch.Generator,
    *,
    scenes: bool = True,
    device: str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Random views of `images`, normalised, [images, 3, height, width], and each one's partner in a scene or -1.

    Strong on purpose: another ground, place, size, turn and colour, because the model must know a thing in a drawing
    style that it never saw; a photo is sometimes cut out, a cut-out sometimes put on a photo or beside another.
    """
    cutout = torch.tensor([corpus.source_of[i] not in PHOTOS for i in images])
    symbolic = torch.tensor(
        [corpus.concepts[corpus.concept_of[i]].group in ("symbols", "flags") for i in images]
    )
    changes, partner = draw_changes(cutout, symbolic, height, width, gen, scenes=scenes)
    rgba = torch.from_numpy(corpus.pixels[images]).to(device)
    out = render_views(rgba, Changes(*(t.to(device) for t in changes)), height, width)
    for at in torch.nonzero(torch.rand(len(images), generator=gen) < JPEGS).flatten().tolist():
        quality = int(torch.randint(8, 60, (1,), generator=gen))
        out[at] = _compress(out[at], quality)
    return normalise(out), partner.to(device)


def draw_changes(
    cutout: Tensor, symbolic: Tensor, height: int, width: int, gen: torch.Generator, *, scenes: bool
) -> tuple[Changes, Tensor]:
    """Throw the dice for a batch; the second result is the row that stands beside each row's picture, or -1."""
    count = len(cutout)

    def draw(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=gen) * (high - low) + low

    def chance(probability: float) -> Tensor:
        return torch.rand(count, generator=gen) < probability

    zoom = torch.where(cutout, draw(0.85, 1.45), draw(0.6, 1.0))
    squeeze, angle = torch.exp(draw(-0.15, 0.15)), draw(-0.26, 0.26) * chance(0.5)
    flip = torch.where(chance(0.5) & ~(cutout & symbolic), -1.0, 1.0)
    slack = (zoom - 1).abs()
    across, down = draw(-1, 1) * slack, draw(-1, 1) * slack
    # two things side by side or one above the other, each at about half its size
    pairs = int(count * SCENES) * scenes
    beside_row = torch.arange(pairs) + pairs
    paired = cutout[:pairs] & cutout[beside_row]
    upright, order = chance(0.4)[:pairs], torch.where(chance(0.5)[:pairs], 1.0, -1.0)
    small = draw(1.7, 2.3)[:pairs]
    zoom[:pairs] = torch.where(paired, small, zoom[:pairs])
    shift = order * small * draw(0.4, 0.55)[:pairs]
    jitter = draw(-0.3, 0.3)[:pairs]
    across[:pairs] = torch.where(paired, torch.where(upright, jitter, shift), across[:pairs])
    down[:pairs] = torch.where(paired, torch.where(upright, shift, jitter), down[:pairs])
    cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    theta = torch.stack(
        [torch.stack([cos * squeeze * flip, -sin, across], -1), torch.stack([sin * flip, cos / squeeze, down], -1)], 1
    )  # fmt: skip
    far = torch.where(paired, 0.0, 9.0)  # nothing is seen of it where there is no scene
    none = torch.zeros(pairs)
    beside = torch.stack(
        [torch.stack([small, none, far + torch.where(upright, -jitter, -shift)], -1),
         torch.stack([none, small, far + torch.where(upright, -shift, -jitter)], -1)], 1
    )  # fmt: skip
    if height != width:  # a cut-out keeps its shape on a wide or tall canvas
        keep = torch.tensor([width, height]) / min(height, width)
        theta[:, :, :2] *= torch.where(cutout[:, None], keep, torch.ones(2))[:, None, :]
        beside[:, :, :2] *= keep
    cut = chance(0.3) & ~cutout
    oval = torch.stack([draw(0.7, 1.0), draw(0.7, 1.0), draw(2.0, 5.0)], -1)
    oval = torch.where(cut[:, None], oval, torch.tensor([9.0, 9.0, 2.0]))
    mix = torch.eye(3) + draw(-0.15, 0.15, 3, 3) * chance(0.7)[:, None, None]
    mix = torch.where(chance(0.12)[:, None, None], torch.full((3, 3), 1 / 3), mix)
    tone = torch.stack([draw(0.7, 1.3), draw(-0.12, 0.12), torch.exp(draw(-0.35, 0.35))], -1)
    colour = draw(0.9, 1.0, 1).expand(-1, 3)
    colour = torch.where(chance(0.5)[:, None], draw(0.0, 1.0, 3), colour)
    ground = torch.stack([colour, torch.zeros(count, 3), torch.zeros(count, 3)], 1)
    ramp = torch.stack([torch.zeros(count, 3), draw(0, 0.5, 3), draw(0, 0.5, 3)], 1)
    ground = torch.where(chance(0.15)[:, None, None], ramp, ground)
    behind = torch.full((count,), -1)
    pictures = torch.nonzero(~cutout).flatten()
    if len(pictures):
        other = pictures[torch.randint(len(pictures), (count,), generator=gen)]
        behind = torch.where(chance(0.12) & cutout, other, behind)
    box = torch.cat([draw(0, 1, 2), draw(0.15, 0.4, 1) * chance(0.2)[:, None], draw(0, 1, 3)], 1)
    changes = Changes(
        theta, beside_row, beside, oval, mix, tone, chance(0.03), ground, behind, chance(0.12), chance(0.03),
        draw(0, 0.04) * chance(0.3), torch.randn(4, 3, height, width, generator=gen), box,
    )  # fmt: skip
    partner = torch.full((count,), -1)
    partner[:pairs] = torch.where(paired, beside_row, -1)
    return changes, partner


def render_views(rgba: Tensor, changes: Changes, height: int, width: int) -> Tensor:
    """uint8 [n, SIDE, SIDE, 4] -> RGB in 0..1, [n, 3, height, width]."""
    count, scenes = len(rgba), len(changes.partner)
    source = rgba.permute(0, 3, 1, 2).float() / 255
    source = torch.cat([source[:, :3] * source[:, 3:], source[:, 3:]], 1)  # colours times their own alpha
    view = _sample(source, changes.theta, height, width)
    down = torch.linspace(-1, 1, height, device=rgba.device).view(1, 1, -1, 1)
    across = torch.linspace(-1, 1, width, device=rgba.device).view(1, 1, 1, -1)
    half_high, half_wide, power = (changes.oval[:, i].view(-1, 1, 1, 1) for i in range(3))
    edge = (down / half_high).abs() ** power + (across / half_wide).abs() ** power
    view = view * ((1.15 - edge) / 0.15).clamp(0, 1)
    if scenes:
        partner = _sample(source[changes.partner], changes.beside, height, width)
        both = view[:scenes] + partner * (1 - view[:scenes, 3:])
        view = torch.cat([both, view[scenes:]])
    alpha = view[:, 3:]
    straight = view[:, :3] / alpha.clamp_min(1e-3)
    straight = torch.einsum("nij,njhw->nihw", changes.mix, straight)
    gain, lift, gamma = (changes.tone[:, i].view(-1, 1, 1, 1) for i in range(3))
    straight = ((straight - 0.5) * gain + 0.5 + lift).clamp(1e-3, 1) ** gamma
    straight = torch.where(changes.invert.view(-1, 1, 1, 1), 1 - straight, straight)
    flat, low, right = (changes.ground[:, i, :, None, None] for i in range(3))
    ground = flat + low * (down + 1) / 2 + right * (across + 1) / 2
    photo = view[changes.behind.clamp_min(0), :3]
    ground = torch.where((changes.behind >= 0).view(-1, 1, 1, 1), photo, ground)
    out = straight * alpha + ground * (1 - alpha)
    soft = functional.avg_pool2d(functional.pad(out, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    drawn = (1 - 6 * (out - soft).abs().mean(1, keepdim=True)).clamp(0, 1)
    out = torch.where(changes.soften.view(-1, 1, 1, 1), soft, out)
    out = torch.where(changes.outline.view(-1, 1, 1, 1), drawn, out)
    grain = changes.grain[torch.arange(count, device=rgba.device) % len(changes.grain)]
    out = out + grain * changes.noise.view(-1, 1, 1, 1)
    # a hidden rectangle now and then, so that no single part decides
    top, left, size = (changes.box[:, i].view(-1, 1, 1, 1) for i in range(3))
    y, x = (down + 1) / 2, (across + 1) / 2
    inside = (y >= top) & (y < top + size) & (x >= left) & (x < left + size)
    return torch.where(inside, changes.box[:, 3:, None, None], out).clamp(0, 1)


def _sample(source: Tensor, theta: Tensor, height: int, width: int) -> Tensor:
    grid = functional.affine_grid(theta, [len(theta), 4, height, width], align_corners=False)
    return functional.grid_sample(source, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _compress(rgb: Tensor, quality: int) -> Tensor:
    """RGB in 0..1, [3, height, width], through a JPEG file and back."""
    pixels = (rgb * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=quality)
    with Image.open(stream) as opened:
        read = torch.from_numpy(np.array(opened))
    return read.permute(2, 0, 1).to(rgb.device, rgb.dtype) / 255
