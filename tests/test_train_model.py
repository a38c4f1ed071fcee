import numpy as np
import pytest

from random_trees import VOCAB, expand, random_tree

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

from plait.errors import ModelError, RequestError  # noqa: E402
from plait.train.model import Decoder, ModelConfig, from_hf, hf_config, to_hf, visibility  # noqa: E402
from plait.train.packing import Bucket, PackedBatch, Packer  # noqa: E402
from plait.train.trie import dense_mask, flatten  # noqa: E402
from plait.tree import Segment, Tree  # noqa: E402

torch.set_num_threads(1)
SIZES = ModelConfig(vocab_size=VOCAB, width=16, layers=2, heads=2, ff=24, max_positions=256, query_block=7)


def small_model() -> Decoder:
    torch.manual_seed(0)
    model = Decoder(SIZES).double()
    for weight in model.parameters():
        # Far from the quiet start, so that a wrong mask bit or position is felt.
        torch.nn.init.normal_(weight, 0.3, 0.5)
    return model


def pack(trees: list[Tree]) -> PackedBatch:
    flat = [flatten(tree) for tree in trees]
    packer = Packer([Bucket(rows=1, length=sum(map(len, flat)) + 3)], num_spans=12)
    for example in flat:
        assert packer.add(example) is None
    return packer.flush()[0]


def inputs(batch: PackedBatch) -> list[torch.Tensor]:
    return [torch.from_numpy(a) for a in (batch.token_ids, batch.position_ids, batch.labels, batch.prev)]


def biases(model: Decoder, batch: PackedBatch) -> list[torch.Tensor]:
    return model.biases(*(torch.from_numpy(a) for a in (batch.end, batch.hide_lo, batch.hide_hi)))


def call(model: Decoder, tree: Tree, segment: Segment) -> torch.Tensor:
    """Logits of one engine call on its own: its whole context and what it sampled, one dense mask, one block."""
    ids, positions, sees = expand((*tree.context(segment.id), tuple(segment.sampled_ids)))
    seen = torch.tensor([[j in see for j in range(len(ids))] for see in sees])
    bias = torch.where(seen, 0.0, -torch.inf).double()[None, None]
    return model(torch.tensor([ids]), torch.tensor([positions]), [bias])[0]


@pytest.mark.parametrize("seed", range(12))
def test_the_packed_forward_equals_each_calls_own_forward(seed):
    model, trees = small_model(), [random_tree(seed), random_tree(seed + 1000, joins=("concat", "message"))]
    batch = pack(trees)
    ids, positions, _, prev = inputs(batch)
    with torch.no_grad():
        packed = model(ids, positions, biases(model, batch))[0]
        at = 0
        for tree in trees:
            for segment in tree.walk():
                own = call(model, tree, segment)
                count, num_sampled = len(segment.token_ids), len(segment.sampled_ids)
                torch.testing.assert_close(packed[at : at + count], own[len(own) - count :], rtol=0, atol=1e-9)
                predicting = prev[0, at + count - num_sampled : at + count]
                expected = own[len(own) - num_sampled - 1 : len(own) - 1]
                torch.testing.assert_close(packed[predicting], expected, rtol=0, atol=1e-9)
                at += count


@pytest.mark.parametrize("seed", range(4))
def test_the_gradient_of_the_packed_loss_is_the_sum_over_calls(seed):
    model, tree = small_model(), random_tree(seed, joins=("concat", "message") if seed % 2 else ("merge",))
    batch = pack([tree])
    model.losses(*inputs(batch), biases(model, batch)).sum().backward()
    packed = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    for segment in tree.walk():
        if segment.sampled_ids:
            logits = call(model, tree, segment)
            labels = torch.tensor(segment.sampled_ids)
            own = logits[len(logits) - len(labels) - 1 : -1]
            torch.nn.functional.cross_entropy(own, labels, reduction="sum").backward()
    for ours, weight in zip(packed, model.parameters(), strict=True):
        assert weight.grad is not None
        torch.testing.assert_close(ours, weight.grad, rtol=1e-8, atol=1e-9)


def test_query_blocks_build_the_same_mask_as_a_dense_one():
    batch = pack([random_tree(s) for s in (3, 5, 8)])
    spans = [torch.from_numpy(a) for a in (batch.end, batch.hide_lo, batch.hide_hi)]
    dense = dense_mask(batch.end[0], batch.hide_lo[0], batch.hide_hi[0])
    at = 0
    for bias in visibility(*spans, block=10, dtype=torch.float32):
        queries, keys = bias.shape[-2:]
        assert ((bias[0, 0] == 0).numpy() == dense[at : at + queries, :keys]).all()
        assert not dense[at : at + queries, keys:].any()
        at += queries
    assert at == len(dense)


def test_the_attention_has_the_gradient_that_finite_differences_have():
    from plait.train.model import _attend

    torch.manual_seed(1)
    q, k, v = (torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    bias = torch.where(torch.ones(5, 5).tril() > 0, 0.0, -30000.0).double()[None, None]
    assert torch.autograd.gradcheck(lambda q, k, v: _attend(q, k, v, bias), (q, k, v))


def test_weights_go_to_hugging_face_names_and_back():
    model = small_model().float()
    weights = to_hf(model)
    assert weights["model.layers.1.self_attn.k_proj.weight"].shape == (16, 16)
    again = from_hf(SIZES, weights)
    for ours, theirs in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert hf_config(SIZES)["intermediate_size"] == 24


def test_weights_that_do_not_fit_are_refused():
    weights = to_hf(small_model())
    del weights["model.norm.weight"]
    with pytest.raises(ModelError, match="do not fit"):
        from_hf(SIZES, weights)
    with pytest.raises(RequestError, match="head width"):
        ModelConfig(vocab_size=8, width=10, heads=3)
    assert all(w.dtype == np.float32 for w in weights.values())
