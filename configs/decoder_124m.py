"""GPT-2 small on your own token shards.

Data: shards under data/train and data/test, GPT-2's tokens one after the other, each
document closed by token 50256: `.npy` as `python -m train.tokenizer write` makes them, or
those of llm.c and nanoGPT as `.bin`.
Model: GPT-2 (Radford et al. 2019), 124,439,808 parameters; AdamW as GPT-3's
(arXiv 2005.14165): 0.5 million tokens a step, 10 billion in all.
Expected: not run here. It is 8e18 operations; llm.c tells some 3.28 nats a token of
FineWeb's validation shard after 10 billion of its tokens with such a recipe. Command:
    python -m train configs/decoder_124m.py accumulate=8
    python -m evaluate configs/decoder_124m.py --checkpoint runs/decoder_124m
"""

from evaluate.likelihood import Likelihood
from jaxformer.data.loader import Pipeline
from jaxformer.data.rows import Rows, Windows
from jaxformer.data.tokens import Shards
from jaxformer.experiment import Experiment, Keep
from jaxformer.models.decoder import flops
from jaxformer.models.decoder_sizes import named
from jaxformer.objectives.next_token import NextToken
from jaxformer.optim import AdamW, Cosine

LENGTH, END = 1024, 50256


def experiment() -> Experiment:
    """For a machine with a few accelerators; `accumulate` fits it into the memory of one."""
    train, test = (
        Shards((f"data/{split}/*",), vocab=50257, end=END) for split in ("train", "test")
    )
    objective = NextToken()
    return Experiment(
        model=named("gpt2", dtype="bfloat16", remat="dots"),
        objective=objective,
        optimizer=AdamW(rate=Cosine(peak=6e-4, warmup=0.04, floor=6e-5), b2=0.95),
        data=Pipeline(Rows(train, LENGTH), workers=2),
        evals={"test": Pipeline(Rows(test, LENGTH, most=1024))},
        tasks={"held_out": Likelihood(Pipeline(Windows(test, LENGTH, 512)), objective)},
        steps=19_073,
        batch_size=512,
        eval_every=500,
        eval_batch_size=128,
        keep=Keep(every=500, metric="-test/loss"),
        flops=flops,
    )
