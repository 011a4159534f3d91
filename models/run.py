"""One job on its way through the engine: what is known of it, what can be done next, what it has come to.

    write   the prompt, from the images' sizes alone; distinct images and candidates are found here
    see     the distinct images that nobody has kept, a few at a time
    read    the prefix, unless a session has kept it, then the candidates in groups of like length

Nothing here is computed and nothing locked: the engine does both. `take_…` hands out work, once; the method named
after its stage brings the result.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from models import Done, Job, ModelFailed, Pixels, Scores, Work
from models.memory import FeatureCache, Hasher, Key, Pins, PrefixMemory, Store
from models.packing import Segment, Share, plan
from models.prompt import Sheet

SPLIT_TOKENS = 512
"""A job with fewer tokens stays one pack: another thread would gain less than a prefix of its own costs."""
SPLIT_IMAGES = 4
IMAGES_AT_ONCE = 32
"""At most so many images in one piece of work: a short request need not wait for a long one's to end."""
IMAGE_COST = 4
"""One visual token in the vision tower, in tokens of the language model: an estimate, to put jobs in order."""


@dataclass(frozen=True, slots=True)
class Script:
    """A job, written: its distinct candidates as segments, and the keys of all that might be kept.

    `places` [candidates] -> distinct candidate; `images` are distinct, by number, and `image_keys` name them.
    """

    sheet: Sheet
    places: tuple[int, ...]
    images: tuple[Pixels, ...]
    image_keys: tuple[Key, ...]

    def key(self, hasher: Hasher, segment: Segment, *behind: Key) -> Key:
        """The key of a segment, by its tokens and its images' contents."""
        return hasher.segment(
            segment, [self.image_keys[placed.grid.image] for placed in segment.images], *behind
        )


