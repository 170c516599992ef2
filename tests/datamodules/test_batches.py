import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler

from robust_flatness.datamodules import ResidentImages
from robust_flatness.datamodules.batches import GlobalBatches
from robust_flatness.datamodules.images import keep_batch
from robust_flatness.datamodules.mixed_batches import MixedSampler
from robust_flatness.datamodules.mixed_images import MixedImages

LABELLED, POOL, BATCH = 43, 29, 8
WHOLE, REST = divmod(LABELLED, BATCH)


def mixed_images():
    """Labelled images of pixels 1 and up, followed by pseudo-labelled ones of 101 and up."""
    return MixedImages(*(flat_images(101 * i + 1 - i, n) for i, n in enumerate((LABELLED, POOL))))


def flat_images(first, count):
    pixels = torch.arange(first, first + count).to(torch.uint8).view(-1, 1, 1, 1)
    return ResidentImages(pixels.expand(-1, 1, 2, 2).clone(), torch.arange(count))


def sampler(share, *, rank=0, world_size=1, seed=0, epoch=0):
    built = MixedSampler(mixed_images(), GlobalBatches(BATCH, world_size, rank, seed), share)
    built.set_epoch(epoch)
    return built


def batches_of(epochs, share, **kwargs):
    """Positions in the whole batches of some epochs, `(batches, BATCH)`, and all in order."""
    rows = [torch.tensor(list(sampler(share, epoch=epoch, **kwargs))) for epoch in epochs]
    size = BATCH // kwargs.get("world_size", 1)
    whole = [row[: WHOLE * size].view(-1, size) for row in rows]
    return torch.cat(whole), torch.cat(rows)


@pytest.mark.parametrize(
    ("share", "count", "rest"),
    [(0.125, 1, 0), (0.3, 2, 1), (0.5, 4, 2), (0.7, 6, 2), (1, 8, 3)],
)
def test_the_share_is_exact_in_every_batch(share, count, rest):
    batches, every = batches_of(range(6), share)
    assert len(every) == 6 * len(sampler(share)) == 6 * LABELLED
    assert (batches >= LABELLED).sum(1).tolist() == [count] * len(batches)
    # The last batch of an epoch has the three images that remain.
    lasts = every.view(6, LABELLED)[:, -REST:]
    assert (lasts >= LABELLED).sum(1).tolist() == [rest] * 6
    assert 0 <= every.min() <= every.max() < LABELLED + POOL


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_either_kind_is_seen_once_a_pass_whatever_the_epoch(share):
    _, seen = batches_of(range(20), share)
    counts = torch.bincount(seen, minlength=LABELLED + POOL)
    for of_kind in (counts[:LABELLED], counts[LABELLED:]):
        # So many passes are complete, and some images have been seen in the one that is not.
        assert of_kind.max() - of_kind.min() <= 1
    extra = WHOLE * round(share * BATCH) + round(share * REST)
    assert counts[:LABELLED].sum() == 20 * (LABELLED - extra)


def test_passes_are_permutations_and_differ():
    built = sampler(0.5)
    passes = []
    for kind, population in (("labelled", LABELLED), ("unlabelled", POOL)):
        parts = []
        for epoch in range(10):
            built.set_epoch(epoch)
            parts += built._take(kind, population, [4, 4, 4, 4, 4, 2])
        row = torch.cat(parts)
        assert len(row) == 10 * 22
        for start in range(0, len(row) - population, population):
            part = row[start : start + population]
            assert sorted(part.tolist()) == list(range(population))
            passes.append(tuple(part.tolist()))
    assert len(set(passes)) == len(passes) == 5 + 7


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_share_the_batches_of_a_single_one(world_size):
    for epoch in (0, 5):
        whole, every = batches_of([epoch], 0.25)
        for rank in range(world_size):
            rows, mine = batches_of([epoch], 0.25, rank=rank, world_size=world_size)
            assert torch.equal(rows, whole[:, rank::world_size])
            # Of the rest, what can be shared evenly.
            even = LABELLED - LABELLED % world_size
            assert torch.equal(mine, every[rank:even:world_size])
            assert len(mine) == len(sampler(0.25, rank=rank, world_size=world_size))


def test_batches_are_shuffled():
    batches, _ = batches_of(range(40), 0.5)
    often = (batches >= LABELLED).float().mean(0)
    # 200 batches: a standard deviation of 0.035.
    assert 0.35 < often.min() < often.max() < 0.65
    assert len((batches >= LABELLED).unique(dim=0)) > 40


def test_seed_and_epoch_decide_and_nothing_else():
    _, first = batches_of([3], 0.5, seed=1)
    torch.manual_seed(8)
    running = sampler(0.5, seed=1)
    for epoch in range(4):
        running.set_epoch(epoch)
        went_on = torch.tensor(list(running))
    assert torch.equal(went_on, first)
    assert not torch.equal(batches_of([4], 0.5, seed=1)[1], first)
    _, other = batches_of([3], 0.5, seed=2)
    assert not torch.equal(other[:BATCH].sort().values, first[:BATCH].sort().values)
    # Where the pseudo-labelled ones lie.
    assert not torch.equal(other >= LABELLED, first >= LABELLED)


def test_a_loader_keeps_the_order_and_says_which_are_pseudo_labelled():
    images, built = mixed_images(), sampler(0.5)
    loader = DataLoader(images, BATCH, sampler=built, collate_fn=keep_batch)
    # Lightning replaces any other kind of sampler where there are several processes.
    assert isinstance(loader.sampler, DistributedSampler)
    pixels = torch.cat([images.labelled.images, images.unlabeled.images])
    labels = torch.cat([images.labelled.labels, images.unlabeled.labels])
    seen = list(loader)
    assert len(seen) == len(loader) == WHOLE + 1
    for chosen, batch in zip(torch.tensor(list(built)).split(BATCH), seen, strict=True):
        assert torch.equal(batch[0], pixels[chosen])
        assert torch.equal(batch[1], labels[chosen])
        assert torch.equal(batch[2], chosen >= LABELLED)
        assert batch[2].dtype is torch.bool


def test_a_batch_may_be_of_one_kind():
    images = mixed_images()
    assert len(images) == LABELLED + POOL
    for chosen, kind in (([3, 1], False), ([LABELLED + 2, LABELLED], True)):
        pixels, labels, unlabeled = images.__getitems__(chosen)
        assert pixels[:, 0, 0, 0].tolist() == [(101 - LABELLED if kind else 1) + i for i in chosen]
        assert labels.tolist() == [i - LABELLED * kind for i in chosen]
        assert unlabeled.tolist() == [kind, kind]


@pytest.mark.parametrize(
    ("share", "message"),
    [
        (-0.1, r"Expected `unlabeled_share` to be in \[0, 1\] but got -0.1"),
        (2, r"Expected `unlabeled_share` to be in \[0, 1\] but got 2"),
        (0.06, "each batch of 8 images of both kinds but got 0.06"),
        (0.94, "each batch of 8 images of both kinds but got 0.94"),
    ],
)
def test_other_shares_are_refused(share, message):
    with pytest.raises(ValueError, match=message):
        sampler(share)
