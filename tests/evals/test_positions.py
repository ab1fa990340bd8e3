"""Loss by position: each bucket against the logits of every token, and what is made of it."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from effitrain.core.errors import InputError
from effitrain.core.placement import place
from effitrain.data.batches import Batches
from effitrain.data.tokenized import IGNORE, TokenSet
from effitrain.evals.perplexity import evaluate_loss
from effitrain.evals.positions import (
    Bucket,
    ByPosition,
    beyond_its_length,
    default_bucket,
    longest_sample,
    loss_by_position,
    overall,
    score,
)
from effitrain.evals.scores import Scores
from effitrain.io.run_folder import RunFolder
from effitrain.model.load import find_base, load_model
from effitrain.planning import recipe
from effitrain.train.state import TrainState

LENGTHS = (23, 9, 2, 17, 30)


@pytest.fixture(scope="module")
def decoder(tiny_model):
    folder = str(tiny_model("llama"))
    return load_model(find_base(folder), recipe(model=folder, quant="none", dtype="fp32"), torch.device("cpu"))


def token_set(masked=(), lengths=LENGTHS):
    """Random samples; the tokens at the places of ``masked`` are not trained."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.random.default_rng(5).integers(0, 259, offsets[-1]).astype(np.int32)
    labels = ids.copy()
    labels[offsets[:-1]] = IGNORE
    labels[list(masked)] = IGNORE
    return TokenSet(ids, labels, offsets)


def by_hand(decoder, tokens, bucket):
    """Loss and count by bucket, from each sample alone."""
    losses = {}
    for start, end in zip(tokens.offsets, tokens.offsets[1:], strict=False):
        ids = torch.from_numpy(tokens.input_ids[start:end].astype(np.int64))
        with torch.no_grad():
            logits = decoder.logits(decoder(ids, torch.arange(len(ids)), [len(ids)])).double()
        for at in range(len(ids) - 1):
            if tokens.labels[start + at + 1] != IGNORE:
                loss = F.cross_entropy(logits[at], ids[at + 1]).item()
                losses.setdefault(at // bucket, []).append(loss)
    return {number: (np.mean(found), len(found)) for number, found in losses.items()}


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("bucket", [1, 4, 7, 100])
def test_every_bucket_is_the_mean_of_its_tokens(decoder, packing, bucket):
    tokens = token_set(masked=[1, 2, 3, 7, 30, *range(50, 56)])
    batches = Batches(tokens, 2, 32, packing, 0)
    found = loss_by_position(decoder.train(), batches, bucket)
    expected = by_hand(decoder.eval(), tokens, bucket)
    assert [(b.start, b.end) for b in found] == [(n * bucket, (n + 1) * bucket) for n in sorted(expected)]
    for one in found:
        loss, count = expected[one.start // bucket]
        assert one.tokens == count and one.loss == pytest.approx(loss, rel=1e-5)
    whole, sum_of = evaluate_loss(decoder, batches), overall(found)
    assert sum_of.tokens == whole.tokens == tokens.trained_tokens and sum_of.loss == pytest.approx(whole.loss, rel=1e-6)


def test_the_mode_is_given_back_and_an_empty_set_refused(decoder):
    loss_by_position(decoder.train(), Batches(token_set(), 2, 32, False, 0), 8)
    assert decoder.training
    with pytest.raises(InputError, match="no token to score"):
        loss_by_position(decoder, Batches(token_set(masked=range(sum(LENGTHS))), 2, 32, False, 0), 8)


@pytest.fixture(scope="module")
def streamed(tiny_model):
    """The three layers of a model that take turns in one slot."""
    folder = str(tiny_model("llama", layers=3))
    asked = recipe(model=folder, quant="none", dtype="fp32")
    return load_model(find_base(folder).fetched(), asked, torch.device("cpu"), placement=place(3, 0, 1))


def copies(decoder, evaluate):
    before = decoder.streamer.traffic.copies
    return evaluate(), decoder.streamer.traffic.copies - before


@pytest.mark.parametrize("bucket", [None, "auto", 7])
def test_a_streamed_layer_is_read_once_a_group(streamed, bucket):
    batches = Batches(token_set(), 1, 32, False, 0)  # five
    found = [copies(streamed, lambda n=n: score(streamed, batches, n, bucket)) for n in (1, 2, 5)]
    assert all(one == found[0][0] for one, _ in found) and bool(found[0][0].buckets) == (bucket is not None)
    assert [count for _, count in found] == [15, 9, 3]


def test_a_run_scores_in_groups_by_position_too(streamed, tmp_path):
    for longest in (30, 270):
        batches = Batches(token_set(lengths=(longest, 9, 5)), 1, 512, False, 0)
        folder = tmp_path / str(longest)
        folder.mkdir()
        scores = Scores(streamed, batches, RunFolder(folder, {}), TrainState(), lambda *told: None, at_once=3)
        assert copies(streamed, lambda scores=scores: scores.add("before"))[1] == 3
        assert bool(scores.positions) == (longest > 256) and len(scores.points) == 1


def test_buckets_by_default():
    assert [default_bucket(longest, 8192) for longest in (10, 2048, 8192)] == [256, 256, 1024]
    assert [default_bucket(longest, 512) for longest in (512, 2048, 8192)] == [256, 256, 512]
    assert [default_bucket(longest, 100) for longest in (90, 2048)] == [256, 100]
    assert all(
        made_for % default_bucket(longest, made_for) == 0 for made_for in (512, 4096) for longest in (5000, 9999)
    )
    assert longest_sample(Batches(token_set(), 2, 32, False, 0)) == 30


def test_what_is_said_of_samples_beyond_the_length():
    buckets = [Bucket(0, 8, 2.0, 10), Bucket(8, 16, 3.0, 30), Bucket(16, 24, 5.0, 10), Bucket(24, 32, 7.0, 10)]
    assert beyond_its_length(buckets, 32, 32) is None
    said = beyond_its_length(buckets, 30, 16)
    assert said is not None and "2.750 up to there and 6.000 beyond" in said and "30 tokens" in said
    assert str(beyond_its_length(buckets[:1], 9, 7)).endswith("the 7 positions the model was made for.")


def test_rows_of_the_report():
    made = ByPosition((Bucket(0, 8, 2.0, 10),), (Bucket(0, 8, 1.5, 10),))
    assert made.rows() == [{"start": 0, "end": 8, "tokens": 10, "before": 2.0, "after": 1.5}]
