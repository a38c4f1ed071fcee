import math
import random
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

from plait.errors import RequestError  # noqa: E402
from plait.train.experience import Experience, PolicyBatch, pack  # noqa: E402
from plait.train.learners import nll  # noqa: E402
from plait.train.losses import importance, k3, surrogate, token_weights  # noqa: E402
from plait.train.model import Decoder, ModelConfig  # noqa: E402
from plait.train.packing import Bucket  # noqa: E402
from plait.train.policy import policy_loss  # noqa: E402
from plait.train.rl_config import LossConfig  # noqa: E402
from plait.train.rows import rows  # noqa: E402
from plait.train.trie import flatten  # noqa: E402
from plait.tree import Segment, Tree  # noqa: E402
from random_trees import VOCAB, random_tree  # noqa: E402

BUCKETS = [Bucket(rows=3, length=40), Bucket(rows=1, length=90)]


def decoder(seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    config = ModelConfig(vocab_size=VOCAB, width=16, layers=2, heads=2, ff=32, max_positions=512, query_block=16)
    return Decoder(config).double()


def tensor(*values: float) -> "torch.Tensor":
    return torch.tensor(values, dtype=torch.float64)


def batches(experiences: list[Experience], buckets: list[Bucket] = BUCKETS) -> list[PolicyBatch]:
    return pack(experiences, buckets, num_spans=0, pad_id=1)


def gradient(model: Decoder, packed: list[PolicyBatch], config: LossConfig, **others: Decoder) -> tuple[float, list]:
    """Loss of all batches together, and its gradient."""
    model.zero_grad()
    total = 0.0
    for batch in packed:
        with torch.no_grad():
            more = {name: -nll(other, batch.packed) for name, other in others.items()}
        loss = policy_loss(-nll(model, batch.packed), batch, config, **more)
        loss.backward()
        total += float(loss.detach())
    return total, [p.grad.clone() for p in model.parameters()]


def alike(ours: tuple[float, list], theirs: tuple[float, list]) -> bool:
    return math.isclose(ours[0], theirs[0], rel_tol=1e-11, abs_tol=1e-13) and all(
        torch.allclose(a, b, rtol=1e-9, atol=1e-13) for a, b in zip(ours[1], theirs[1], strict=True)
    )


def trees(seeds: range) -> list[Tree]:
    return [tree for seed in seeds if (tree := random_tree(seed)).num_sampled]


LOSSES = [
    LossConfig(),
    LossConfig(clip_low=0.05, clip_high=0.05, kl=0.3, cap=1.1),
    LossConfig(correction="none", aggregate="rollout_mean"),
]


@pytest.mark.parametrize("config", LOSSES)
def test_packed_trees_and_rows_have_the_same_loss_and_gradient(config: LossConfig) -> None:
    model, others = decoder(), {"proximal": decoder(1), "reference": decoder(2)}
    rng = random.Random(0)
    chosen = trees(range(12))
    weights = token_weights(config.aggregate, {str(i): t.num_sampled for i, t in enumerate(chosen)})
    worth = [(rng.gauss(0, 1), weights[str(i)]) for i in range(len(chosen))]
    packed = [Experience(trie=flatten(tree), advantage=a, weight=w) for tree, (a, w) in zip(chosen, worth, strict=True)]
    split = [
        Experience(trie=row, advantage=a, weight=w)
        for tree, (a, w) in zip(chosen, worth, strict=True)
        for row in rows(tree)
    ]
    assert sum(len(e.trie) for e in split) > 1.2 * sum(len(e.trie) for e in packed)
    assert alike(gradient(model, batches(packed), config, **others), gradient(model, batches(split), config, **others))


def test_every_sampled_token_is_trained_in_exactly_one_row() -> None:
    for tree in trees(range(40)):
        trained = [row.token_ids[row.loss_mask].tolist() for row in rows(tree)]
        assert trained == [s.sampled_ids for s in tree.walk() if s.sampled_ids]
        for row, segment in zip(rows(tree), [s for s in tree.walk() if s.sampled_ids], strict=True):
            assert row.logprobs[row.loss_mask].tolist() == segment.logprobs
            assert not row.logprobs[~row.loss_mask].any()


def test_the_loss_does_not_depend_on_the_order_and_size_of_batches() -> None:
    # Published: each micro-batch's mean weighed by its number of rows is not the mean over the batch's tokens.
    model, config = decoder(), LossConfig()
    rng = random.Random(1)
    experiences = [Experience(trie=flatten(t), advantage=rng.gauss(0, 1), weight=1 / 99) for t in trees(range(15))]
    whole = gradient(model, batches(experiences, [Bucket(rows=15, length=90)]), config)
    rng.shuffle(experiences)
    parts = batches(experiences, [Bucket(rows=1, length=30), Bucket(rows=2, length=70)])
    assert len(parts) > 3
    assert alike(whole, gradient(model, parts, config))


def test_padding_and_inserted_tokens_have_no_advantage_and_no_weight() -> None:
    for batch in batches([Experience(trie=flatten(t), advantage=2.0, weight=0.5) for t in trees(range(9))]):
        trained = batch.packed.labels >= 0
        assert (batch.advantages[trained] == 2.0).all()
        assert (batch.weights[trained] == 0.5).all()
        for array in (batch.advantages, batch.weights, batch.behaviour):
            assert not array[~trained].any()


def test_a_tree_longer_than_every_row_is_trained_in_a_batch_of_its_own() -> None:
    long = max(trees(range(40)), key=lambda t: len(flatten(t)))
    length = len(flatten(long))
    (batch,) = batches([Experience(trie=flatten(long), advantage=1.0, weight=1.0)], [Bucket(rows=2, length=length - 1)])
    assert batch.odd
    assert batch.packed.token_ids.shape == (1, length)
    assert batch.packed.num_trained == long.num_sampled


def test_the_expected_gradient_is_that_of_the_expected_reward() -> None:
    # Every action of a one-step policy once, weighed by its probability: the sum over samples, without the noise.
    model = decoder()
    reward = np.random.default_rng(0).random(VOCAB)
    tree = Tree({"0:0": Segment(id="0:0", forced_ids=(3, 1), sampled_ids=[0], logprobs=[0.0])})
    context = flatten(tree)

    def one(action: int, advantage: float, weight: float) -> Experience:
        ids = np.array([3, 1, action])
        return Experience(trie=replace(context, token_ids=ids), advantage=advantage, weight=weight)

    every = batches([one(a, 0.0, 1.0) for a in range(VOCAB)], [Bucket(rows=VOCAB, length=3)])
    (logs,) = (-nll(model, b.packed)[:, 2] for b in every)
    order = every[0].packed.token_ids[:, 2]
    exact = torch.autograd.grad(-(logs.exp() * torch.from_numpy(reward[order])).sum(), list(model.parameters()))
    p = logs.exp().detach().numpy()
    probability = dict(zip(order.tolist(), p.tolist(), strict=True))
    baseline = sum(probability[a] * reward[a] for a in range(VOCAB))
    # Behaviour log-probabilities as the engine would have said them.
    sampled = [
        replace(
            e := one(a, float(reward[a] - baseline), probability[a]),
            trie=replace(e.trie, logprobs=np.array([0, 0, math.log(probability[a])])),
        )
        for a in range(VOCAB)
    ]
    _, ours = gradient(model, batches(sampled), LossConfig())
    for mine, true in zip(ours, exact, strict=True):
        assert torch.allclose(mine, true, atol=1e-7)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        (1.0, 2.0, -2.0, False),
        (1.25, 2.0, -2.5, False),
        (1.5, 2.0, -2.56, True),
        (0.5, 2.0, -1.0, False),
        (0.9, -2.0, 1.8, False),
        (0.5, -2.0, 1.6, True),
        (3.0, -2.0, 6.0, False),
    ],
)
def test_the_surrogate_is_clipped_on_either_side_by_its_own_bound(
    ratio: float, advantage: float, loss: float, clipped: bool
) -> None:
    new = tensor(math.log(ratio) - 1).requires_grad_()
    losses, was = surrogate(new, tensor(-1.0), tensor(advantage), clip_low=0.2, clip_high=0.28)
    assert losses.item() == pytest.approx(loss)
    assert was.item() is clipped
    losses.sum().backward()
    assert new.grad is not None
    assert (new.grad.item() == 0) is clipped


