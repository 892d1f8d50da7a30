"""How near each method's features stay to the whole model's, layer by layer, and why: tables 9 to 13 and figure 7.

    python -m benchmarks.vision.similarity --images FOLDER                            # the shipped Segmenter
    python -m benchmarks.vision.similarity --images FOLDER --model MODEL --locations 2 4 6 --keep 0.25

Any model folder or Hub name of a supported family, and any folder of images: labels are not needed. Similarity is the
mean cosine over patch tokens, reduced against plain. "At L" reconstructs at once what was clustered, before any layer
ran on it; the methods that reduce little by little have no such location. Pairs: of the plain model's token pairs by
their cosine at L, the share whose cosine is in the same interval at the output. Milliseconds by part wait for each.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import statistics
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ailurus_hf import ailurus_status
from ailurus_hf.evaluation import assignment_statistics, pair_preservation, reconstruction_similarity
from ailurus_hf.evaluation.folders import find_images
from ailurus_hf.evaluation.latency import PARTS, latency_split
from ailurus_hf.evaluation.loading import LoadedModel, load_model
from ailurus_hf.images import read_image
from ailurus_hf.vision.discovery import find_encoders

from ..harness import environment, markdown, save
from ..methods import METHODS, Amount, AppliedConfig, AppliedMethod, AppliedPeer, apply_method, parsed
from ..peers import act, algm, ctm, evit, expedite, tome
from .segmenter_quality import SHIPPED

# What to time beside ours: a peer's own steps (every peer's unmerging is timed).
STEPS = {
    "Expedite": [(expedite, "cluster", "cluster"), (expedite, "reconstruction", "unmerge")],
    "CTM": [(ctm, "dpc_knn", "cluster")],
    "ToMe": [(tome, "bipartite_matching", "cluster"), (tome, "merge_matched", "merge")],
    "ToMe, backbone": [(tome, "bipartite_matching", "cluster"), (tome, "merge_matched", "merge")],
    "EViT": [(evit, "cls_attention", "cluster")],
    "EViT, fused": [(evit, "cls_attention", "cluster")],
    "ALGM": [(algm, name, "cluster") for name in ("pair_cosines", "window_cosines", "merge_windows", "match_above")],
    "ACT": [(act, "hashes", "cluster"), (act, "groups", "cluster")],
}
SETTING = {"method": "method", "location": "L", "keep_ratio": "keep", "num_clusters": "M"}
STATISTICS = ("singletons", "unexplained", "similarity", "reach", "gap")


def hidden_states(loaded: LoadedModel, inputs: dict[str, Tensor]) -> list[Tensor]:
    """After the embeddings and after every layer, all N tokens."""
    with torch.inference_mode():
        return list(loaded.model(**inputs, output_hidden_states=True).hidden_states)


def similarity_at_location(reduction: AppliedMethod, tokens: Tensor) -> float | None:
    """Mean cosine of the tokens at L, Tensor[B, N, C], and the same tokens unmerged at once; None: it has no L."""
    if isinstance(reduction, AppliedConfig):
        clusters = ailurus_status(reduction.model).last_clusters
        if clusters is None:
            return 1.0
        rebuilt = clusters.unmerge(clusters.merge(tokens))
    else:
        assert isinstance(reduction, AppliedPeer)
        peer = reduction.applied.peers[0]
        if not isinstance(peer, expedite.Expedite | ctm.CTM):
            return None
        merged = peer.merge(tokens)
        rebuilt = tokens if peer.unmerge is None else peer.unmerge(merged)
    return F.cosine_similarity(tokens.float(), rebuilt.float(), dim=-1).mean().item()


def measure_one(
    loaded: LoadedModel,
    method: str,
    amount: Amount,
    inputs: list[dict[str, Tensor]],
    plain: list[list[Tensor]],
    repeats: int,
) -> dict[str, Any]:
    """The row of one method and setting."""
    prefix = find_encoders(loaded.model)[0].prefix
    runs = [lambda each=each: loaded.model(**each) for each in inputs]
    reduction = apply_method(loaded.model, method, amount, runs[:2])
    try:
        by_layer, at_location, assigned = [], [], defaultdict(list)
        sizes: Counter[int] = Counter()
        for each, before in zip(inputs, plain, strict=True):
            by_layer.append(reconstruction_similarity(before, hidden_states(loaded, each), prefix))
            tokens = before[amount.location][:, prefix:]
            at_location.append(similarity_at_location(reduction, tokens))
            if isinstance(reduction, AppliedConfig):
                status = ailurus_status(loaded.model)
                if status.last_clusters is not None and status.last_grid is not None:
                    found = assignment_statistics(status.last_clusters, tokens, status.last_grid)
                    sizes.update(found.sizes)
                    for name in STATISTICS:
                        assigned[name].append(getattr(found, name))
        timed = list(STEPS.get(parsed(method)[0], ()))
        if isinstance(reduction, AppliedPeer):
            timed += [(peer, "back", "unmerge") for peer in reduction.applied.peers]
        split = latency_split(loaded.model, runs[0], repeats, timed=timed)
        num_clusters = reduction.num_clusters()
    finally:
        reduction.undo()
    layers = [statistics.fmean(values) for values in zip(*by_layer, strict=True)]
    known = [value for value in at_location if value is not None]
    return {
        "method": method,
        "location": amount.location,
        "keep_ratio": amount.keep,
        "settings": reduction.settings,
        "num_clusters": num_clusters,
        "layers": layers,
        "last": layers[-1],
        "at_location": statistics.fmean(known) if known else None,
        "sizes": dict(sorted(sizes.items())),
        "assignment": {name: statistics.fmean(values) for name, values in assigned.items()},
        "ms": split,
    }


def measure(
    loaded: LoadedModel, paths: list[Path], methods: list[str], settings: list[Amount], repeats: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows by method and amount, and rows of pair preservation by location."""
    inputs = [loaded.prepare(read_image(path)) for path in paths]
    plain = [hidden_states(loaded, each) for each in tqdm(inputs, desc="plain")]
    prefix = find_encoders(loaded.model)[0].prefix
    pairs = []
    for location in sorted({amount.location for amount in settings}):
        counted = [pair_preservation(s[location][:, prefix:], s[-1][:, prefix:]) for s in plain]
        total = counted[0]
        for other in counted[1:]:
            total = total + other
        pairs.append({"location": location, **dataclasses.asdict(total), "probability": total.probability})
    jobs = [(method, amount) for amount in settings for method in methods]
    rows = [measure_one(loaded, m, s, inputs, plain, repeats) for m, s in tqdm(jobs, desc="methods")]
    return rows, pairs


