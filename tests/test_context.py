"""fusedres.context: two threads that overlap neither see nor end each other's choices; backward passes resume them."""

import dataclasses
import threading
from contextlib import nullcontext

import pytest
import torch

import fusedres
from fusedres import context as context_module
from fusedres.autograd.function import fused_or_composed
from fusedres.autograd.saved import keep, pack
from fusedres.compiler.targets import TARGETS
from fusedres.context import NOTHING_CHOSEN, Context, accounts, context, here, on_all_threads, resume, snapshot
from fusedres.patterns.choose import announce, listening
from fusedres.plan import conv_tiles, decisions, pointwise_tiles, tiles
from fusedres.plan.gpus import GPUS, assume_gpu, assumed_gpu
from fusedres.runtime import autocast, backends, graphs, launch, ranges, replay
from fusedres.runtime.launch import record, target_of
from fusedres.runtime.ranges import profile
from tests.interruptions import Injection, moments
from tests.small_kernels import copy_kernel

META = torch.empty(2, 4, device="meta")


class Follower:
    """Notes the names of kernels that it is told of."""

    def __init__(self):
        self.told = 0

    def apart(self):
        return nullcontext()

    def launched(self, start, arguments, *, on_gpu):
        self.told += 1


def on_thread(run):
    """``run()`` on another thread, which has chosen nothing."""
    results = []
    thread = threading.Thread(target=lambda: results.append(run()))
    thread.start()
    thread.join(60)
    return results[0]