def test_one_odd_token_gives_no_nan() -> None:
    new = torch.tensor([0.0, -400.0], requires_grad=True)
    losses, _ = surrogate(new, torch.tensor([-400.0, 0.0]), torch.tensor([1.0, -1.0]), clip_low=0.2, clip_high=0.2)
    weights = importance(torch.tensor([0.0, -400.0]), torch.tensor([-400.0, 0.0]), cap=2.0)
    (losses * weights + k3(new, torch.tensor([-400.0, 0.0]))).sum().backward()
    assert weights.tolist() == [2.0, 0.0]
    assert torch.isfinite(new.grad).all()  # pyright: ignore[reportArgumentType]


def test_importance_weights_are_truncated_and_carry_no_gradient() -> None:
    new = tensor(-1.0, -1.0, -1.0).requires_grad_()
    weights = importance(new, tensor(-1.0, -0.5, -3.0), cap=2.0)
    assert weights.tolist() == pytest.approx([1.0, math.exp(-0.5), 2.0])
    assert not weights.requires_grad


def test_the_divergence_is_zero_between_equals_and_never_negative() -> None:
    ours, reference = tensor(-1.0, -2.0, -0.1), tensor(-1.0, -1.0, -3.0)
    expected = [math.exp(d) - d - 1 for d in (0.0, 1.0, -2.9)]
    assert k3(ours, reference).tolist() == pytest.approx(expected)
    assert min(expected) == 0


