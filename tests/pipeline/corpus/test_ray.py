"""The same run on Ray Data, on a cluster of two nodes: the same bytes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import small

from qwen2.common.errors import UserError
from qwen2.pipeline.corpus import CorpusRecipe, Layout, run_corpus
from qwen2.pipeline.workers import Workers, open_workers

ray = pytest.importorskip("ray", reason="Ray is not installed (extra `ray`)")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster() -> Iterator[Workers]:
    """Two nodes of one CPU each."""
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    nodes.add_node(num_cpus=1)
    try:
        with pytest.MonkeyPatch.context() as patched:
            patched.setenv("RAY_ADDRESS", nodes.address)
            with open_workers(1, "ray") as workers:
                yield workers
    finally:
        ray.shutdown()
        nodes.shutdown()


def test_two_nodes_leave_the_same_bytes(
    cluster: Workers, sources: Path, layout: Layout, tmp_path: Path
) -> None:
    assert len([node for node in ray.nodes() if node["Alive"]]) == 2
    recipe = CorpusRecipe.parse(small.recipe_values(sources))
    run_corpus(recipe, tmp_path / "out", cluster)
    assert small.contents(tmp_path / "out") == small.contents(layout.folder)


def test_tasks_run_on_both_nodes_at_once(cluster: Workers, tmp_path: Path) -> None:
    """Each of two tasks waits for the other, and a node has one CPU."""

    def meet(number: int) -> str:
        (tmp_path / str(number)).touch()
        until = time.monotonic() + 60
        while not (tmp_path / str(1 - number)).exists():
            assert time.monotonic() < until, "the other task was not begun"
        return str(ray.get_runtime_context().get_node_id())

    assert len(set(cluster.map(meet, [0, 1]))) == 2


def test_what_a_task_says_to_the_user_arrives_as_it_is(cluster: Workers) -> None:
    def refuse(number: int) -> int:
        if number == 2:
            raise UserError("number 2: choose another")
        return number

    with pytest.raises(UserError, match=r"^number 2: choose another$"):
        list(cluster.map(refuse, [1, 2, 3]))
