"""The binaries that a model's first step launches on a GPU that need not be here, and those that tuning would try."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from fusedres.compiler.binary import Binary
from fusedres.explain.step import check_images
from fusedres.models.sources import Source
from fusedres.nn.ahead import launches_of
from fusedres.patterns.choose import EAGER, candidates_for, gone_through
from fusedres.plan.decisions import TILE, WAY, Decisions, Seen, Site, entered, seen, written
from fusedres.plan.gpus import Gpu
from fusedres.runtime.launch import Launch
from fusedres.swap import fuse
from fusedres.swap.report import why_not_fused
from fusedres.traffic.meta_autocast import meta_autocast
from fusedres.traffic.predict import on_paper
from fusedres.tuning.blocks import Block, blocks_of

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Paper:
    """A fused model on the meta device, and what it is given.

    Args:
        model: by name, of images.
        gpu: that it is to run on.
        batch: images of a step.
        px: their height and width; the model's own if not given.
        dtype: of `DTYPES`; 16 bits by autocast.
        infer: whether it is for inference alone.

    Raises:
        ValueError: the model takes no such images, or nothing of it is fused.
    """

    def __init__(self, model: Source, gpu: Gpu, batch: int, px: int | None, dtype: str, *, infer: bool = False) -> None:
        channels, height, width = model.of_images().size
        size = (channels, px or height, px or width)
        self.gpu, self.dtype = gpu, DTYPES[dtype]
        self.images = torch.empty(batch, *size, device="meta").contiguous(memory_format=torch.channels_last)
        self.network: nn.Module = model.on_meta()
        check_images(self.network, self.images, infer=infer)
        fuse(self.network)
        why = why_not_fused(self.network)
        if why is not None:
            raise ValueError(f"model: {model.name}: {why}")

    @property
    def autocast(self) -> torch.dtype | None:
        return self.dtype if self.dtype.itemsize == 2 else None

    def binaries(self, *, infer: bool, tune: bool = False) -> dict[Binary, None]:
        """What a pass launches on what ``"auto"`` chooses: inference, or training with its backward pass.

        ``tune``: and every rung of each block, with every tile and way that tuning would try.
        """
        self.network.train(not infer)
        with torch.set_grad_enabled(not infer):
            # The first pass makes what later ones find.
            every = [launches_of(self.network, self.images, self.gpu, autocast=self.autocast) for _ in range(2)]
            found = {launch.binary: None for launches in every for launch in launches}
            for run in self._candidates() if tune else ():
                found.update(dict.fromkeys(_with_every_option(run, self.gpu)))
        for parameter in self.network.parameters():
            parameter.grad = None
        return found

    def _candidates(self) -> Iterator[Callable[[], object]]:
        """Each rung of each kind of block."""

        def forward() -> None:
            with meta_autocast(self.autocast):
                self.network(self.images)

        blocks: list[Block] = []
        on_paper(lambda: blocks.extend(blocks_of(self.network, forward)), self.gpu)
        for block in blocks:
            pattern, call = block.gathered.pattern, block.gathered.call
            for rung in candidates_for(block.gathered.training).values():
                if rung is not EAGER:
                    yield lambda pattern=pattern, rung=rung, call=call: gone_through(pattern, rung, call, [])  # type: ignore[misc]


def _with_every_option(run: Callable[[], object], gpu: Gpu) -> Iterator[Binary]:
    """What ``run`` launches with each option of every site that it consults.

    Tiles are tried for all sites at once. Each way is tried by itself, for it may hide the sites of another, and so
    often that every tile of what it alone runs has had its turn.
    """
    waiting: list[dict[Site, Any]] = [{}]
    known: set[tuple[Site, Any]] = set()
    untried: dict[Site, list[Any]] = {}  # of tiles
    while waiting:
        ways = waiting.pop()
        while True:
            tiles = {site: options[0] for site, options in untried.items() if options}
            consulted: list[Seen] = []
            launches = _decided(run, gpu, {**ways, **tiles}, consulted)
            yield from (launch.binary for launch in launches)
            fresh = False
            for site, options in ((one.site, one.options) for one in consulted):
                if site.kind == TILE and site not in untried:
                    untried[site] = list(options[1:])
                    fresh = fresh or bool(untried[site])
                elif site.kind == TILE and tiles.get(site) is not None and untried[site][:1] == [tiles[site]]:
                    untried[site].pop(0)
                    fresh = True
                elif site.kind == WAY:
                    others = [one for one in options if (site, one) not in known and one != ways.get(site, options[0])]
                    known.update((site, one) for one in options)
                    waiting.extend({**ways, site: one} for one in others)
            if not fresh:
                break


def _decided(run: Callable[[], object], gpu: Gpu, choices: dict[Site, Any], consulted: list[Seen]) -> list[Launch]:
    """What ``run`` launches where these choices were made; the sites that it asks are added to ``consulted``."""
    decisions = Decisions(exact=True)
    for site, choice in choices.items():
        decisions.put(site, written(choice))

    def watched() -> None:
        with seen() as sites:
            try:
                run()
            finally:
                consulted.extend(sites)

    with entered(decisions):
        return [one for one in on_paper(watched, gpu) if isinstance(one, Launch)]
