"""A decoder's training, prefill and decoding, beside torch, in turns in one process.

Both are the same Llama by numbers, float32, greedy; torch's is transformers'
`LlamaForCausalLM` with its own cache and `generate`, on as many threads as there are cores
(`--threads` for another number). Without them, ours is timed alone. A decoding's time is
that of `--steps` tokens less that of one. Speculative decoding by lookup is timed beside
plain decoding, and continuous batching beside batches that wait for their longest, on a
skewed mix of lengths. All tokens are random.

The rate of a training step is that of `models.decoder.flops`, 2 a multiply-add of the products
of matrices that the model asks for, half of attention's by its causal mask; 3 times that of the
forward pass, whatever a side computes. MFU is that rate by `--peak`, or on a CPU by the fastest
product of two matrices, of either side. `--clock cpu` is as in `evaluate.speed vit`.
"""

import argparse
import functools
import os
import statistics
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from evaluate.speed.vit import CLOCKS, device_peak
from jaxformer import steps as training
from jaxformer.layers import cache as caches
from jaxformer.layers.cache import Stepper
from jaxformer.models.decoder import Decoder, flops
from jaxformer.optim import AdamW, Constant
from jaxformer.samplers import autoregressive, batching, draft, speculative
from jaxformer.samplers.logits import GREEDY

MODEL = Decoder(
    vocab=4096, width=256, depth=6, mlp_dim=704, num_heads=8, num_kv_heads=4, tied=False
)
AHEAD, MANY = 4, 24  # Guesses a round; requests of the mix.


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--batch", type=int, help="rows, default 8")
    parser.add_argument("--prompt", type=int, help="tokens of a prompt, default 128")
    parser.add_argument("--steps", type=int, help="tokens drawn, default 64")
    parser.add_argument("--threads", type=int, help="torch's; default: one a core")
    parser.add_argument("--peak", type=float, help="TFLOP/s of the device, for MFU")
    parser.add_argument("--clock", choices=CLOCKS, help="default: wall")


def run(
    rounds: int = 5,
    batch: int = 8,
    prompt: int = 128,
    steps: int = 64,
    threads: int | None = None,
    peak: float | None = None,
    clock: str = "wall",
) -> dict:
    """Times everything; prints and returns a row a side."""
    top, of_device = device_peak(peak, "float32", clock)
    tokens = jax.random.randint(jax.random.key(1), (batch, prompt), 0, MODEL.vocab)
    params = nn.unbox(jax.jit(MODEL.init)(jax.random.key(0), tokens))["params"]
    sides: dict[str, dict[str, Callable[[], Any]]] = {
        "train": {"ours": trained(params, tokens)},
        "prefill": {"ours": written(params, tokens, 1)},
        "decode": {"ours": written(params, tokens, steps)},
    }
    for name, theirs in torchs(tokens, steps, threads).items():
        sides[name]["torch"] = theirs
    sides["speculative"] = {
        "plain": sides["decode"]["ours"],
        "lookup": guessed(params, tokens, steps),
    }
    sides["batching"] = {
        "static": waited(params, batch, steps),
        "continuous": served(params, batch, steps),
    }
    seconds = {name: timed(each, rounds, CLOCKS[clock]) for name, each in sides.items()}
    less_first(seconds)
    found = sides["speculative"]["lookup"]()
    rate = float(found.accepted.sum() / (AHEAD * found.rounds.sum()))
    work = {
        "train": batch * prompt,
        "prefill": batch * prompt,
        "decode": batch * (steps - 1),
        "speculative": batch * steps,
        "batching": sum(lengths(steps)),
    }
    operations, rows = 3 * batch * flops(MODEL, (prompt,)), []
    for name, each in seconds.items():
        counted = operations if name == "train" else None
        for row in told(name, each, work[name], counted, top):
            rows.append(row | ({"accepted": rate} if row["side"] == "lookup" else {}))
            shown(rows[-1])
    sizes = {"batch": batch, "prompt": prompt, "steps": steps, "model": repr(MODEL)}
    sizes |= {"clock": clock, "operations_of_a_step": operations}
    return {"rounds": rounds, **sizes, **of_device, "threads": threads, "rows": rows}


def told(
    name: str,
    each: dict[str, list[float]],
    work: int,
    operations: int | None,
    top: float | None,
) -> list[dict[str, Any]]:
    """A row for each side, of the seconds that it took in every round.

    `work` are the tokens of a round, `operations` those of it where its rate is told, `top`
    the operations a second that MFU is of.
    """
    last, rows = list(each)[-1], []
    for side, times in each.items():
        median = statistics.median(times)
        row: dict[str, Any] = {"what": name, "side": side, "median_ms": 1e3 * median}
        row["min_ms"] = 1e3 * min(times)
        row["tokens_per_second"] = work / median
        if operations is not None:
            row["gflops"] = operations / median / 1e9
            row["mfu"] = None if top is None else operations / median / top
        if side != last:
            pairs = zip(times, each[last], strict=True)
            row[f"ratio_to_{last}"] = statistics.median(a / b for a, b in pairs)
        rows.append(row)
    return rows


def shown(row: dict[str, Any]) -> None:
    """Prints a row's numbers."""
    numbers = [f"{k} {v:.4g}" for k, v in row.items() if isinstance(v, float)]
    print(f"{row['what']:<12} {row['side']:<11}", "  ".join(numbers))


