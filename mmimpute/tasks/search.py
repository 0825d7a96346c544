"""Retrieval among the people of a whole cohort: who of those with modality B may be the person with this modality A.

Plain functions; `cluster.retrieve` embeds the shards and calls them where the subject ids are.

Shape suffixes: N queries, M among which is searched, E members, L latent, C columns of a key.
"""

from importlib.util import find_spec

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from mmimpute.data.arrow import decode, flat
from mmimpute.data.split import position
from mmimpute.data.tensors import to_model
from mmimpute.errors import UserError
from mmimpute.registry import Model
from mmimpute.tasks.retrieval import LEAST_PAIRS, Link, ranks, recall

MOST_EXACT = 20_000  # among which every score is computed
MOST_RANKED = 2_000  # people whose rank tells the recall
TOGETHER = 1 << 24  # scores held at once
NEIGHBOURS, EFFORT = 32, 256  # of the index: links per node, candidates of a search


def embedded(model: Model, table: pa.Table, shard: str, query: int, among: int) -> pa.Table:
    """subject, place (hash of the id), and per modality whether it is held and the means of q(z0 | it alone) of all members, E x L.

    People who hold neither are left out. Raises DataError as `decode`.
    """
    x, ids = flat(decode(table, model.schema, shard)), table.column(model.schema.subject_id)
    columns = {"subject": ids.combine_chunks(), "place": pa.array(position(ids))}
    for name, j in (("a", query), ("b", among)):
        only, start = np.full_like(x, np.nan), sum(model.widths[:j])
        only[:, start : start + model.widths[j]] = x[:, start : start + model.widths[j]]
        latents_NL = _means(model, only)
        columns[f"has_{name}"] = pa.array(~np.isnan(only).all(1))
        columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(latents_NL.ravel()), latents_NL.shape[1])
    return pa.table(columns).filter(pc.field("has_a") | pc.field("has_b"))


def _means(model: Model, x: np.ndarray) -> np.ndarray:
    """N x E L."""
    vae = model.module.vae
    with torch.inference_mode():
        inputs = vae.inputs(*to_model(x, model.widths, model.module.device))
        return vae.inference(inputs.codes, inputs.shown_BK).mean.transpose(0, 1).flatten(1).cpu().numpy()


def retrieve(people: pa.Table, members: int, k: int) -> tuple[pa.Table, dict]:
    """For everyone who holds a the k likeliest of those who hold b: columns query, rank, found, score (log-likelihood ratio, nats).

    And counts: {queries, among, pairs, recall: see `retrieval.recall`}. What a and b have in common is learnt from half of the people
    who hold both, chosen by a hash of the id; recall is that of the others. Raises UserError: too few hold both, an index is missing.
    """
    has_a, has_b = (people.column(f"has_{name}").to_numpy() for name in "ab")
    pairs = np.flatnonzero(has_a & has_b)
    if len(pairs) < 2 * LEAST_PAIRS:
        raise UserError(f"fewer than {2 * LEAST_PAIRS} people hold both modalities: too few to learn what they have in common")
    taught = np.floor(people.column("place").to_numpy()[pairs] * 2**20) % 2 == 0
    a, b = (_matrix(people.column(name)) for name in "ab")
    links = [Link.fit(x, y) for x, y in zip(_members(a[pairs[taught]], members), _members(b[pairs[taught]], members), strict=True)]
    rows_a, rows_b = np.flatnonzero(has_a), np.flatnonzero(has_b)
    queries = np.concatenate([link.queries(x) / members for link, x in zip(links, _members(a[rows_a], members), strict=True)], 1)
    keys = np.concatenate([link.keys(x) for link, x in zip(links, _members(b[rows_b], members), strict=True)], 1)
    best, score = nearest(queries.astype(np.float32), keys.astype(np.float32), min(k, len(keys)))
    others = pairs[~taught][:MOST_RANKED]
    ranked = ranks(queries[np.searchsorted(rows_a, others)], keys, np.searchsorted(rows_b, others))
    told = recall(ranked, np.full(len(others), len(keys)))
    counts = {"queries": len(rows_a), "among": len(rows_b), "pairs": len(pairs), "recall": told}
    return _written(people.column("subject"), rows_a, rows_b[best], score), counts


def _matrix(column: pa.ChunkedArray) -> np.ndarray:
    lists = column.combine_chunks()
    return lists.flatten().to_numpy().reshape(len(lists), -1).astype(np.float64)


def _members(x_NC: np.ndarray, members: int) -> list[np.ndarray]:
    """Members do not share axes, so each has a link of its own."""
    return np.split(x_NC, members, 1)


def _written(subjects: pa.ChunkedArray, rows_N: np.ndarray, found_Nk: np.ndarray, score_Nk: np.ndarray) -> pa.Table:
    n, k = found_Nk.shape
    return pa.table(
        {
            "query": subjects.take(pa.array(np.repeat(rows_N, k))),
            "rank": pa.array(np.tile(np.arange(1, k + 1, dtype=np.int32), n)),
            "found": subjects.take(pa.array(found_Nk.ravel())),
            "score": pa.array(score_Nk.ravel()),
        }
    )


def nearest(queries_NC: np.ndarray, keys_MC: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k keys of largest inner product with each query, best first, and that; exact among MOST_EXACT keys, by an index among more.

    Raises UserError where the index is not installed.
    """
    found = _exact(queries_NC, keys_MC, k) if len(keys_MC) <= MOST_EXACT else _indexed(queries_NC, keys_MC, k)
    score = np.empty(found.shape, np.float32)
    for start in range(0, len(found), 1024):
        rows = slice(start, start + 1024)
        score[rows] = np.einsum("nc,nkc->nk", queries_NC[rows], keys_MC[found[rows]])
    order = np.argsort(-score, 1, kind="stable")
    return np.take_along_axis(found, order, 1), np.take_along_axis(score, order, 1)


def _exact(queries_NC: np.ndarray, keys_MC: np.ndarray, k: int) -> np.ndarray:
    size = max(1, TOGETHER // len(keys_MC))
    scores = (queries_NC[start : start + size] @ keys_MC.T for start in range(0, len(queries_NC), size))
    return np.concatenate([np.argpartition(-s, k - 1, 1)[:, :k] for s in scores])


def _indexed(queries_NC: np.ndarray, keys_MC: np.ndarray, k: int) -> np.ndarray:
    """A graph of nearest neighbours (HNSW, Malkov & Yashunin 2018).

    Keys get one column more, that makes them equally long: the largest inner product is then the smallest distance (Bachrach et
    al. 2014). Graphs of inner products themselves found nothing (recall 0.004 of 50,000 keys; 0.83 with the column).
    """
    if find_spec("faiss") is None:
        raise UserError(f"retrieval among more than {MOST_EXACT:,} people needs an index: pip install 'mmimpute[retrieval]'")
    import faiss

    length_M = (keys_MC**2).sum(1)
    index = faiss.IndexHNSWFlat(keys_MC.shape[1] + 1, NEIGHBOURS, faiss.METRIC_L2)
    index.hnsw.efSearch = max(EFFORT, 2 * k)
    index.add(np.c_[keys_MC, np.sqrt(length_M.max() - length_M)].astype(np.float32))
    return index.search(np.c_[queries_NC, np.zeros(len(queries_NC))].astype(np.float32), k)[1]
