import gzip
import lzma
import math

import pytest

from algpt2.evaluation import TextTotals, compressor_bits_per_byte, table, text_metrics


def test_a_uniform_model_has_the_metrics_one_can_count():
    # 100 tokens, each 1 of 16: 4 bits a token, 400 bits for 200 bytes and 40 words.
    metrics = text_metrics(math.log(16), TextTotals(tokens=100, words=40, text_bytes=200))
    assert metrics["val_ppl"] == pytest.approx(16)
    assert metrics["val_bpb"] == pytest.approx(2)
    assert metrics["val_word_ppl"] == pytest.approx(2**10)


def test_an_untrained_loss_does_not_overflow():
    assert text_metrics(1e4, TextTotals(1, 1, 1))["val_ppl"] == math.inf


def test_compressors_see_the_joined_text():
    bits = compressor_bits_per_byte(["to be", "or not"])
    assert bits["gzip -9"] == 8 * len(gzip.compress(b"to be\nor not", 9, mtime=0)) / 12
    assert bits["xz -9e"] == 8 * len(lzma.compress(b"to be\nor not", preset=9 | 1 << 31)) / 12


def test_table_is_aligned():
    lines = table([["", "loss"], ["model", "1.5"], ["x", "10.25"]]).splitlines()
    assert lines == ["        loss", "------------", "model    1.5", "x      10.25"]