def less_first(seconds: dict[str, dict[str, list[float]]]) -> None:
    """Of "decode", what it takes after the prompt: less the same round's "prefill"."""
    for side, first in seconds["prefill"].items():
        seconds["decode"][side] = [
            max(whole - one, 1e-9)
            for whole, one in zip(seconds["decode"][side], first, strict=True)
        ]


def timed(
    sides: dict[str, Callable[[], Any]], rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of each side, in turns, after a first time that is not counted."""
    for once in sides.values():
        once()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, once in sides.items():
            start = clock()
            once()
            seconds[name].append(clock() - start)
    return seconds


def trained(params, tokens) -> Callable[[], Any]:
    """One training step: forward, loss of the next token, backward, AdamW."""

    def loss_fn(params, batch, key):
        logits = MODEL.apply({"params": params}, batch)
        assert isinstance(logits, jax.Array)
        each = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], batch[:, 1:])
        return each.mean(), {}

    boxed = jax.eval_shape(MODEL.init, jax.random.key(0), tokens)["params"]
    tx = AdamW(Constant(1e-3), clip=None).make(nn.get_partition_spec(boxed), 100)
    state = [training.init_state(jax.tree.map(jnp.copy, params), tx)]
    take = functools.partial(training.train_step, loss_fn=loss_fn, tx=tx)
    step = jax.jit(take, donate_argnums=0)

    def once():
        state[0], metrics = step(state[0], tokens, jax.random.key(0))
        return jax.block_until_ready((state[0], metrics))

    return once


def written(params, tokens, steps: int) -> Callable[[], Any]:
    """Greedy text after prompts, by one program."""
    B, T = tokens.shape

    @jax.jit
    def go(params, tokens, counts):
        variables = {"params": params}
        cache = caches.empty(MODEL, variables, B, T + steps)
        return autoregressive.sample(
            Stepper(MODEL, variables), cache, tokens, counts, jax.random.key(0), steps=steps,
            room=T + steps, law=GREEDY,
        )  # fmt: skip

    return lambda: jax.block_until_ready(go(params, tokens, jnp.full(B, T)))


def guessed(params, tokens, steps: int) -> Callable[[], Any]:
    """The same text with guesses by lookup."""
    B, T = tokens.shape

    @jax.jit
    def go(params, tokens, counts):
        variables = {"params": params}
        cache = caches.empty(MODEL, variables, B, T + steps)
        return speculative.sample(
            Stepper(MODEL, variables), cache, draft.by_lookup(ahead=AHEAD), tokens, counts,
            jax.random.key(0), steps=steps, room=T + steps, law=GREEDY,
        )  # fmt: skip

    return lambda: jax.block_until_ready(go(params, tokens, jnp.full(B, T)))


def lengths(steps: int) -> list[int]:
    """How many tokens each request of the mix asks for: few ask for many."""
    return [steps if i % 6 == 0 else max(steps // 8, 1) for i in range(MANY)]


def requests(steps: int, prompt: int = 16) -> list[batching.Request]:
    """The mix."""
    rng, key = np.random.default_rng(0), jax.random.key(0)
    prompts = rng.integers(0, MODEL.vocab, (MANY, prompt))
    return [batching.Request(p, n, key) for p, n in zip(prompts, lengths(steps), strict=True)]


def waited(params, rows: int, steps: int) -> Callable[[], Any]:
    """The mix by batches as they come, each until its longest is done."""
    asked = requests(steps)
    parts = [asked[i : i + rows] for i in range(0, MANY, rows)]
    batches = [
        (jnp.asarray([r.tokens for r in part]), max(r.steps for r in part)) for part in parts
    ]
    each = [written(params, tokens, longest) for tokens, longest in batches]
    return lambda: [once() for once in each]


def served(params, rows: int, steps: int) -> Callable[[], Any]:
    """The mix by continuous batching."""
    asked, variables = requests(steps), {"params": params}
    room = 16 + steps
    blank = caches.empty(MODEL, variables, rows, room)

    def once():
        cache = jax.tree.map(jnp.copy, blank)  # It is given away.
        return list(batching.serve(
            Stepper(MODEL, variables), cache, asked, take=caches.take, put=caches.put,
            rows=rows, steps=steps, room=room, law=GREEDY, chunk=16, burst=max(steps // 8, 1),
        ))  # fmt: skip

    return once


def torchs(tokens, steps: int, threads: int | None) -> dict[str, Callable[[], Any]]:
    """The same by transformers, or nothing where it or torch is not installed."""
    try:
        import torch  # pyright: ignore[reportMissingImports]
        from transformers import (  # pyright: ignore[reportMissingImports]
            LlamaConfig,
            LlamaForCausalLM,
        )
    except ImportError:
        return {}
    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
    config = LlamaConfig(
        vocab_size=MODEL.vocab,
        hidden_size=MODEL.width,
        num_hidden_layers=MODEL.depth,
        intermediate_size=MODEL.mlp_dim,
        num_attention_heads=MODEL.num_heads,
        num_key_value_heads=MODEL.num_kv_heads,
        eos_token_id=None,
    )
    model: Any = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.1)
    ids = torch.from_numpy(np.array(tokens)).long()

    def train():
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()

    def write(count: int):
        with torch.inference_mode():
            options = {"max_new_tokens": count, "min_new_tokens": count, "pad_token_id": 0}
            mask = torch.ones_like(ids)
            return model.generate(ids, attention_mask=mask, do_sample=False, **options)

    return {
        "train": train,
        "prefill": lambda: write(1),
        "decode": lambda: write(steps),
    }