@dataclass(slots=True, eq=False)
class Run:
    """One job. `tasks` counts the threads that work for it now.

    `store` is its tenant's, `pins` are its session's, where it has one.
    """

    ticket: int
    job: Job
    done: Done
    store: Store
    deadline_s: float = math.inf
    pins: Pins | None = None
    arrived_s: float = field(default_factory=time.monotonic)
    tasks: int = 0
    ended: bool = False
    released: bool = False
    """Whether it has let go of `store` and `pins`."""
    stages_ms: dict[str, float] = field(
        default_factory=lambda: {"tokenize": 0.0, "vision": 0.0, "forward": 0.0}
    )
    features: dict[int, Tensor] = field(default_factory=dict)
    prefix: PrefixMemory | None = None
    left_tokens: int = 0
    """The work that no thread has begun, in tokens; a guess before the prompt is written."""
    _writing: bool = False
    _script: Script | None = None
    _unseen: list[int] = field(default_factory=list)
    _images_at_once: int = 1
    _images_wanted: int = 0
    _reused_images: int = 0
    _prefix_key: Key = b""
    _prefix_begun: bool = False
    _prefix_ready: bool = False
    _groups: list[tuple[int, ...]] = field(default_factory=list)
    _margin_keys: list[Key] = field(default_factory=list)
    _margins: dict[int, float] = field(default_factory=dict)
    _computed_tokens: int = 0
    _kept: Work = field(default_factory=Work)
    """What its session had kept."""

    def __post_init__(self) -> None:
        self.left_tokens = sum(len(item.text or "") // 4 for item in self.job.candidates)

    @property
    def finished(self) -> bool:
        """Whether every candidate has its margin."""
        return self._script is not None and len(self._margins) == len(self._script.sheet.candidates)

    def take_writing(self) -> bool:
        """Whether the prompt is still to be written."""
        taken, self._writing = self._writing, True
        return not taken

    def write(
        self, script: Script, hasher: Hasher, cache: FeatureCache, *, pack_tokens: int, threads: int
    ) -> None:
        """The prompt is written: look up what is kept, and divide what is left among `threads`."""
        self._script = script
        sheet = script.sheet
        if self.pins is not None:
            self._look_up_pins(script, self.pins, hasher)
        left = [index for index in range(len(sheet.candidates)) if index not in self._margins]
        lengths = [len(sheet.candidates[index]) for index in left]
        tokens = sum(lengths)
        self.left_tokens = tokens
        if not left:
            return
        together = [sheet.candidates[index] for index in left]
        if not self._prefix_ready:
            together.append(sheet.prefix)
            self.left_tokens += len(sheet.prefix)
        self._look_up_images(script, together, cache, threads)
        alone = self.left_tokens <= pack_tokens and (threads == 1 or tokens < SPLIT_TOKENS)
        for group in plan(lengths, pack_tokens, pieces=1 if alone else threads):
            self._groups.append(tuple(left[place] for place in group))
        if self.prefix is None and (len(self._groups) > 1 or self.pins is not None):
            self.prefix = PrefixMemory()

    def take_images(self) -> list[int]:
        """Numbers of the next images to be seen."""
        taken, self._unseen = self._unseen[: self._images_at_once], self._unseen[self._images_at_once :]
        return taken

    def images(self, numbers: Sequence[int]) -> list[Pixels]:
        """The images of these numbers."""
        assert self._script is not None
        return [self._script.images[number] for number in numbers]

    def see(self, seen: Mapping[int, Tensor], cache: FeatureCache) -> None:
        """Images were seen: their features [tokens, hidden], kept for the next who asks."""
        assert self._script is not None
        self.features |= seen
        for number, features in seen.items():
            self.left_tokens -= IMAGE_COST * len(features)
            key = self._script.image_keys[number]
            if self.pins is not None:
                self.pins.pin_features(key, features)
            else:
                cache.put(key, features)

    def take_share(self, room_tokens: int, *, first: bool = False) -> Share | None:
        """What the next pack may hold of this job: at most `room_tokens`, unless it is the `first` in its pack.

        The first share of several is the prefix alone: the others wait for it, and then run side by side.
        """
        script = self._script
        if script is None or not self._groups or len(self.features) < self._images_wanted:
            return None
        if self._prefix_begun and not self._prefix_ready:
            return None
        sheet, opening = script.sheet, not self._prefix_begun
        group = () if opening and len(self._groups) > 1 else self._groups[0]
        share = Share(sheet.prefix, sheet.candidates, group, opening)
        if share.tokens > room_tokens and not first:
            return None
        if group:
            self._groups.pop(0)
        self._prefix_begun = True
        self.left_tokens -= share.tokens
        return share

    def read(self, share: Share, margins: Sequence[float]) -> None:
        """A share was read: `margins` are its candidates'. Raises `ModelFailed` where one is not finite."""
        if not all(map(math.isfinite, margins)):
            raise ModelFailed("the model gave a score that is not a finite number")
        self._computed_tokens += share.tokens
        if share.holds_prefix:
            self._prefix_ready = True
            if self.pins is not None and self.prefix is not None:
                self.pins.pin_prefix(self._prefix_key, self.prefix)
        for index, margin in zip(share.candidates, margins, strict=True):
            self._margins[index] = margin
            if self.pins is not None:
                self.pins.pin_margin(self._margin_keys[index], margin)

    def scores(self) -> Scores:
        """What a finished job has come to."""
        assert self._script is not None
        sheet, places = self._script.sheet, self._script.places
        prefix_images = sum(placed.grid.tokens for placed in sheet.prefix.images)
        cut = frozenset(sheet.truncated)
        return Scores(
            margins=tuple(self._margins[place] for place in places),
            input_tokens=sum(len(sheet.prefix) + len(sheet.candidates[place]) for place in places),
            image_tokens=sum(
                prefix_images + sum(placed.grid.tokens for placed in sheet.candidates[place].images)
                for place in places
            ),
            computed_tokens=self._computed_tokens,
            truncated=tuple(index for index, place in enumerate(places) if place in cut),
            reused_images=self._reused_images,
            stages_ms=dict(self.stages_ms),
        )

    @property
    def reuse(self) -> Work:
        """What was at hand for it, and what was not, once it is written."""
        images = Work(images_kept=self._reused_images, images_seen=self._images_wanted - self._reused_images)
        return self._kept + images

    def _look_up_pins(self, script: Script, pins: Pins, hasher: Hasher) -> None:
        self._prefix_key = script.key(hasher, script.sheet.prefix)
        self.prefix = pins.prefixes.get(self._prefix_key)
        self._prefix_begun = self._prefix_ready = self.prefix is not None
        for index, segment in enumerate(script.sheet.candidates):
            self._margin_keys.append(script.key(hasher, segment, self._prefix_key))
            if (margin := pins.margins.get(self._margin_keys[index])) is not None:
                self._margins[index] = margin
        kept, found = len(self._margins), int(self.prefix is not None)
        self._kept = Work(
            prefixes_kept=found,
            prefixes_read=1 - found,
            candidates_kept=kept,
            candidates_read=len(script.sheet.candidates) - kept,
        )

    def _look_up_images(
        self, script: Script, segments: Sequence[Segment], cache: FeatureCache, threads: int
    ) -> None:
        """Find the features of the images in `segments`, or note that they must be seen."""
        grids = {placed.grid.image: placed.grid for segment in segments for placed in segment.images}
        for number, grid in sorted(grids.items()):
            key = script.image_keys[number]
            kept = self.pins.features.get(key) if self.pins is not None else None
            if kept is None and (kept := cache.get(key)) is not None and self.pins is not None:
                self.pins.pin_features(key, kept)
            if kept is None:
                self._unseen.append(number)
                self.left_tokens += IMAGE_COST * grid.tokens
            else:
                self.features[number] = kept
                self._reused_images += 1
        self._images_wanted = len(grids)
        pieces = threads if len(self._unseen) >= SPLIT_IMAGES else 1
        self._images_at_once = min(IMAGES_AT_ONCE, -(-len(self._unseen) // pieces) or 1)
