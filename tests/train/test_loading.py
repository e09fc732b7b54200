"""fusedres.train.loading: the order of images, and the same batches however they are read."""

import pytest
import torch
from torch.nn import functional as F

from fusedres.train.augment import Augment, measure
from fusedres.train.loading import Loaded, Order, loader
from fusedres.train.recipe import PadCrop
from fusedres.train.sources import Arrays, DataError


def source(count=53):
    generator = torch.Generator().manual_seed(0)
    return Arrays(torch.randint(0, 256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8), torch.arange(count))


def indices(order):
    return [batch.indices.tolist() for batch in order]


def flat(lists):
    return [one for part in lists for one in part]


def test_an_epoch_shuffles_and_leaves_out_what_fills_no_batch():
    order = Order(53, 10, seed=0)
    assert len(order) == 5
    batches = indices(order)
    assert [len(batch) for batch in batches] == [10] * 5
    assert len({index for batch in batches for index in batch}) == 50
    assert indices(order) == batches
    order.epoch = 1
    assert indices(order) != batches
    assert indices(Order(53, 10, seed=1)) != batches


def test_an_order_can_start_anywhere():
    order = Order(53, 10, seed=0)
    batches = indices(order)
    order.start = 3
    assert indices(order) == batches[3:]


def test_ranks_share_the_batches_of_one():
    whole = indices(Order(53, 10, seed=0))
    parts = [indices(Order(53, 10, seed=0, rank=rank, ranks=2)) for rank in range(2)]
    for batch, *shares in zip(whole, *parts, strict=True):
        assert [len(share) for share in shares] == [5, 5]
        assert sorted(flat(shares)) == sorted(batch)


def test_at_test_time_every_image_comes_once_in_order():
    assert flat(indices(Order(53, 10, seed=None))) == list(range(53))
    ranks = [indices(Order(53, 10, seed=None, rank=rank, ranks=4)) for rank in range(4)]
    assert sorted(flat(flat(ranks))) == list(range(53))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("here", [True, False])
def test_batches_are_the_same_however_they_are_read(workers, here):
    data = source()
    augment = Augment(measure(data, "pixel"), PadCrop(2))
    order = Order(53, 10, seed=4)
    order.epoch, order.start = 2, 1
    expected = [augment(data.images[b.indices], None).shape for b in order]
    reference = list(loader(data, order, augment, workers=0, here=True))
    got = list(loader(data, order, augment, workers=workers, here=here))
    assert len(got) == len(reference) == len(expected) == 4
    for one, other in zip(reference, got, strict=True):
        assert isinstance(other, Loaded)
        assert torch.equal(one.labels, other.labels)
        images = other.images if other.draws is None else augment(other.images, other.draws)
        assert torch.equal(one.images, images)
    # Augmented: no batch equals its plain images.
    plain = augment(data.images[reference[0].labels], None)
    assert not torch.equal(reference[0].images, plain)


def test_reading_takes_nothing_from_the_generator_of_the_process():
    data = source()
    augment = Augment(measure(data, "pixel"), PadCrop())
    before = torch.get_rng_state()
    list(loader(data, Order(53, 10, seed=0), augment, workers=0, here=True))
    assert torch.equal(torch.get_rng_state(), before)


class Grey(Arrays):
    """Images of one channel."""

    def fetch(self, indices, draws):
        return self.images[indices, :1]


class Expanded(Grey):
    """Grey images as three equal channels."""

    def fetch(self, indices, draws):
        return super().fetch(indices, draws).expand(-1, 3, -1, -1)


class Windows(Arrays):
    """Views of images that share rows."""

    def fetch(self, indices, draws):
        rows = F.pad(self.images[indices, 0].flatten(), (0, 16))
        return rows.as_strided((len(indices), 3, 8, 8), (64, 8, 8, 1))


class Permuted(Arrays):
    """Images whose channels lie together in memory."""

    def fetch(self, indices, draws):
        return self.images[indices].to(memory_format=torch.channels_last)


KINDS = (Arrays, Expanded, Windows, Permuted)


# torch pins nothing where there is no GPU, and says so.
@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("kind", "here", "channels"),
    [(Grey, True, 3), *((kind, here, None) for kind in KINDS for here in (True, False))],
)
def test_what_is_pinned_lies_once_in_memory(kind, here, channels, workers):
    data = kind(source(20).images, torch.arange(20))
    augment = Augment(measure(data, "channel"), PadCrop(2), channels=channels)
    arguments = {"augment": augment, "workers": workers, "here": here}
    free = list(loader(data, Order(20, 10, seed=0), **arguments))
    pinned = list(loader(data, Order(20, 10, seed=0), **arguments, pin=True))
    assert len(free) == len(pinned) == 2
    for one, other in zip(free, pinned, strict=True):
        assert other.images.shape[1] == 3
        for before, after in zip(one, other, strict=True):
            assert (before is None) == (after is None)
            if after is not None:
                assert after.untyped_storage().nbytes() >= after.nbytes
                assert torch.equal(before, after)
                after.copy_(before)  # as page-locking does: refused where numbers share a place
    # Strides of a batch that could be pinned all along stay: a copy would take time.
    if kind is Permuted and not here:
        assert all(batch.images.is_contiguous(memory_format=torch.channels_last) for batch in pinned)


def test_a_broken_file_comes_as_its_error_even_from_a_worker():
    class Broken(Arrays):
        def fetch(self, indices, draws):
            raise DataError("data: the image x.png can not be read")

    data = source()
    augment = Augment(measure(data, "pixel"), PadCrop())
    broken = Broken(data.images, data.labels)
    first = next(iter(loader(broken, Order(53, 10, seed=0), augment, workers=1, here=True)))
    assert isinstance(first, DataError)
    assert "x.png" in str(first)
