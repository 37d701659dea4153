"""Another number of hosts in the middle of an epoch: the same records, the same losses."""

import collections
import contextlib
import json
import pathlib
from dataclasses import dataclass
from typing import Any

from jaxformer.data.loader import Pipeline, train_batches
from jaxformer.data.mixture import Mixture
from jaxformer.data.rows import Rows
from jaxformer.data.tokenizer import Bytes
from jaxformer.data.tokens import Tokenized
from train.faults.processes import ended, losses, started
from train.faults.row import Row, wrongs
from train.faults.signals import SMALL

HOSTS = (4, 2, 8)
LENGTH, BATCH, TIMES = 24, 16, (1, 2)


@dataclass(frozen=True)
class Numbered:
    """`count` documents of 5 to 36 letters, each of them another."""

    count: int
    letter: str

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        text = f"{index:04}" + self.letter * (1 + (index * 7) % 32)
        return {"text": text, "source": f"document {index}"}


def records_once() -> Row:
    """Two epochs of packed rows of a mixture, of which hosts come and go."""
    texts = (Numbered(150, "a"), Numbered(90, "b"))
    parts = [Rows(Tokenized(text, Bytes()), LENGTH) for text in texts]
    mixture = Mixture(tuple(parts), TIMES)
    steps = 2 * len(mixture) // BATCH  # Of whole batches.
    legs = (steps // 3, steps // 2, steps)
    alone, _ = _seen(mixture, 1, {"step": 0}, steps)
    seen, state = [], {"step": 0}
    for hosts, until in zip(HOSTS, legs, strict=True):
        rows, state = _seen(mixture, hosts, state, until)
        seen += rows
    counts = collections.Counter(seen[: len(mixture)])
    expected: collections.Counter[bytes] = collections.Counter()
    for part, times in zip(parts, TIMES, strict=True):
        for i in range(len(part)):
            expected[part[i]["tokens"].tobytes()] += times
    return Row(
        f"{' -> '.join(map(str, HOSTS))} hosts in an epoch of packed rows of a mixture",
        f"each of {len(expected)} rows as often as the mixture says, {len(mixture)} in all, "
        "and in the order of one host",
        wrongs(
            each_row_comes_once=counts == expected,
            the_order_is_that_of_one_host=seen == alone,
            hosts_change_within_an_epoch=legs[1] * BATCH < len(mixture),
        ),
        {"rows": len(expected), "in_an_epoch": len(mixture), "hosts": HOSTS},
    )


def _seen(
    mixture: Mixture, hosts: int, state: dict[str, int], until: int
) -> tuple[list[bytes], dict[str, int]]:
    """The rows from a state to before step `until`, in order, and the state that is saved."""
    with contextlib.ExitStack() as stack:
        iterators = []
        for i in range(hosts):
            data = train_batches(
                Pipeline(mixture),
                batch_size=BATCH,
                seed=3,
                process_index=i,
                process_count=hosts,
            )
            stack.enter_context(contextlib.closing(data))
            data.set_state(json.loads(json.dumps(state)))
            iterators.append(data)
        seen = []
        for _ in range(until - state["step"]):
            for data in iterators:
                seen += [row.tobytes() for row in next(data)["tokens"]]
        states = [data.get_state() for data in iterators]
    if any(other != states[0] for other in states):
        raise RuntimeError(f"the hosts are at {states}, and must be at one step")
    return seen, states[0]


def same_losses(folder: pathlib.Path, leg: int = 4) -> Row:
    """A run on 4, then 2, then 8 processes, beside one that is of one process all along."""
    moved, whole = folder / "moved", folder / "whole"
    # One rate throughout: that of a schedule would depend on where a leg ends.
    argv = (*SMALL, "keep.every=500", "optimizer.rate.warmup=0", "optimizer.rate.floor=0.02")
    steps = leg * len(HOSTS)
    for number, hosts in enumerate(HOSTS, start=1):
        mesh = f"mesh=data={hosts}"
        _run(moved, hosts, (*argv, mesh, f"steps={number * leg}"))
    _run(whole, 1, (*argv, "mesh=data=1", f"steps={steps}"))
    a, b = losses(moved), losses(whole)
    apart = max(abs(a[step] / b[step] - 1) for step in b)
    return Row(
        f"{' -> '.join(map(str, HOSTS))} processes in one run",
        f"losses of {steps} steps differ from those of one process by {apart:.1e} at most",
        wrongs(
            losses_are_equal_to_1e_5=apart <= 1e-5, every_step_is_taken=a.keys() == b.keys()
        ),
        {"apart": apart, "hosts": HOSTS, "steps": steps},
    )


def _run(workdir: pathlib.Path, hosts: int, argv: tuple[str, ...]) -> None:
    with started(workdir, hosts, *argv, devices=1) as processes:
        for status, out in ended(processes, 600):
            if status:
                raise RuntimeError(f"a process of {hosts} ended with status {status}: {out}")
