"""Choose the bits of each site and linear of each block within a budget, where they reduce the divergence most.

1. Quantize all blocks once for every number of bits to choose from (`init_blocks`), with the same bits at all sites.
2. Measure the cost of every site and linear in each of these models (`bit_costs.py`).
3. For each bound, choose the bits with the least total cost (`knapsack.py`).

The choice has the form of `overrides`, which `init_quantizers` and everything after it follow. Overrides of the user
come after it and take precedence. A bound counts all sites of its groups, also those that overrides fix:

    weights       sum of entries · bits / sum of entries, over the linears of all blocks
    size_mib      bytes of the export's tensors / 2^20; all but the integers of the linears count as they are
    activations   sum of products · bits / sum of products; products are the multiplications that read the site
    kv_cache      sum of width · bits / sum of width, over keys and values
    time          sum of products · max(bits of weight, bits of input), relative to the same sum without a budget

Bits of weights are chosen first, because time depends on them. In a mixture of experts, the products of an expert count
with the share of tokens that it gets on average.
"""

import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch

from pipeline.blocks.walk import BlockRunner
from pipeline.models.architectures import SparseArchitecture
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.sites import CACHE_SITES, base_site
from pipeline.quantization.bit_costs import BlockCosts, Candidate, measure_costs
from pipeline.quantization.knapsack import Knapsack, Option
from pipeline.quantization.params import BUDGETED_GROUPS, OverrideParams, QuantizerInitParams, resolve_site
from pipeline.quantization.quantizer_init import embed_windows, init_blocks, measure_channels
from pipeline.quantization.statistics import choose_rank_windows
from pipeline.rotation.matrices import compute_rotated_prefix_kv
from pipeline.runtime.artifacts import Header, load_unfinished, save_tensors
from pipeline.runtime.errors import PipelineError
from pipeline.runtime.params import Bits
from pipeline.runtime.ranks import ALONE, Ranks

logger = logging.getLogger(__name__)

_COSTS = "costs-{rank:05d}.safetensors"
_POINTS = 33  # of a curve
_KEY = "quantizer_init.budget"


class BudgetError(PipelineError):
    """A bound of the budget cannot be met. The message names the smallest possible value."""


@dataclass(frozen=True)
class Choice:
    """The bits that were chosen.

    Attributes:
        params: the user's, with the chosen bits as the first overrides.
        report: see `describe_choice`; empty without a budget.
        metrics: for each bound: its value, and the estimated divergence in nats per token of its sites, "chosen" and
            with all at the fewest and the most bits.
    """

    params: QuantizerInitParams
    report: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class BlockSizes:
    """The sizes that budgets count in one block, by the names that params have for sites and linears.

    Attributes:
        entries: linear -> entries of its weight, of all experts together.
        products: linear -> multiplications of one token.
        readers: site -> the linears that read it.
        widths: key and value -> entries that a token adds to the cache.
    """

    entries: dict[str, int]
    products: dict[str, int]
    readers: dict[str, list[str]]
    widths: dict[str, int]


