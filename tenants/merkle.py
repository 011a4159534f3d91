"""The one Merkle tree of the log: pure maths over SHA-256, as RFC 9162 section 2.1 (and RFC 6962) defines it.

Hashes of whole subtrees lie in tiles of 256, as C2SP tlog-tiles has them: tile `(level, n)` holds the hashes of the
subtrees of 256^level leaves number 256n to 256n+255, 32 bytes each. The last tile of a level may be partial: its bytes
are a beginning of the whole tile's. Proofs are built from tiles alone, so who serves tiles need not know the tree.

Verifiers raise `ProofInvalid` and never answer with a flag that could be overlooked. The edges, decided once: an index
must be below the size; every hash is 32 bytes; a proof has exactly the nodes that it needs; equal sizes have equal
roots and an empty proof; size 0 has the root SHA-256("") and is consistent, by an empty proof, with every tree.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

from tenants.errors import ProofInvalid

HASH_BYTES = 32
TILE_WIDTH = 256
TILE_HEIGHT = 8
"""Levels of the tree in one tile: 2^8 = 256."""
EMPTY_ROOT = hashlib.sha256(b"").digest()
LARGEST = 2**63 - 1

ReadTile = Callable[[int, int], bytes]
"""`(level, n)` → the tile's hashes one after the other; at least those that the tree of that size has there."""


def hash_leaf(data: bytes) -> bytes:
    """SHA-256(0x00 ‖ data)."""
    return hashlib.sha256(b"\0" + data).digest()


def hash_node(left: bytes, right: bytes) -> bytes:
    """SHA-256(0x01 ‖ left ‖ right)."""
    return hashlib.sha256(b"\1" + left + right).digest()


def tiles_of(size: int) -> Iterator[tuple[int, int, int]]:
    """`(level, n, width)` of the last tile of each level of a tree of `size` leaves, from the leaves up.

    These hold all that is needed for its root, and for adding to it. Where the last one is full, it is that one.
    """
    level, count = 0, size
    while count > 0:
        n = (count - 1) // TILE_WIDTH
        yield level, n, count - n * TILE_WIDTH
        level, count = level + 1, count // TILE_WIDTH


def tiles_for(size: int, indexes: Iterable[int]) -> set[tuple[int, int]]:
    """`(level, n)` of the tiles that proofs about these leaves in a tree of `size` leaves read, and its root."""
    needed = set()
    points = tuple(indexes)
    for level, last, _width in tiles_of(size):
        needed.add((level, last))
        needed.update((level, n) for point in points if (n := point >> (TILE_HEIGHT * (level + 1))) <= last)
    return needed


