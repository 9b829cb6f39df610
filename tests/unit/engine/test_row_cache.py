"""Rows that are kept of media: within a bound, those that were seen last, and nothing beside them."""

import torch

from keye.worker.engine.row_cache import RowCache

ROW = torch.ones(2, 4)  # 32 bytes


def test_the_least_recently_seen_goes_first_and_the_bound_is_kept() -> None:
    cache = RowCache(max_bytes=3 * ROW.nbytes)
    for key in (b"a", b"b", b"c"):
        cache.keep(key, ROW.clone())
    cache.find(b"a")
    cache.keep(b"d", ROW.clone())
    assert [cache.find(key) is not None for key in (b"a", b"b", b"c", b"d")] == [True, False, True, True]
    cache.keep(b"e", torch.ones(5, 4))
    assert [cache.find(key) is not None for key in (b"a", b"c", b"d", b"e")] == [False, False, False, True]


def test_what_is_larger_than_all_there_may_be_costs_the_others_nothing() -> None:
    cache = RowCache(max_bytes=3 * ROW.nbytes)
    cache.keep(b"a", ROW)
    large = torch.ones(7, 4)
    assert cache.keep(b"b", large) is large
    assert cache.find(b"b") is None
    assert cache.find(b"a") is ROW


def test_rows_keep_nothing_alive_that_was_encoded_beside_them() -> None:
    cache = RowCache(max_bytes=10**6)
    first, _ = torch.ones(100, 4).split([2, 98])
    kept = cache.keep(b"a", first)
    assert kept.untyped_storage().nbytes() == ROW.nbytes
    assert cache.find(b"a") is kept


def test_what_is_forgotten_or_kept_again_counts_no_more() -> None:
    cache = RowCache(max_bytes=2 * ROW.nbytes)
    for _ in range(9):
        cache.keep(b"a", ROW)
    cache.keep(b"b", ROW)
    cache.forget(b"b")
    cache.keep(b"c", ROW)
    assert cache.find(b"a") is not None
    assert cache.clear()
    assert not cache.clear()
    cache.keep(b"d", ROW)
    cache.keep(b"e", ROW)
    assert cache.find(b"d") is not None