def choose_bits(
    checkpoint: Checkpoint,
    *,
    params: QuantizerInitParams,
    prefix_embeddings: torch.Tensor,
    token_ids: torch.Tensor,
    runner: BlockRunner,
    work_folder: Path,
    header: Header,
    ranks: Ranks = ALONE,
    text_start_token_id: int | None = None,
    other_bytes: int = 0,
) -> Choice:
    """Choose bits within `params.budget`. Without a bound, nothing is measured or chosen.

    Arguments are as for `init_quantizers`, which finds the measured channels in the same `work_folder`. `other_bytes`
    is the size of the export without the integers of the linears; only `size_mib` needs it.

    Raises:
        BudgetError: a bound cannot be met.
    """
    if not params.budget.bounds:
        return Choice(params)
    sizes = [measure_sizes(checkpoint, index) for index in range(checkpoint.block_count)]
    check_budget(params, sizes, other_bytes)
    work_folder.mkdir(parents=True, exist_ok=True)
    prefix_kv = compute_rotated_prefix_kv(checkpoint, prefix_embeddings, runner)
    hidden = embed_windows(checkpoint, token_ids, params=params, ranks=ranks, text_start_token_id=text_start_token_id)
    channels = measure_channels(
        checkpoint,
        hidden,
        prefix_kv,
        params=params,
        runner=runner,
        work_folder=work_folder,
        header=header,
        ranks=ranks,
    )
    path = work_folder / _COSTS.format(rank=ranks.rank)
    stored = load_unfinished(path, header)
    all_stored = torch.tensor(int(stored is not None))
    ranks.min_(all_stored)
    if not all_stored:
        candidates = []
        for bits in params.budget.choices:
            candidate = Candidate(set_bits(params, bits), work_folder / f"bits-{bits}")
            logger.info("all sites with a budget in %d bits", bits)
            init_blocks(
                checkpoint,
                hidden.clone(),
                prefix_kv,
                params=candidate.params,
                runner=runner,
                work_folder=candidate.folder,
                header=header,
                ranks=ranks,
                channels=channels,
            )
            candidates.append(candidate)
        windows = choose_rank_windows(ranks.count(len(hidden)), params.mse_samples, ranks)
        costs = measure_costs(
            checkpoint,
            hidden[windows],
            prefix_kv,
            candidates=candidates,
            channels=channels,
            runner=runner,
            numbers=[window * ranks.world + ranks.rank for window in windows],
            stage=header.stage,
            ranks=ranks,
        )
        stored = {
            f"{index}.{site}": torch.tensor(values, dtype=torch.float64)
            for index, block in enumerate(costs)
            for site, values in block.items()
        }
        save_tensors(path, stored, header)
    assert stored is not None, "a rank measures anew unless all ranks have stored costs"
    costs = [{} for _ in sizes]
    for name, values in stored.items():
        index, _, site = name.partition(".")
        costs[int(index)][site] = values.tolist()
    return spend_budget(params, sizes, costs, other_bytes)


def set_bits(params: QuantizerInitParams, bits: int) -> QuantizerInitParams:
    """Return params with `bits` in all groups with a bound. Overrides stay."""
    groups = {group for bound in params.budget.bounds for group in BUDGETED_GROUPS[bound]}
    changed = {group: getattr(params, group).model_copy(update={"bits": bits}) for group in groups}
    return params.model_copy(update=changed)


def measure_sizes(checkpoint: Checkpoint, index: int) -> BlockSizes:
    """Return the sizes of block `index` from its shapes; no weight is read."""
    block = checkpoint.build_block(index)
    architecture, config = checkpoint.architecture.of_block(block), checkpoint.config
    shapes = {name: block.get_parameter(f"{name}.weight").shape for name in architecture.linear_names.values()}
    entries: dict[str, int] = {}
    products: dict[str, int] = {}
    by_expert: dict[str, int] = {}  # products of all experts, of which a token uses some
    for short, name in architecture.linear_names.items():
        site, size = base_site(short), math.prod(shapes[name])
        entries[site] = entries.get(site, 0) + size
        counts = by_expert if architecture.experts and name.startswith(f"{architecture.experts}.") else products
        counts[site] = counts.get(site, 0) + size
    for site, size in by_expert.items():
        assert isinstance(architecture, SparseArchitecture), "only routed experts are counted apart"
        products[site] = products.get(site, 0) + size * config.num_experts_per_tok // architecture.expert_count
    readers: dict[str, list[str]] = {}
    short_names = {name: base_site(short) for short, name in architecture.linear_names.items()}
    for site, names in architecture.site_readers.items():
        known = readers.setdefault(base_site(site), [])
        known += [short for short in dict.fromkeys(short_names[name] for name in names) if short not in known]
    width = block.self_attn.head_dim * config.num_key_value_heads
    return BlockSizes(entries, products, readers, {str(site): width for site in CACHE_SITES})


def count_integers(checkpoint: Checkpoint, params: QuantizerInitParams) -> int:
    """Return the bytes of the packed weights of all linears, or of their 16-bit values where they are not quantized."""
    bits = 0
    for index in range(checkpoint.block_count):
        for linear, entries in measure_sizes(checkpoint, index).entries.items():
            bits += entries * resolve_site(params, linear, index).bits
    return bits // 8


@dataclass(frozen=True)
class _Item:
    """Sites or linears of one block that get the same bits, the bits to choose from, and their size for each.

    Sizes are in the unit of the bound. Linears that read the same input are one item, because engines fuse them.
    """

    sites: list[str]
    block: int
    bits: list[int]
    sizes: list[int]