def tables(rows: list[dict[str, Any]], pairs: list[dict[str, Any]]) -> str:
    """Everything as Markdown."""
    depth = len(rows[0]["layers"])
    first = min(row["location"] for row in rows) + 1
    flat = [
        {
            **row,
            **{f"layer {i}": row["layers"][i] for i in range(depth)},
            **row["assignment"],
        }
        for row in rows
    ]
    layers = {f"layer {i}": f"{i}|{{:.4f}}" for i in range(first, depth)}
    statistic = {name: f"{name}|{{:.3f}}" for name in STATISTICS}
    parts = {f"ms {part}": part for part in (*PARTS, "rest", "total")}
    for row, line in zip(rows, flat, strict=True):
        total = row["ms"]["total"]
        line |= {f"ms {part}": f"{ms:.2f} ms ({ms / total:.1%})" for part, ms in row["ms"].items()}
    ours = [row for row in flat if row["assignment"]]
    edges = [f"{low:.1f}-{high:.1f}" for low, high in pairs[0]["intervals"]]
    kept = [{"L": p["location"], **dict(zip(edges, p["probability"], strict=True))} for p in pairs]
    blocks = [
        "Similarity by layer:\n\n" + markdown(flat, {**SETTING, "at_location": "at L|{:.4f}", **layers}),
        "Pairs that stay in their interval:\n\n" + markdown(kept, {"L": "L", **{e: f"{e}|{{:.4f}}" for e in edges}}),
        "Latency:\n\n" + markdown(flat, {**SETTING, **parts}),
    ]
    if ours:
        blocks.append("Assignments:\n\n" + markdown(ours, {**SETTING, **statistic}))
    return "\n\n".join(blocks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", nargs="+", required=True, help="image files, or folders of them")
    parser.add_argument(
        "--model", default=str(SHIPPED), help="model folder or Hub name (default: the shipped Segmenter)"
    )
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help=", ".join(METHODS))
    parser.add_argument("--keep", nargs="+", type=float, default=[0.25])
    parser.add_argument("--locations", nargs="+", type=int, default=[2])
    parser.add_argument("--repeats", type=int, default=7, help="timed forwards")
    parser.add_argument("--limit", type=int, help="only so many images")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--name", default="similarity", help="of the result file")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    paths = find_images(args.images)[: args.limit]
    loaded = load_model(args.model, None, args.device, "float32", None)
    settings = [Amount(location, keep) for location in args.locations for keep in args.keep]
    rows, pairs = measure(loaded, paths, args.methods, settings, args.repeats)
    save(args.name, rows, {**environment(loaded.device, "fp32"), "images": len(paths), "pairs": pairs})
    print(tables(rows, pairs))


if __name__ == "__main__":
    main()
