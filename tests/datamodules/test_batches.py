import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, default_convert

from robust_flatness.datamodules import ResidentImages
from robust_flatness.datamodules.batches import GlobalBatches, MixedImages, MixedSampler

LABELED, POOL, BATCH = 43, 29, 8
WHOLE, REST = divmod(LABELED, BATCH)


def mixed_images():
    """Labeled images of pixels 1 and up, followed by pseudo-labeled ones of 101 and up."""
    return MixedImages(*(flat_images(101 * i + 1 - i, n) for i, n in enumerate((LABELED, POOL))))


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
    assert len(every) == 6 * len(sampler(share)) == 6 * LABELED
    assert (batches >= LABELED).sum(1).tolist() == [count] * len(batches)
    # The last batch of an epoch has the three images that remain.
    lasts = every.view(6, LABELED)[:, -REST:]
    assert (lasts >= LABELED).sum(1).tolist() == [rest] * 6
    assert 0 <= every.min() <= every.max() < LABELED + POOL


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_each_image_is_seen_once_a_pass_from_epoch_to_epoch(share):
    _, seen = batches_of(range(20), share)
    sizes = ([BATCH] * WHOLE + [REST]) * 20
    counts = torch.zeros(LABELED + POOL, dtype=torch.long)
    for batch in seen.split(sizes):
        counts += torch.bincount(batch, minlength=LABELED + POOL)
        for of_kind in (counts[:LABELED], counts[LABELED:]):
            # Complete passes, and one in which some images have been seen.
            assert of_kind.max() - of_kind.min() <= 1
    unlabeled = WHOLE * round(share * BATCH) + round(share * REST)
    assert counts[:LABELED].sum() == 20 * (LABELED - unlabeled)


def test_passes_differ():
    batches, _ = batches_of(range(10), 0.5)
    for kind in (batches < LABELED, batches >= LABELED):
        parts = batches[kind].view(-1, BATCH // 2).sort(1).values
        # More batches than images: equal passes would repeat some.
        assert len(parts.unique(dim=0)) == len(parts) == 50


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_share_the_batches_of_a_single_one(world_size):
    for epoch in (0, 5):
        whole, every = batches_of([epoch], 0.25)
        for rank in range(world_size):
            rows, mine = batches_of([epoch], 0.25, rank=rank, world_size=world_size)
            assert torch.equal(rows, whole[:, rank::world_size])
            # Of the rest, what can be shared evenly.
            even = LABELED - LABELED % world_size
            assert torch.equal(mine, every[rank:even:world_size])
            assert len(mine) == len(sampler(0.25, rank=rank, world_size=world_size))


def test_batches_are_shuffled():
    batches, _ = batches_of(range(40), 0.5)
    often = (batches >= LABELED).float().mean(0)
    # 200 batches: a standard deviation of 0.035.
    assert 0.35 < often.min() < often.max() < 0.65
    assert len((batches >= LABELED).unique(dim=0)) > 40


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
    # Where the pseudo-labeled ones lie.
    assert not torch.equal(other >= LABELED, first >= LABELED)


def test_a_loader_keeps_the_order_and_says_which_are_pseudo_labeled():
    images, built = mixed_images(), sampler(0.5)
    loader = DataLoader(images, BATCH, sampler=built, collate_fn=default_convert)
    # Lightning replaces samplers of other classes if there are several processes.
    assert isinstance(loader.sampler, DistributedSampler)
    pixels = torch.cat([images.labeled.images, images.unlabeled.images])
    labels = torch.cat([images.labeled.labels, images.unlabeled.labels])
    seen = list(loader)
    assert len(seen) == len(loader) == WHOLE + 1
    for chosen, batch in zip(torch.tensor(list(built)).split(BATCH), seen, strict=True):
        assert torch.equal(batch[0], pixels[chosen])
        assert torch.equal(batch[1], labels[chosen])
        assert torch.equal(batch[2], chosen >= LABELED)
        assert batch[2].dtype is torch.bool


def test_a_batch_may_be_of_one_kind():
    images = mixed_images()
    assert len(images) == LABELED + POOL
    for chosen, kind in (([3, 1], False), ([LABELED + 2, LABELED], True)):
        pixels, labels, unlabeled = images.__getitems__(chosen)
        assert pixels[:, 0, 0, 0].tolist() == [(101 - LABELED if kind else 1) + i for i in chosen]
        assert labels.tolist() == [i - LABELED * kind for i in chosen]
        assert unlabeled.tolist() == [kind, kind]
