"""Asking the demo's questions and printing each answer with its route."""

from __future__ import annotations

import time
from typing import Any, Literal

from shardkit.cli.output import Output
from shardkit.cluster import Cluster
from shardkit.demo.questions import Question, questions
from shardkit.session import sessionmaker


def ask_all(cluster: Cluster, out: Output, *, read_from: Literal["master", "replica"]) -> list[dict[str, Any]]:
    """Ask every question in a session of its own and print the answers.

    :returns: question, route and answer rows, for ``--json``.
    """
    factory = sessionmaker(cluster, read_from=read_from)
    documents = []
    for question in questions():
        started = time.perf_counter()
        with factory() as session:
            rows = [question.show(row) for row in session.execute(question.statement)]
        took = (time.perf_counter() - started) * 1000
        route = _route(cluster, question, read_from)
        out.line()
        out.line(question.text, style="bold")
        for row in rows:
            out.line(f"    {row}")
        out.line(f"    {route}, {took:.0f} ms", style="dim")
        documents.append({"question": question.text, "answer": rows, "route": route, "milliseconds": round(took, 1)})
    return documents


def _route(cluster: Cluster, question: Question, read_from: str) -> str:
    route = cluster.explain(question.statement)
    merged = ", merged" if route.merge is not None else ""
    reasons = "; ".join(route.reasons)
    return f"{read_from} of {' and '.join(route.shards)}{merged}: {reasons}"
