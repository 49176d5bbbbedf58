"""The data budget: a run that reads rows of its corpus again says so, in one line, before it trains."""
import json
from types import SimpleNamespace

import pytest
from test_odd_text import sentences

import prepare_fineweb
import train
from experiments.overview import print_plan
from experiments.scales import scale_called
from pretraining import data


@pytest.fixture(scope="module")
def small_corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences(60)))
    out = str(folder / "corpus")
    prepare_fineweb.prepare(prepare_fineweb.Config(source=str(folder / "a.jsonl"), out=out, tokenizer="train:320", val_fraction=0.2))
    return out


@pytest.mark.parametrize("first_row, n_steps, again", [(0, 10, 0), (0, 12, 0), (0, 13, 4), (0, 40, 220), (92, 1, 0), (96, 2, 12), (200, 3, 24)])
def test_rows_read_again_are_those_behind_the_first_epoch(first_row, n_steps, again):
    """100 rows, 8 a step."""
    settings = data.DataSettings(block_size=64, batch_rows=8, first_row=first_row)
    corpus = SimpleNamespace(n_tokens=64 * 100 + 63, split="train")
    assert data.count_rows_read_again(corpus, settings, n_steps) == again
    if first_row == 0:
        read = [tuple(pair) for step in range(n_steps) for pair in zip(*data.rows_of_step(corpus, step, settings))]
        assert len(read) - len({row for row, _ in read}) == again


def test_training_says_how_many_rows_it_reads_again(tiny, small_corpus, capsys):
    train.main(tiny(data_dir=small_corpus, batch_rows=32))
    n_rows = data.Corpus(small_corpus).n_tokens // 64
    says = f"the corpus has {n_rows:,} rows: {20 * 32 - n_rows:,} of this run's 640 rows are read for the second time or more"
    assert says in capsys.readouterr().out.splitlines()
    train.main(tiny("other", data_dir=small_corpus, batch_rows=8))
    assert "second time" not in capsys.readouterr().out


def test_a_studys_plan_says_which_runs_read_rows_again(small_corpus, tmp_path, capsys):
    def plan(train_tokens):
        manifest = json.load(open(f"{small_corpus}/manifest.json"))
        (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"train_tokens": train_tokens}))
        print_plan(["610m-clm-42k", "610m-clm-dec42k-mlm40-64k"], scale_called("paper"), str(tmp_path), 0)
        return [line for line in capsys.readouterr().out.splitlines() if "second time" in line]
    assert plan(152_000_000_000) == []
    line, = plan(97_200_000_000)
    rows, n_rows = 1152, 97_200_000_000 // 2048
    assert line.startswith(f"{tmp_path} has {n_rows:,} rows: 2 of 2 runs read rows for the second time or more, 610m-clm-dec42k-mlm40-64k "
                           f"{(64_000 - 42_000) * rows:,} of them")
