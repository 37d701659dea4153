"""A decoder of 70 billion parameters on a pod, of your own token shards.

Data: shards under data/train and data/test as `python -m train.tokenizer write` makes them,
32,000 ids at most, and where their documents end beside them.
Model: Llama 2 70B (arXiv 2307.09288), 68,976,648,192 parameters, 8 key heads for 64 of
queries, with its recipe: 4 million tokens a step, peak 1.5e-4, AdamW with b2 0.95.
Expected: not run here; on 256 TPU v5p a plan has 26 s a step, 58 % (docs/pods.md). Command:
    python -m train.plan configs/decoder_70b.py --topology v5p:8x8x4 --mesh data=2,fsdp=128
    python -m train configs/decoder_70b.py --mesh data=2,fsdp=128
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
    objective = NextToken(z_loss=1e-4, chunk=2048)
    return Experiment(
        model=named("llama2-70b", dtype="bfloat16", remat="full"),
        objective=objective,
        optimizer=AdamW(rate=Cosine(peak=1.5e-4, warmup=0.004, floor=1.5e-5), b2=0.95),
        data=Pipeline(Rows(train, LENGTH), workers=4),
        evals={"test": Pipeline(Rows(test, LENGTH, most=1024))},
        tasks={"held_out": Likelihood(Pipeline(Windows(test, LENGTH, 2048)), objective)},
        steps=500_000,
        batch_size=1024,
        eval_every=1000,
        eval_batch_size=512,
        keep=Keep(every=1000, metric="-test/loss"),
        flops=flops,
    )