def test_tokens_that_an_older_or_other_engine_sampled_count_as_far_as_the_trainer_would_say_them() -> None:
    model = decoder()
    (tree,) = trees(range(1, 2))
    trie = flatten(tree)
    plain = batches([Experience(trie=trie, advantage=1.0, weight=1.0)])
    with torch.no_grad():
        same = (-nll(model, plain[0].packed)).float().numpy()[0, : len(trie)]
    experience = Experience(trie=replace(trie, logprobs=same), advantage=1.0, weight=1.0)
    doubled = Experience(trie=replace(trie, logprobs=same - np.log(2.0) * trie.loss_mask), advantage=1.0, weight=1.0)
    on_policy = gradient(model, batches([experience]), LossConfig())
    half_as_likely = gradient(model, batches([doubled]), LossConfig(cap=5.0))
    capped = gradient(model, batches([doubled]), LossConfig(cap=1.0))
    assert half_as_likely[0] == pytest.approx(2 * on_policy[0], rel=1e-5)
    assert capped[0] == pytest.approx(on_policy[0], rel=1e-5)


def test_weights_of_tokens_by_hand() -> None:
    counts = {"a": 2, "b": 6, "none": 0}
    assert token_weights("token_mean", counts) == {"a": 1 / 8, "b": 1 / 8, "none": 1 / 8}
    assert token_weights("rollout_mean", counts) == pytest.approx({"a": 1 / 6, "b": 1 / 18, "none": 1 / 3})
    assert token_weights("constant", counts, constant=100) == dict.fromkeys(counts, 1 / 300)
    assert token_weights("token_mean", {}) == token_weights("constant", {}) == {}
    with pytest.raises(RequestError, match="did you mean 'token_mean'"):
        token_weights("token_men", counts)