def grow(size: int, leaves: Sequence[bytes], read_tile: ReadTile) -> dict[tuple[int, int], bytes]:
    """The tiles that change when leaf hashes are added to a tree of `size` leaves: what they hold afterwards.

    `read_tile` is asked only for partial tiles of the tree as it was.
    """
    changed: dict[tuple[int, int], bytes] = {}
    level, first, added = 0, size, list(leaves)
    while added:
        start = first - first % TILE_WIDTH
        held = read_tile(level, start // TILE_WIDTH)[: (first - start) * HASH_BYTES] if first > start else b""
        if len(held) != (first - start) * HASH_BYTES:
            raise ProofInvalid("a tile is shorter than its tree")
        run = held + b"".join(added)
        parents = []
        step = TILE_WIDTH * HASH_BYTES
        for offset in range(0, len(run), step):
            tile = run[offset : offset + step]
            changed[level, (start + offset // HASH_BYTES) // TILE_WIDTH] = tile
            if len(tile) == step:
                parents.append(_fold(tile))
        level, first, added = level + 1, first // TILE_WIDTH, parents
    return changed


def root(size: int, read_tile: ReadTile) -> bytes:
    """The root of a tree of `size` leaves."""
    return _range_root(0, size, read_tile) if size else EMPTY_ROOT


def prove_inclusion(index: int, size: int, read_tile: ReadTile) -> list[bytes]:
    """PATH(index, D[size]), from the leaf's sibling to the root's child. Raises `ProofInvalid` beyond the tree."""
    if not 0 <= index < size <= LARGEST:
        raise ProofInvalid("the index is not below the size")
    proof = []
    low, high = 0, size
    while high - low > 1:
        middle = low + _split(high - low)
        if index < middle:
            proof.append(_range_root(middle, high, read_tile))
            high = middle
        else:
            proof.append(_range_root(low, middle, read_tile))
            low = middle
    return proof[::-1]


def prove_consistency(old: int, new: int, read_tile: ReadTile) -> list[bytes]:
    """PROOF(old, D[new]); empty where they are equal, or `old` is 0. Raises `ProofInvalid` where old > new."""
    if not 0 <= old <= new <= LARGEST:
        raise ProofInvalid("the old size is above the new one")
    if old in (0, new):
        return []
    proof = []
    low, high = 0, new
    while high != old:
        middle = low + _split(high - low)
        if old <= middle:
            proof.append(_range_root(middle, high, read_tile))
            high = middle
        else:
            proof.append(_range_root(low, middle, read_tile))
            low = middle
    if low:
        proof.append(_range_root(low, old, read_tile))
    return proof[::-1]


def verify_inclusion(
    leaf: bytes, index: int, size: int, proof: Sequence[bytes], expected_root: bytes
) -> None:
    """Raises `ProofInvalid` unless `leaf` (a leaf's hash) is number `index` of the tree (RFC 9162, 2.1.3.2)."""
    if not 0 <= index < size <= LARGEST:
        raise ProofInvalid("the index is not below the size")
    _check_hashes([leaf, expected_root, *proof])
    fn, sn, found = index, size - 1, leaf
    for each in proof:
        if sn == 0:
            raise ProofInvalid("the proof is too long")
        if fn & 1 or fn == sn:
            found = hash_node(each, found)
            while not fn & 1 and fn:
                fn, sn = fn >> 1, sn >> 1
        else:
            found = hash_node(found, each)
        fn, sn = fn >> 1, sn >> 1
    if sn:
        raise ProofInvalid("the proof is too short")
    if found != expected_root:
        raise ProofInvalid("the entry is not in that tree")


def verify_consistency(old: int, new: int, old_root: bytes, new_root: bytes, proof: Sequence[bytes]) -> None:
    """Raises `ProofInvalid` unless the old tree is the beginning of the new one (RFC 9162, 2.1.4.2)."""
    if not 0 <= old <= new <= LARGEST:
        raise ProofInvalid("the old size is above the new one")
    _check_hashes([old_root, new_root, *proof])
    for size, its_root in ((old, old_root), (new, new_root)):
        if size == 0 and its_root != EMPTY_ROOT:
            raise ProofInvalid("an empty tree has one root only")
    if old in (0, new):
        if proof:
            raise ProofInvalid("the proof is too long")
        if old == new and old_root != new_root:
            raise ProofInvalid("two trees of one size have different roots")
        return
    nodes = list(proof)
    if old & (old - 1) == 0:  # a whole subtree: the proof leaves it out
        nodes.insert(0, old_root)
    if not nodes:
        raise ProofInvalid("the proof is too short")
    fn, sn = old - 1, new - 1
    while fn & 1:
        fn, sn = fn >> 1, sn >> 1
    found_old = found_new = nodes[0]
    for each in nodes[1:]:
        if sn == 0:
            raise ProofInvalid("the proof is too long")
        if fn & 1 or fn == sn:
            found_old, found_new = hash_node(each, found_old), hash_node(each, found_new)
            while not fn & 1 and fn:
                fn, sn = fn >> 1, sn >> 1
        else:
            found_new = hash_node(found_new, each)
        fn, sn = fn >> 1, sn >> 1
    if sn:
        raise ProofInvalid("the proof is too short")
    if found_old != old_root:
        raise ProofInvalid("the proof does not lead to the old root")
    if found_new != new_root:
        raise ProofInvalid("the proof does not lead to the new root")


def _range_root(low: int, high: int, read_tile: ReadTile) -> bytes:
    """The hash of the leaves low … high-1, where low is a multiple of a power of two that is at least high-low."""
    count = high - low
    if count & (count - 1):
        middle = low + _split(count)
        return hash_node(_range_root(low, middle, read_tile), _range_root(middle, high, read_tile))
    height = count.bit_length() - 1
    level, inside = divmod(height, TILE_HEIGHT)
    first = low >> (TILE_HEIGHT * level)
    tile = read_tile(level, first // TILE_WIDTH)
    offset = first % TILE_WIDTH * HASH_BYTES
    hashes = tile[offset : offset + (HASH_BYTES << inside)]
    if len(hashes) != HASH_BYTES << inside:
        raise ProofInvalid("a tile is shorter than its tree")
    return _fold(hashes)


def _fold(hashes: bytes) -> bytes:
    """The root over a power of two of hashes that lie one after the other."""
    sha256 = hashlib.sha256
    while len(hashes) > HASH_BYTES:
        hashes = b"".join(
            [
                sha256(b"\1" + hashes[at : at + 2 * HASH_BYTES]).digest()
                for at in range(0, len(hashes), 2 * HASH_BYTES)
            ]
        )
    return hashes


def _split(count: int) -> int:
    """The largest power of two below `count`, which is at least 2."""
    return 1 << ((count - 1).bit_length() - 1)


def _check_hashes(hashes: Sequence[bytes]) -> None:
    if any(len(each) != HASH_BYTES for each in islice(hashes, 66)) or len(hashes) > 66:
        raise ProofInvalid("a hash is not 32 bytes, or there are too many")
