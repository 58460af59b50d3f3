"""Tiles of GPU products: defaults that fit their problems, and a search whose result is stored and launched."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import spartan
from spartan import tuning
from spartan_kernels import break_even, tiles
from spartan_kernels.break_even import device_kind
from spartan_kernels.tiles import (
    MANY_TOKENS,
    Tile,
    TunedTile,
    candidates,
    default_tile,
    load_tiles,
    store_tiles,
    tile_for,
    using,
)

CPU = torch.device("cpu")
KINDS = ("float32", "tf32", "bfloat16", "float16", "float8")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("SPARTAN_TUNE_CACHE", str(tmp_path / "cache.json"))
    tiles._tuned.cache_clear()
    yield tmp_path / "cache-tiles.json"
    tiles._tuned.cache_clear()


@pytest.mark.parametrize(("architecture", "kind"), list(itertools.product((0, 80, 90, 100), KINDS)))
def test_tiles_are_powers_of_two_and_no_wider_than_the_problem(architecture: int, kind: str) -> None:
    for tokens, span, other in itertools.product((1, 9, 300, 8192), (1, 8, 24, 128, 256), (8, 64)):
        found = candidates(architecture, tokens, span, other, kind)
        assert found[0] == default_tile(architecture, tokens, span, kind) and len(found) == len(set(found)) <= 40
        for tile in found:
            sides = tile.BLOCK_M, tile.BLOCK_N, tile.BLOCK_K
            assert all(side >= 16 and side & (side - 1) == 0 for side in sides), tile
            shared = 128 if span == 8 and tokens >= MANY_TOKENS else 16  # by lines of small blocks
            assert tile.BLOCK_M <= max(16, 2 * tokens) and tile.BLOCK_N <= max(shared, 2 * span)
            assert not tile.TMA or (architecture >= 90 and other % tile.BLOCK_K == 0)


def test_a_stored_tile_is_taken_for_its_class_alone(own_cache: Path) -> None:
    tile = Tile(64, 32, 32, 4, 2)
    assert tile_for(CPU, 500, 32, 64, "bfloat16") == default_tile(0, 500, 32, "bfloat16")
    store_tiles("another device", (TunedTile("bfloat16", 32, 64, False, Tile(16, 16, 16, 1)),))
    store_tiles(device_kind(CPU), (TunedTile("bfloat16", 32, 64, False, tile),))
    assert tile_for(CPU, 500, 32, 64, "bfloat16") == tile
    for tokens, span, other, kind in ((8, 32, 64, "bfloat16"), (500, 64, 32, "bfloat16"), (500, 32, 64, "tf32")):
        assert tile_for(CPU, tokens, span, other, kind) == default_tile(0, tokens, span, kind)
    assert tile_for(CPU, 17, 32, 64, "bfloat16") == default_tile(0, 17, 32, "bfloat16")  # found with more tokens
    with using(Tile(128, 128, 16, 8)):
        assert tile_for(CPU, 500, 32, 64, "bfloat16").num_warps == 8
    assert tile_for(CPU, 500, 32, 64, "bfloat16") == tile
    assert set(json.loads(own_cache.read_text())) == {"another device", device_kind(CPU)}


@pytest.mark.parametrize("text", ["[1]", '{"cpu": [{"kind": "tf32"}]}', "not json"])
def test_a_file_that_is_no_cache_is_named_and_not_used(own_cache: Path, text: str) -> None:
    own_cache.write_text(text)
    break_even._warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"cache-tiles\.json"):
        assert load_tiles() == {}


def test_tune_searches_tiles_with_a_timer(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that Triton serves; the timer runs no kernel, and likes one tile of few tokens, another of many."""
    wanted = {True: Tile(16, 32, 64, 4, 2), False: Tile(128, 32, 64, 8, 4)}
    asked: list[Tile] = []

    def timer(call: Callable[[], object], device: torch.device) -> float:
        if not tiles._forced:
            return 1.0
        asked.append(tiles._forced[-1])
        if asked[-1].BLOCK_K == 128:
            raise RuntimeError("out of shared memory")
        return 0.1 if asked[-1] in wanted.values() else 0.5

    monkeypatch.setattr(tuning, "AUTO_ORDER", {"cpu": ("triton",)})
    monkeypatch.setattr(tuning, "_serves", lambda name, kind, dtype: name == "triton")
    monkeypatch.setattr(tuning, "masked_linear", lambda x, weight, *rest, **options: x @ weight.mT)
    monkeypatch.setattr(tuning, "block_sparse_linear", lambda x, packed, **options: x @ packed.to_dense().mT)
    spartan.tune("cpu", (torch.bfloat16,), ((32, 32),), tiles=True, timer=timer)
    stored = load_tiles()[device_kind(CPU)]
    assert [(t.kind, t.span, t.other, t.few) for t in stored] == [
        ("bfloat16", 32, 32, few) for few in (True, True, False, False)
    ]
    assert [t.tile for t in stored] == [wanted[few] for few in (True, True, False, False)]
    assert set(asked) == {t for tokens in (8, 2048) for t in candidates(0, tokens, 32, 32, "bfloat16")}
    assert tile_for(CPU, 4096, 32, 32, "bfloat16") == wanted[False]