def _list_items(
    params: QuantizerInitParams, bound: str, sizes: Sequence[BlockSizes], asked: QuantizerInitParams
) -> tuple[list[_Item], int]:
    """Return the items of a bound, and the size that its value 1 means. Time is relative to the time of `asked`.

    Sizes of `weights` and `size_mib` are in bits.
    """
    variants = [set_bits(params, bits) for bits in params.budget.choices]
    items, whole = [], 0
    for index, block in enumerate(sizes):
        for group in _list_groups(bound, block):
            by_bits: dict[tuple[int, ...], list[str]] = {}  # overrides may fix the bits of some
            for site in group:
                bits = tuple(dict.fromkeys(resolve_site(variant, site, index).bits for variant in variants))
                by_bits.setdefault(bits, []).append(site)
                measure = _measure_bits(asked, bound, site=site, index=index, block=block)
                whole += measure(resolve_site(asked, site, index).bits if bound == "time" else 1)
            for bits, sites in by_bits.items():
                measures = [_measure_bits(params, bound, site=site, index=index, block=block) for site in sites]
                total = [sum(measure(number) for measure in measures) for number in bits]
                items.append(_Item(sites, index, list(bits), total))
    return items, 8 * 2**20 if bound == "size_mib" else whole


def _list_groups(bound: str, block: BlockSizes) -> list[list[str]]:
    """Return the sites or linears of a block that a bound counts, those that are to get the same bits together."""
    if BUDGETED_GROUPS[bound] == ("weights",):
        return list(block.readers.values())
    return [[site] for site in (block.widths if bound == "kv_cache" else block.readers)]


def _measure_bits(
    params: QuantizerInitParams, bound: str, *, site: str, index: int, block: BlockSizes
) -> Callable[[int], int]:
    """Return the function from a site's bits to its size in the unit of a bound."""
    if BUDGETED_GROUPS[bound] == ("weights",):
        return lambda bits: block.entries[site] * bits
    if bound == "kv_cache":
        return lambda bits: block.widths[site] * bits
    readers = block.readers[site]
    if bound == "activations":
        return lambda bits: sum(block.products[reader] for reader in readers) * bits
    widths = {reader: resolve_site(params, reader, index).bits for reader in readers}
    return lambda bits: sum(block.products[reader] * max(bits, widths[reader]) for reader in readers)


@dataclass(frozen=True)
class _Solved:
    """The items of a bound and their knapsack. Its sizes are the bound's value times `whole`, minus `offset`."""

    items: list[_Item]
    knapsack: Knapsack
    whole: int
    offset: int

    def to_size(self, value: float) -> int:
        """Return a bound's value as a size; the margin covers the rounding of decimal fractions."""
        return math.floor(value * self.whole * (1 + 1e-12) + 1e-6) - self.offset

    def to_value(self, size: int) -> float:
        """Return a size as a value of the bound."""
        return (size + self.offset) / self.whole

    def draw_curve(self) -> list[dict[str, float]]:
        """Return points {"value", "nats"} of the least cost for values of the bound from the least to the largest."""
        knapsack, points = self.knapsack, []
        for number in range(_POINTS):
            size = knapsack.least + (knapsack.largest - knapsack.least) * number // (_POINTS - 1)
            points.append({"value": round(self.to_value(size), 4), "nats": round(knapsack.cost(size), 6)})
        return points


def _solve(
    params: QuantizerInitParams,
    bound: str,
    *,
    sizes: Sequence[BlockSizes],
    costs: Sequence[BlockCosts] | None,
    asked: QuantizerInitParams,
    other_bytes: int,
) -> _Solved:
    """Return the solved knapsack of a bound; without costs, all costs are 0.

    Raises:
        BudgetError: the bound is below the smallest possible value.
    """
    items, whole = _list_items(params, bound, sizes, asked)
    choices, options = params.budget.choices, []
    for item in items:
        # Bits that an override fixes cost the same in every candidate.
        sums = [0.0] * len(choices) if costs is None else _add_costs(item, costs)
        options.append([Option(size, cost) for size, cost in zip(item.sizes, sums[: len(item.sizes)], strict=True)])
    solved = _Solved(items, Knapsack(options), whole, 8 * other_bytes if bound == "size_mib" else 0)
    value = params.budget.bounds[bound]
    if solved.to_size(value) < solved.knapsack.least:
        least = math.ceil(solved.to_value(solved.knapsack.least) * 10**4) / 10**4
        raise BudgetError(
            f"{_KEY}.{bound}={value}: the smallest possible value is {least} with choices={choices} and these "
            "overrides. Use that or more, or add a smaller number to choices."
        )
    return solved


