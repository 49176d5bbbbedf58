"""Data: every choice is a pure function of (seed, epoch, index), and damage never goes unnoticed."""
import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

import objectives
from core.configurator import RunError, UserError
from core.rng import permute
from corpus.shards import ShardWriter, read_header
from pretraining import data


def settings(**changes):
    return data.DataSettings(**(dict(block_size=64, batch_rows=16, seed=7) | changes))


@pytest.fixture(scope="module")
def corpus(corpus_dir):
    return data.Corpus(corpus_dir)


def test_permutation_is_a_bijection_and_differs_by_epoch_and_seed():
    for n in [*range(1, 70), 255, 256, 257, 1000, 4097]:
        orders = {tuple(permute(np.arange(n), n, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}
        assert all(sorted(order) == list(range(n)) for order in orders)
        assert n < 6 or len(orders) == 4
    order = permute(np.arange(4096), 4096, 3, 0)       # and it looks shuffled: no run, no drift
    assert abs(np.corrcoef(order, np.arange(4096))[0, 1]) < 0.06 and np.mean(np.abs(np.diff(order)) < 10) < 0.02


@pytest.mark.parametrize("world", [1, 2, 8])
def test_each_row_comes_exactly_once_an_epoch_for_any_world_size(corpus, world):
    c = settings(block_size=2048, batch_rows=16)
    n = corpus.n_tokens // c.block_size
    seen = []
    for step in range(-(-2 * n // c.batch_rows)):
        row, epoch = data.rows_of_step(corpus, step, c)
        for rank in range(world):          # the slices micro_batches() takes
            part = slice(rank * len(row) // world, (rank + 1) * len(row) // world)
            seen += zip(epoch[part], row[part])
    for e in (0, 1):
        assert sorted(w for epoch, w in seen if epoch == e) == list(range(n))
    orders = [[w for epoch, w in seen if epoch == e] for e in (0, 1)]
    assert orders[0] != orders[1]


@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_world_size_and_micro_batch_only_slice_what_a_step_sees(corpus, objective):
    def step(world, micro):
        batches = [b for rank in range(world) for b in data.micro_batches(corpus, 5, objective, settings(), rank, world, micro)]
        tokens = np.concatenate([b.tokens for b in batches])
        targets = [np.full(len(b.tokens), -100) for b in batches]
        for t, b in zip(targets, batches):
            t[b.positions[b.targets >= 0]] = b.targets[b.targets >= 0]
        return tokens, np.concatenate(targets), np.concatenate([b.lengths for b in batches]), sum(b.num_targets for b in batches)
    one = step(1, 16)
    for world, micro in ((1, 4), (2, 8), (8, 1), (4, 2)):
        assert all(np.array_equal(a, b) for a, b in zip(one, step(world, micro)))


def test_masks_depend_on_seed_epoch_and_position_alone(corpus):
    def masked(rows, epoch, **changes):
        c = settings(**changes)
        b = data.make_batch(corpus, np.array(rows), np.full(len(rows), epoch), "mlm", c)
        where = b.positions[b.targets >= 0].numpy()
        return {(rows[i // c.block_size] * c.block_size + i % c.block_size) for i in where}
    assert masked([3, 9, 4], 0) == masked([9], 0) | masked([4], 0) | masked([3], 0)
    assert masked([3, 9], 0) == masked([3, 9], 0, random_length=False) == masked([3, 9], 0, document_mask=True)
    wide = settings(block_size=128)
    b = data.make_batch(corpus, np.array([2]), np.zeros(1, int), "mlm", wide)      # row 2 of 128 tokens is rows 4 and 5 of 64
    assert {256 + int(i) for i in b.positions[b.targets >= 0]} == masked([4, 5], 0)
    assert masked([3, 9], 0) != masked([3, 9], 1) and masked([3, 9], 0) != masked([3, 9], 0, seed=8)
    assert masked([3, 9], 0, mask_rate=0.2) < masked([3, 9], 0, mask_rate=0.5)     # a lower rate hides a subset


@pytest.mark.parametrize("rate", [0.2, 0.3, 0.4, 0.5])
def test_measured_masking_rate_is_the_rate_and_specials_are_never_masked(corpus, rate):
    c = settings(block_size=512, mask_rate=rate)
    ordinary = hidden = 0
    for first in range(0, 1024, 16):
        rows = data.read_rows(corpus, np.arange(first, first + 16), np.zeros(16, int), c)
        inputs, wanted, ids = objectives.mlm(rows, corpus, c)
        special = ids >= corpus.special_start
        assert not (wanted & special).any() and np.array_equal(inputs[special], ids[special])
        assert np.array_equal(wanted, inputs == corpus.mask_id) and np.array_equal(inputs[~wanted], ids[~wanted])
        ordinary, hidden = ordinary + (~special).sum(), hidden + wanted.sum()
    assert ordinary > 500_000 and ordinary < 64 * 16 * 512       # there were specials to spare
    sigma = (rate * (1 - rate) / ordinary) ** 0.5
    assert abs(hidden / ordinary - rate) < 3 * sigma


def test_80_10_10_replacement(corpus):
    c = settings(block_size=512, mask_replace=(0.8, 0.1, 0.1))
    rows = data.read_rows(corpus, np.arange(512), np.zeros(512, int), c)
    inputs, wanted, ids = objectives.mlm(rows, corpus, c)
    assert np.array_equal(wanted, objectives.mlm(rows, corpus, settings(block_size=512))[1])       # the same targets as pure masking
    n = wanted.sum()
    masked, kept = (inputs == corpus.mask_id)[wanted].mean(), (inputs == ids)[wanted].mean()
    assert abs(masked - 0.8) < 4 * (0.16 / n) ** 0.5
    assert abs(kept - 0.1 - 0.1 / corpus.special_start) < 4 * (0.09 / n) ** 0.5
    assert inputs[wanted & (inputs != corpus.mask_id)].max() < corpus.special_start
    assert np.array_equal(inputs[~wanted], ids[~wanted])


def test_rows_are_cut_in_two_sequences_of_12_tokens_or_more(corpus):
    c = settings(block_size=2048)
    row = np.arange(500)
    rows = data.read_rows(corpus, row, np.zeros(500, int), c)
    lengths = np.diff(rows.cu_seqlens)
    assert len(lengths) == 1000 and (lengths[::2] + lengths[1::2] == 2048).all()
    assert 12 <= lengths.min() < 30 and 2018 < lengths.max() <= 2036
    assert abs(lengths[::2].mean() - 1024) < 4 * 585 / 500 ** 0.5
    again = data.read_rows(corpus, row, np.ones(500, int), c)
    assert not np.array_equal(rows.cu_seqlens, again.cu_seqlens)                             # another epoch, other cuts
    whole = data.read_rows(corpus, row, np.zeros(500, int), settings(block_size=2048, random_length=False))
    assert (np.diff(whole.cu_seqlens) == 2048).all()


def test_document_mask_cuts_behind_every_eos(corpus):
    c = settings(block_size=512, document_mask=True)
    rows = data.read_rows(corpus, np.arange(256), np.zeros(256, int), c)
    bounds = set(rows.cu_seqlens.tolist())
    behind = set((np.flatnonzero(rows.tokens == corpus.eos_id) + 1).tolist())
    assert behind and behind <= bounds and (len(rows.cu_seqlens) - 1) % (8 * 256) == 0
    assert bounds >= set(data.read_rows(corpus, np.arange(256), np.zeros(256, int), settings(block_size=512)).cu_seqlens.tolist())


def test_clm_targets_are_the_next_token_inside_each_sequence(corpus):
    b = data.make_batch(corpus, np.arange(16), np.zeros(16, int), "clm", settings())
    expected = [(t, int(b.tokens[t + 1])) for s, e in zip(b.cu_seqlens, b.cu_seqlens[1:]) for t in range(s, e - 1)]
    assert b.causal and [(int(p), int(t)) for p, t in zip(b.positions, b.targets)] == expected and b.num_targets == len(expected)


def test_shapes_are_static_over_an_epoch(corpus):
    for objective in ("clm", "mlm"):
        shapes = {(b.tokens.shape, b.cu_seqlens.shape, b.positions.shape, b.targets.shape)
                  for step in range(60) for b in data.micro_batches(corpus, step, objective, settings(), 0, 1, 8)}
        assert len(shapes) == 1


def test_ids_above_65535_survive(tmp_path):
    facts = SimpleNamespace(vocab_size=128_256, eos_id=128_001, mask_id=128_002, special_start=128_000, hash=bytes(32))
    ids = np.array([0, 65_535, 65_536, 127_999, 100_000, 128_001])
    for split in ("train", "val"):
        writer = ShardWriter(str(tmp_path / f"{split}_00000.bin"), facts)
        writer.write(ids)
        writer.close()
    (tmp_path / "manifest.json").write_text('{"complete": true}')
    corpus = data.Corpus(str(tmp_path))
    assert corpus.read(0, 6).tolist() == ids.tolist() and corpus.vocab_size == 128_256
    assert corpus.shards[0].dtype == np.uint32


def test_reading_across_shards_is_reading_one_stream(tmp_path, corpus):
    facts = SimpleNamespace(vocab_size=corpus.vocab_size, eos_id=corpus.eos_id, mask_id=corpus.mask_id, special_start=corpus.special_start,
                            hash=bytes(32))
    stream, at = corpus.read(0, 1000), 0
    for i, n in enumerate((300, 1, 64, 635)):
        writer = ShardWriter(str(tmp_path / f"train_{i:05d}.bin"), facts)
        writer.write(stream[at:at + n])
        writer.close()
        at += n
    (tmp_path / "manifest.json").write_text('{"complete": true}')
    cut = data.Corpus(str(tmp_path))
    for start, count in ((0, 1000), (250, 200), (299, 3), (300, 1), (301, 64), (999, 1)):
        assert np.array_equal(cut.read(start, count), stream[start:start + count])


def test_validation_is_the_same_set_for_any_world_size_and_run(corpus_dir):
    val = data.Corpus(corpus_dir, "val")

    def targets(world, micro, **changes):
        found = []
        for rank in range(world):
            for b in data.validation_batches(val, "mlm", data.validation_settings(settings(**changes), 0.4), 10, rank, world, micro):
                assert len(b.tokens) == micro * 64
                found += b.targets[b.targets >= 0].tolist()
        return sorted(found)
    one = targets(1, 16)
    assert one == targets(1, 4) == targets(2, 4) == targets(4, 1) == targets(1, 16, seed=99, mask_rate=0.2, mask_replace=(0.8, 0.1, 0.1))
    assert abs(len(one) - 0.4 * 640) < 80


@pytest.mark.parametrize("damage, says", [
    (lambda d: shutil.rmtree(d), "python prepare_fineweb.py --source=sotu --out="),
    (lambda d: os.remove(d / "manifest.json"), ", which holds other files. If they are the text to train on: python prepare_fineweb.py --source="),
    (lambda d: [os.remove(p) for p in d.glob("train_*")], "lacks 1 of the 1 train shards"),
    (lambda d: cut(d / "train_00000.bin", 5000), "is truncated"),
    (lambda d: cut(d / "train_00000.bin", 100), "is truncated"),
    (lambda d: flip(d / "train_00000.bin", 9999), "is corrupted (checksum)"),
    (lambda d: flip(d / "train_00000.bin", 13), "corrupted header"),
    (lambda d: flip(d / "train_00000.bin", 0), "not a token shard"),
    (lambda d: another_tokenizer(d), "another tokenizer"),
    (lambda d: (d / "manifest.json").write_text(json.dumps({"complete": False})), "unfinished"),
])
def test_a_damaged_corpus_is_refused_with_the_way_out(tmp_path, corpus_dir, damage, says):
    shutil.copytree(corpus_dir, tmp_path / "c")
    damage(tmp_path / "c")
    with pytest.raises(UserError) as error:
        data.Corpus(str(tmp_path / "c"))
    assert says in str(error.value) and "\n" not in str(error.value)


def cut(path, size):
    os.truncate(path, size)


def flip(path, at):
    raw = bytearray(path.read_bytes())
    raw[at] ^= 0x40
    path.write_bytes(raw)


def another_tokenizer(folder):
    header = read_header(str(folder / "train_00000.bin"))
    facts = SimpleNamespace(**{f: int(header[f]) for f in ("vocab_size", "eos_id", "mask_id", "special_start")}, hash=bytes(range(32)))
    writer = ShardWriter(str(folder / "train_00001.bin"), facts)
    writer.write([1, 2, 3])
    writer.close()


def test_a_large_corpus_is_checked_while_training_goes_on(tmp_path, corpus_dir, monkeypatch):
    shutil.copytree(corpus_dir, tmp_path / "c")
    flip(tmp_path / "c" / "train_00000.bin", 9999)
    monkeypatch.setattr(data, "VERIFY_AT_ONCE", 0)
    corpus = data.Corpus(str(tmp_path / "c"))
    with pytest.raises(RunError, match="is corrupted"):
        for _ in range(100_000):
            corpus.read(0, 64)


def test_block_size_larger_than_the_corpus_is_refused(corpus, corpus_dir):
    with pytest.raises(UserError, match="block_size=99999999"):
        data.rows_of_step(corpus, 0, settings(block_size=99_999_999))
    with pytest.raises(UserError, match="val_fraction"):
        next(data.validation_batches(data.Corpus(corpus_dir, "val"), "clm", settings(block_size=99_999_999), 10, 0, 1, 1))
    with pytest.raises(UserError, match="too small"):
        data.rows_of_step(corpus, 0, settings(block_size=16))


def test_prefetch_keeps_order_and_passes_errors_on():
    assert list(data.prefetch(lambda step: step * step, 3, 50)) == [s * s for s in range(3, 50)]

    def fails(step):
        if step == 5:
            raise UserError("row 5")
        return step
    seen = []
    with pytest.raises(UserError, match="row 5"):
        for item in data.prefetch(fails, 0, 10):
            seen.append(item)
    assert seen == [0, 1, 2, 3, 4]
