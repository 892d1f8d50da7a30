"""Installation: one `apply_ailurus` on a pipeline or network, remembered on its networks so that it can be undone."""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

from torch import nn

from ..clustering import ClusterFunction, get_clustering
from ..config import AiluRusDiffusionConfig
from ..errors import AiluRusError
from ..status import LocationStatus, Status
from .backend import (
    JOINT_TRANSFORMERS,
    Stack,
    WanTransformer3DModel,
    block_flops,
    find_networks,
    find_stacks,
    modules_of,
    projection_flops,
    self_attentions,
)
from .joint import JointReducer
from .processor import AiluRusProcessor
from .reducer import NetworkReducer
from .stacks import StackHooks
from .wan import WanReducer

# The attribute on a network that holds its reducer; gone again after `uninstall`.
ATTRIBUTE = "_ailurus_reducer"


def install(target: Any, config: AiluRusDiffusionConfig, clustering: ClusterFunction | None = None) -> None:
    """Reduces every supported network in `target`; replaces what was on. On an error all is as it was before.

    clustering: another way to cluster than the config's, to compare with.
    """
    pipeline = None if isinstance(target, nn.Module) else weakref.ref(target)
    if config.unreduced_last_steps and pipeline is None:
        raise AiluRusError(
            f"unreduced_last_steps={config.unreduced_last_steps} needs a pipeline, which knows how many steps there "
            f"are: apply it to the pipeline, got {type(target).__name__}"
        )
    cluster = partial(get_clustering(clustering or config.clustering), check_finite=config.check_finite)
    reducers = []
    for network in find_networks(target):
        kind = NetworkReducer
        if isinstance(network, JOINT_TRANSFORMERS):
            kind = JointReducer
        elif isinstance(network, WanTransformer3DModel):
            kind = WanReducer
        reducers.append(kind(network, config, find_stacks(network), cluster, pipeline))
    uninstall(target)
    for reducer in reducers:
        reducer.install()
        if not isinstance(reducer, JointReducer):
            _install_stacks(reducer, config)
        setattr(reducer.network, ATTRIBUTE, reducer)


def _install_stacks(reducer: NetworkReducer, config: AiluRusDiffusionConfig) -> None:
    for stack in reducer.stacks:
        StackHooks(reducer, stack).install()
    if config.has_scope("attention"):
        fields = {name: value for name, value in config.to_dict().items() if name in AiluRusProcessor.FIELDS}
        reducer.set_processor(
            AiluRusProcessor(**fields, assign=reducer.assign_current, merges_queries=reducer.merges_queries)
        )


def uninstall(target: Any) -> None:
    """Takes every reduction off `target` and its parts; nothing to do is no error."""
    for _, reducer in reducers_of(target):
        reducer.remove()
        delattr(reducer.network, ATTRIBUTE)


def reducers_of(target: Any) -> list[tuple[str, NetworkReducer]]:
    """The reducers on `target` and its parts with their paths, each once."""
    found = {
        id(vars(module)[ATTRIBUTE]): (".".join(filter(None, (part, path))), vars(module)[ATTRIBUTE])
        for part, root in modules_of(target)
        for path, module in root.named_modules()
        if ATTRIBUTE in vars(module)
    }
    return list(found.values())


def status(target: Any) -> Status:
    """What is on in `target`, and what its last forward did."""
    name, found = type(target).__name__, reducers_of(target)
    if not found:
        return _status_of_processors(target)
    locations = [
        _place(path, reducer, number, stack) for path, reducer in found for number, stack in enumerate(reducer.stacks)
    ]
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


def _place(path: str, reducer: NetworkReducer, number: int, stack: Stack) -> LocationStatus:
    record, config = reducer.records[stack.name], reducer.config
    level = reducer.last_levels.get(stack.name)
    scope = config.scope if level is None else config.scope_at(level)
    if scope == "attention":
        restored = "after self-attention (copy)"
    else:
        around = config.projections == "merged" and stack.on_maps
        restored = f"{'around the stack' if around else 'after the last block'} (residual)"
    if (scope == "attention" or isinstance(reducer, JointReducer)) and set(reducer.without_processor()) & set(
        self_attentions([stack])
    ):
        restored = "processor lost"
    full = reduced = None
    if isinstance(reducer, JointReducer):
        full, reduced = reducer.flops()
    elif record.last_tokens is not None and record.last_clusters_count is not None:
        tokens, clusters = record.last_tokens, record.last_clusters_count
        others = tokens if scope == "attention" else clusters
        queries = tokens if scope == "attention" and level and not config.merges_queries(level) else clusters
        projected = clusters if scope == "blocks" and config.projections == "merged" else tokens
        whole = [block_flops(block, tokens, tokens, tokens, record.attended) for block in stack.blocks]
        first = reducer.first_reduced(stack)
        full = sum(whole) + projection_flops(stack, tokens)
        reduced = sum(whole[:first]) + projection_flops(stack, projected)
        reduced += sum(block_flops(block, queries, clusters, others, record.attended) for block in stack.blocks[first:])
    where = ".".join(filter(None, (path, stack.name))) or type(reducer.network).__name__
    return record.location_status(where, number, restored, full, reduced)


def _status_of_processors(target: Any) -> Status:
    """Processors that `set_attn_processor` put there; they keep no records."""
    on = [
        (".".join(filter(None, (part, path))), module.processor)
        for part, root in modules_of(target)
        for path, module in root.named_modules()
        if isinstance(getattr(module, "processor", None), AiluRusProcessor) and not module.is_cross_attention
    ]
    config = on[0][1].config.to_dict() if on else None
    restored = "after self-attention (copy)"
    locations = [LocationStatus(path, n, restored, None, None, 0, 0, None, None) for n, (path, _) in enumerate(on)]
    return Status(type(target).__name__, config, locations)