def overlap(first, second, observe, observe_second=None):
    """What two threads observe: the first inside its block and after; the second before that, after it, and outside."""
    seen = {"first": [], "second": []}
    steps = threading.Barrier(2, timeout=60)

    def earlier():
        with first:
            steps.wait()
            steps.wait()  # the second is inside too
            seen["first"].append(observe())
            steps.wait()
        steps.wait()
        seen["first"].append(observe())
        steps.wait()

    def later():
        look = observe_second or observe
        steps.wait()
        with second:
            steps.wait()
            seen["second"].append(look())
            steps.wait()
            steps.wait()  # the first is out
            seen["second"].append(look())
            steps.wait()
        seen["second"].append(look())

    threads = [threading.Thread(target=run) for run in (earlier, later)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return seen["first"], seen["second"]


WIDE, NARROW = conv_tiles.ConvTile(128, 128, 64, 8, 3), conv_tiles.ConvTile(64, 64, 64, 4, 2)
FEW, MANY = (pointwise_tiles.PointwiseTile(64, 64, 64, 8, 2, parts) for parts in (1, 9))
ONE, TWO = decisions.Decisions(), decisions.Decisions()
CHOICES = {
    "backend": (lambda: fusedres.backend("native"), lambda: fusedres.backend("reference"), backends.current,
                "native", "reference", "auto"),
    "gpu": (lambda: assume_gpu(GPUS["a100"]), lambda: assume_gpu(GPUS["l4"]), assumed_gpu,
            GPUS["a100"], GPUS["l4"], None),
    "meta_dtype": (lambda: autocast.on_meta(torch.float16), lambda: autocast.on_meta(torch.bfloat16),
                   lambda: autocast.contraction_dtype(META), torch.float16, torch.bfloat16, torch.float32),
    "row_tile": (lambda: tiles.pinned(tiles.RowTile(1, 8)), lambda: tiles.pinned(tiles.RowTile(2, 8)),
                 lambda: tiles.row_tile(1024, 64, 2), tiles.RowTile(1, 8), tiles.RowTile(2, 8),
                 tiles.row_tiles(1024, 64, 2)[0]),
    "conv_tile": (lambda: conv_tiles.pinned(WIDE), lambda: conv_tiles.pinned(NARROW), lambda: here().conv_tile,
                  WIDE, NARROW, None),
    "pointwise_tile": (lambda: pointwise_tiles.pinned(FEW), lambda: pointwise_tiles.pinned(MANY),
                       lambda: here().pointwise_tile, FEW, MANY, None),
    "place": (lambda: tiles.listed(1), lambda: tiles.listed(2), lambda: tiles.chosen("abcd", str, 0), "b", "c", "a"),
    "dry_target": (lambda: record("sm_80"), lambda: record("sm_100"), lambda: target_of(META),
                   TARGETS["sm_80"], TARGETS["sm_100"], TARGETS["sm_90"]),
    "account": (lambda: context(account="one"), lambda: context(account="two"), lambda: here().account,
                "one", "two", None),
    "decisions": (lambda: decisions.entered(ONE), lambda: decisions.entered(TWO), decisions.in_force, ONE, TWO, None),
    "plan": (lambda: context(plan="one"), lambda: context(plan="two"), lambda: here().plan, "one", "two", None),
    "online": (lambda: context(online="one"), lambda: context(online="two"), lambda: here().online, "one", "two", None),
    "profiled": (profile, nullcontext, ranges.wanted, True, False, False),
    "absent": (lambda: context(absent=True), nullcontext, lambda: here().absent, True, False, False),
    "replays": (replay.off, nullcontext, replay._possible, False, True, True),
    "graphed": (lambda: context(graphed=True), lambda: context(graphed=False), graphs.is_compiled_now, True, False,
                False),
}  # fmt: skip
TOLD = ("follower", "listeners", "witness", "gathered")


def test_every_field_is_tested():
    assert {field.name for field in dataclasses.fields(Context)} == {*CHOICES, *TOLD}


@pytest.mark.parametrize("field", CHOICES)
def test_a_choice_is_of_one_thread_and_ends_with_its_own_block(field):
    first, second, observe, one, two, default = CHOICES[field]
    # A dry run may be of launches that another thread keeps account of.
    other = TARGETS["sm_100"] if field == "dry_target" else default
    assert overlap(first(), second(), observe) == ([one, other], [two, two, default])
    assert observe() == default


def test_whoever_listens_hears_of_one_threads_choices_alone():
    heard = [], []
    first, second = (listening(one.append) for one in heard)
    overlap(first, second, lambda: announce("first"), lambda: announce("second"))
    assert heard == (["first"], ["second", "second"])


def test_whoever_follows_is_told_of_one_threads_launches_alone(monkeypatch):
    monkeypatch.setattr(launch, "_execute", lambda *_: None)
    followers = Follower(), Follower()
    seen = overlap(*map(launch.follow, followers), *(lambda one=one: started(one) for one in followers))
    assert seen == ([1, 1], [1, 2, 2])


def started(follower):
    """What a follower was told by the time that one more kernel was launched on this thread."""
    x, y = torch.ones(2, 4), torch.empty(2, 4)
    arguments = {"x_ptr": x, "y_ptr": y, "rows": 2, "columns": 4, "BLOCK_ROWS": 2, "BLOCK_COLUMNS": 4}
    launch.launch(copy_kernel, (1,), arguments, reads=("x_ptr",), writes=("y_ptr",))
    return follower.told


def test_accounts_are_of_all_threads_and_each_ends_with_its_own_block():
    before, after = overlap(on_all_threads("one"), on_all_threads("two"), accounts)
    assert before == [("one", "two"), ("two",)]
    assert after == [("one", "two"), ("two",), ()]


def test_choices_nest_and_are_restored_by_an_error():
    with context(backend="native", place=1):
        with pytest.raises(KeyError), context(place=2):
            assert (here().backend, here().place) == ("native", 2)
            raise KeyError
        assert (here().backend, here().place) == ("native", 1)
    assert here() is NOTHING_CHOSEN


def test_an_unknown_field_is_refused():
    with pytest.raises(TypeError, match="bakend"), context(bakend="native"):
        pass
    assert here() is NOTHING_CHOSEN


def resumed(forward, **chosen):
    """What a backward pass sees where its thread has chosen this."""
    with context(**chosen) if chosen else nullcontext(), resume(forward):
        return here()


def test_another_thread_that_chose_nothing_resumes_all_of_a_forward_pass_but_who_follows_it():
    with context(backend="native", place=3, replays=False, follower=Follower()):
        forward, inside = snapshot(), here()
    seen = on_thread(lambda: resumed(forward))
    assert seen.follower is None
    assert dataclasses.replace(inside, follower=None).__dict__ == seen.__dict__
    seen = on_thread(lambda: resumed(forward, backend="reference", place=1))
    assert (seen.backend, seen.place, seen.replays) == ("native", 1, True)


def test_the_same_thread_resumes_the_backend_alone():
    with context(backend="native", place=3):
        forward = snapshot()
    assert (resumed(forward).backend, resumed(forward).place) == ("native", None)
    seen = resumed(forward, backend="reference", place=1)
    assert (seen.backend, seen.place) == ("native", 1)


class Seen(torch.autograd.Function):
    """x, noting what its backward pass goes by."""

    backwards: list[Context] = []  # noqa: RUF012 (of this one test)

    @staticmethod
    def forward(ctx, x):
        ctx.context = snapshot()
        keep(ctx, pack((x,)), x)
        return x.clone()

    @staticmethod
    @fused_or_composed
    def backward(ctx, dz):
        Seen.backwards.append(here())
        return dz


def test_a_functions_backward_goes_by_its_forwards_context_on_a_thread_of_its_own():
    x = torch.ones(3, requires_grad=True)
    with context(backend="reference", conv_tile=WIDE):
        z = Seen.apply(x)
    on_thread(lambda: z.sum().backward())
    (seen,) = Seen.backwards
    assert (seen.backend, seen.conv_tile) == ("reference", WIDE)


def nested():
    with backends.backend("native"), context(profiled="outer"), context(replays=False), context(absent=True):
        return here()


def test_an_interrupt_at_any_moment_leaves_no_choice_behind():
    with backends.backend("reference"):
        outside = here()
        for at in range(1, 1 + moments(KeyboardInterrupt, nested)):
            with pytest.raises(KeyboardInterrupt), Injection(KeyboardInterrupt, at) as injection:
                nested()
            # As with torch.no_grad, a block that is interrupted as its exit begins is left to the one around it.
            if "context.py" not in injection.where or "__exit__" not in injection.where:
                assert here() is outside, injection.where
            context_module._thread.context = outside
    assert here() is NOTHING_CHOSEN


def test_a_choice_made_by_a_decorator_is_made_at_each_call():
    @backends.backend("native")
    def named(depth):
        return [backends.current(), *(named(depth - 1) if depth else ())]

    assert named(2) == ["native"] * 3
    assert here() is NOTHING_CHOSEN
