"""fusedres.traffic.aten and account: what single calls cost, on the meta device."""

import pytest
import torch
from torch.nn.functional import batch_norm, conv2d, max_pool2d

from fusedres.traffic.account import Account
from fusedres.traffic.meta_autocast import meta_autocast

X = torch.empty(2, 8, 6, 4, device="meta")
W = torch.empty(16, 8, 3, 3, device="meta")
V = torch.empty(8, device="meta")
x, w, y = X.nbytes, W.nbytes, 2 * X.nbytes


def counted(call, *, grad_twice=True):
    with Account({}, rest=("all", "all"), target=None, grad_twice=grad_twice) as account:
        call()
    assert all(entry.layer == "all" and not entry.ours for entry in account.entries)
    return [(entry.name, entry.read, entry.written) for entry in account.entries]


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        pytest.param(lambda: X.view(-1)[3:].detach().t(), [], id="views"),
        pytest.param(lambda: torch.empty_like(X), [], id="memory that nothing writes"),
        pytest.param(lambda: X + X, [("add", x, x)], id="one tensor read twice"),
        pytest.param(lambda: X.clone().relu_(), [("clone", x, x), ("relu_", x, x)], id="in place"),
        pytest.param(lambda: torch.empty_like(X).copy_(X), [("copy_", x, x)], id="overwritten"),
        pytest.param(lambda: torch.empty_like(X).zero_(), [("zero_", 0, x)], id="filled"),
        pytest.param(lambda: X + V.view(1, 8, 1, 1).expand_as(X), [("add", x + V.nbytes, x)], id="expanded"),
        pytest.param(lambda: X.to(torch.bfloat16), [("_to_copy", x, x // 2)], id="cast"),
        pytest.param(lambda: X.contiguous(), [], id="nothing to do"),
        pytest.param(lambda: torch.cat([X, X]), [("cat", x, 2 * x)], id="concatenated"),
        pytest.param(lambda: conv2d(X, W, padding=1), [("convolution", x + w, y)], id="convolution"),
        pytest.param(
            lambda: torch._foreach_add_([V.clone() for _ in range(70)], 1)[:0],
            [("clone", 32, 32)] * 70 + [("_foreach_add_", 70 * 32, 70 * 32), ("_foreach_add_", 0, 0)],
            id="more tensors than one launch takes",
        ),
        pytest.param(
            lambda: batch_norm(X, V, V, training=False), [("batch_norm_elemt", x + 4 * 32, x)], id="evaluated"
        ),
        pytest.param(lambda: max_pool2d(X, 2), [("max_pool2d_with_indices", x, x // 4 * 3)], id="pooled, 8-byte index"),
    ],
)
def test_a_call(call, expected):
    assert counted(call) == expected


def test_batch_norm_in_training_and_back():
    z = torch.empty_like(X, requires_grad=True)

    def step():
        batch_norm(z, None, None, training=True).backward(torch.empty_like(X))

    passes = [(name, round(read / x), round(written / x)) for name, read, written in counted(step)]
    assert passes == [
        ("batch_norm_stats", 1, 0), ("batch_norm_update_stats", 0, 0), ("batch_norm_elemt", 1, 1),
        ("batch_norm_backward_reduce", 2, 0), ("batch_norm_backward_elemt", 2, 1),
    ]  # fmt: skip


@pytest.mark.parametrize("grad_twice", [True, False])
@pytest.mark.parametrize("image", [True, False])
def test_gradients_of_a_convolution(image, grad_twice):
    source = torch.empty_like(X, requires_grad=image)
    weight = torch.empty_like(W, requires_grad=True)
    z = conv2d(source, weight, padding=1)
    found = counted(lambda: z.backward(torch.empty_like(z)), grad_twice=grad_twice)
    expected = [("convolution_input_grad", y + w, x)] if image else []
    again = y if grad_twice or not image else 0
    assert found == [*expected, ("convolution_weight_grad", again + x, w)]


def test_flops_of_convolutions_and_products():
    with Account({}, rest=("", ""), target=None) as account:
        conv2d(X, W, padding=1, stride=2)
        torch.empty(5, 7, device="meta") @ torch.empty(7, 3, device="meta")
    assert [entry.flops for entry in account.entries] == [2 * 2 * 3 * 2 * 16 * 8 * 9, 2 * 5 * 7 * 3]


def test_autocast_on_meta_casts_a_parameter_once_and_what_convolves_every_time():
    weight = torch.nn.Parameter(W)

    def step():
        with meta_autocast(torch.bfloat16):
            for _ in range(2):
                assert conv2d(X, weight).dtype == torch.bfloat16
            assert torch.softmax(X.bfloat16(), 1).dtype == torch.float32
            assert (X.bfloat16() + X).dtype == torch.float32

    casts = [read for name, read, _ in counted(step) if name == "_to_copy"]
    assert casts.count(w) == 1
    assert casts.count(x) == 4


def test_autocast_is_off_outside_of_it():
    with meta_autocast(None):
        assert conv2d(X, W).dtype == torch.float32
    with meta_autocast(torch.float16):
        pass
    assert conv2d(X, W).dtype == torch.float32
