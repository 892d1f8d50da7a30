"""What `ailurus_status` says of diffusion networks: a row per stack of blocks, or per processor set by hand."""

from __future__ import annotations

from typing import Any

from ..status import LocationStatus, Record, Status
from .backend import modules_of
from .flops import TEXT_TOKENS, projection_flops
from .networks import parts_left_whole
from .processor import AiluRusProcessor, OwnClusters
from .reducer import NetworkReducer, reducers_of
from .saved import saved_fields
from .stacks import Stack, self_attentions


def status(target: Any) -> Status:
    """What is on in `target`, and what its last forward did."""
    name, found = type(target).__name__, reducers_of(target)
    if not found:
        return _status_of_processors(target)
    locations = [
        _location(path, reducer, number, stack)
        for path, reducer in found
        for number, stack in enumerate(reducer.stacks)
    ]
    for part, module in parts_left_whole(target):
        restored = f"left whole: {type(module).__name__} is not supported"
        locations.append(LocationStatus(part, 0, restored, None, None, 0, 0, None, None))
    records = [
        record for _, reducer in found for record in reducer.records.values() if record.last_clusters is not None
    ]
    last = max(records, key=lambda record: record.last_tokens or 0, default=None)
    return Status(
        name,
        found[0][1].config.to_dict(),
        locations,
        None if last is None else last.last_clusters,
        None if last is None else last.last_grid,
    )


def _location(path: str, reducer: NetworkReducer, number: int, stack: Stack) -> LocationStatus:
    record, config = reducer.records[stack.name], reducer.config
    level = reducer.last_levels.get(stack.name)
    scope = config.scope if level is None else config.scope_at(level)
    if stack.name in reducer.left_whole:
        restored = reducer.left_whole[stack.name]
    elif set(reducer.without_processor()) & set(self_attentions([stack])):
        restored = "processor lost"
    elif scope == "attention":
        restored = "after self-attention (copy)"
    else:
        around = config.projections == "merged" and stack.on_maps
        steps = "" if config.full_every is None else f", all tokens in 1 of {config.full_every} steps"
        restored = f"{'around the stack' if around else 'after the last block'} (residual{steps})"
    if reducer.runs_in_some_steps(stack):
        restored += f", in 1 of {config.inner_every} steps"
    whole, reduced = _flops(reducer, stack, scope == "attention", level)
    where = ".".join(filter(None, (path, stack.name))) or type(reducer.network).__name__
    return record.location_status(where, number, restored, whole, reduced)


def _flops(
    reducer: NetworkReducer, stack: Stack, attention_alone: bool, level: int | None
) -> tuple[float, float] | tuple[None, None]:
    """FLOPs of a stack on one image in the last forward, without and with reduction; None before the first.

    Where forwards differ by their step, or layers of one stack by their block, of all of them in the mean.
    """
    record = reducer.records[stack.name]
    if record.last_tokens is None or record.last_clusters_count is None:
        return None, None
    sizes, config = {(record.last_tokens, record.last_clusters_count): 1}, reducer.config
    if config.builds_on_steps or config.step_factors is not None or config.block_factors is not None:
        sizes = dict(record.sizes)
    whole = reduced = 0.0
    for (tokens, clusters), times in sizes.items():
        of_whole, of_reduced, _ = _flops_of(reducer, stack, attention_alone, level, tokens, clusters)
        whole += times * of_whole
        reduced += times * of_reduced
    if config.full_every is not None:
        # Blocks that ran on representatives beside those on all tokens.
        for (tokens, clusters), times in record.again.items():
            reduced += times * _flops_of(reducer, stack, attention_alone, level, tokens, clusters)[2]
    forwards = sum(sizes.values())
    return whole / forwards, reduced / forwards


def _flops_of(
    reducer: NetworkReducer, stack: Stack, attention_alone: bool, level: int | None, tokens: int, clusters: int
) -> tuple[float, float, float]:
    """FLOPs of a stack with so many tokens and clusters: without and with reduction, and of what runs on clusters."""
    record, config, flops = reducer.records[stack.name], reducer.config, reducer.declared.flops
    text = TEXT_TOKENS if reducer.text_tokens is None else reducer.text_tokens
    others = tokens if attention_alone else clusters
    queries = config.queries_for(tokens, level, clusters) if attention_alone and level else clusters
    projected = clusters if not attention_alone and config.projections == "merged" else tokens
    full = [flops(block, tokens, tokens, tokens, record.attended, text) for block in stack.blocks]
    before, after = (projection_flops(stack, num_tokens) for num_tokens in (tokens, projected))
    if not clusters and reducer.runs_in_some_steps(stack):
        # Its projections do not run either.
        return sum(full) + before, 0.0, 0.0
    first = reducer.first_reduced(stack)
    # In a step in which nothing runs, not text either.
    ran = stack.blocks[first:] if clusters else []
    reduced = [flops(block, queries, clusters, others, record.attended, text) for block in ran]
    merged_maps = after if projected == clusters else 0.0
    return sum(full) + before, sum(full[:first]) + sum(reduced) + after, sum(reduced) + merged_maps


def _status_of_processors(target: Any) -> Status:
    """Processors that `set_attn_processor` put there, a row for each layer of self-attention."""
    layers: list[tuple[str, Any]] = [
        (".".join(filter(None, (part, path))), module)
        for part, root in modules_of(target)
        for path, module in root.named_modules()
        if isinstance(getattr(module, "processor", None), AiluRusProcessor)
        and not getattr(module, "is_cross_attention", False)
    ]
    records = [_record(layer) for _, layer in layers]
    restored = "after self-attention (copy)"
    last = max(records, key=lambda record: record.last_tokens or 0, default=None)
    return Status(
        type(target).__name__,
        layers[0][1].processor.config.to_dict() if layers else None,
        [
            record.location_status(path, number, restored, None, None)
            for number, ((path, _), record) in enumerate(zip(layers, records, strict=True))
        ],
        None if last is None else last.last_clusters,
        None if last is None else last.last_grid,
        not layers and any(saved_fields(module) is not None for _, module in modules_of(target)),
    )


def _record(layer: Any) -> Record:
    source = layer.processor.source
    return (source.records.get(layer) if isinstance(source, OwnClusters) else None) or Record()