def _add_costs(item: _Item, costs: Sequence[BlockCosts]) -> list[float]:
    """Return the cost of an item's sites together, for each of `budget.choices`."""
    return [sum(values) for values in zip(*(costs[item.block][site] for site in item.sites), strict=True)]


def check_budget(params: QuantizerInitParams, sizes: Sequence[BlockSizes], other_bytes: int = 0) -> None:
    """Raise BudgetError, before any measurement, if a bound cannot be met whatever is chosen."""
    # Time depends on the weights that will be chosen, at best the narrowest.
    narrow = params
    if any(BUDGETED_GROUPS[bound] == ("weights",) for bound in params.budget.bounds):
        weights = params.weights.model_copy(update={"bits": min(params.budget.choices)})
        narrow = params.model_copy(update={"weights": weights})
    for bound in params.budget.bounds:
        _solve(narrow, bound, sizes=sizes, costs=None, asked=params, other_bytes=other_bytes)


def spend_budget(
    params: QuantizerInitParams, sizes: Sequence[BlockSizes], costs: Sequence[BlockCosts], other_bytes: int = 0
) -> Choice:
    """Choose the bits with the least cost within every bound.

    Args:
        sizes: sizes of each block.
        costs: costs of each block: site or linear -> nats per token for each of `budget.choices`.
        other_bytes: see `choose_bits`.

    Raises:
        BudgetError: a bound cannot be met.
    """
    chosen_params, report, metrics = params, {}, {}
    for bound in (name for name in BUDGETED_GROUPS if name in params.budget.bounds):  # weights come first
        solved = _solve(chosen_params, bound, sizes=sizes, costs=costs, asked=params, other_bytes=other_bytes)
        items, knapsack, size = solved.items, solved.knapsack, solved.to_size(params.budget.bounds[bound])
        pairs = list(zip(items, knapsack.choose(size), strict=True))
        chosen = {(site, item.block): item.bits[number] for item, number in pairs for site in item.sites}
        value = solved.to_value(sum(item.sizes[number] for item, number in pairs))
        overrides = _list_overrides(params, chosen)
        chosen_params = chosen_params.model_copy(update={"overrides": [*overrides, *chosen_params.overrides]})
        report[bound] = {
            "value": round(value, 4),
            "overrides": [override.model_dump(exclude_none=True) for override in overrides],
            "costs": [
                {"block": item.block, "sites": item.sites, "bits": item.bits, "nats": _add_costs(item, costs)}
                for item in items
                if len(item.bits) > 1
            ],
            "curve": solved.draw_curve(),
        }
        metrics[bound] = {
            "value": round(value, 4),
            "nats": {
                "chosen": round(knapsack.cost(size), 5),
                "fewest_bits": round(knapsack.cost(knapsack.least), 5),
                "most_bits": round(knapsack.cost(knapsack.largest), 5),
            },
        }
        logger.info("%s: %.4f, with these overrides: %s", bound, value, json.dumps(report[bound]["overrides"]))
    return Choice(chosen_params, report, {"bits": metrics})


def _list_overrides(params: QuantizerInitParams, chosen: dict[tuple[str, int], int]) -> list[OverrideParams]:
    """Return the overrides that give sites the chosen bits, where these differ from the settings."""
    blocks: dict[tuple[str, int], list[int]] = {}
    for (site, block), bits in chosen.items():
        if resolve_site(params, site, block).bits != bits:
            blocks.setdefault((site, bits), []).append(block)
    sites: dict[tuple[tuple[int, ...], int], list[str]] = {}
    for (site, bits), indices in blocks.items():
        sites.setdefault((tuple(indices), bits), []).append(site)
    return [
        OverrideParams(sites=names, blocks=[*indices], bits=cast(Bits, bits))
        for (indices, bits), names in sites.items()
    ]
