"""A decoder of 7 billion parameters on a pod, of your own token shards.

Data: shards under data/train and data/test as `python -m train.tokenizer write` makes them,
32,000 ids at most, and where their documents end beside them.
Model: Llama 2 7B (arXiv 2307.09288), 6,738,415,616 parameters, with its recipe: 4 million
tokens a step, AdamW with b2 0.95, 2,000 steps of warm-up, decay to a tenth; and the z-loss
of PaLM (arXiv 2204.02311). Parameters and optimizer lie over all chips by `fsdp`.
Expected: not run here. It is 9.0e22 operations, 22 days of 256 TPU v5p at 40 % of their
459 Tflop/s. A plan of memory and time before a run is `python -m train.plan`. Command:
    python -m train configs/decoder_7b.py --mesh data=4,fsdp=64
    python -m evaluate configs/decoder_7b.py --checkpoint runs/decoder_7b --mesh data=4,fsdp=64
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

LENGTH = 4096


def experiment() -> Experiment:
    """For a pod; the mesh is given with the command."""
    train, test = (Shards((f"data/{split}/*.npy",), vocab=32000) for split in ("train", "test"))
    objective = NextToken(z_loss=1e-4, chunk=None)
    return Experiment(
        model=named("llama2-7b", dtype="bfloat16", remat="dots"),
        objective=objective,
        optimizer=AdamW(rate=Cosine(peak=3e-4, warmup=0.004, floor=3e-5), b2=0.95),
        data=Pipeline(Rows(train, LENGTH), workers=4),
        evals={"test": Pipeline(Rows(test, LENGTH, most=1024))},
        tasks={"held_out": Likelihood(Pipeline(Windows(test, LENGTH, 2048)), objective)},
        steps=500_000,
        batch_size=1024,
        eval_every=1000,
        eval_batch_size=256,
        keep=Keep(every=1000, metric="-test/loss"),
        flops=flops,
    )
