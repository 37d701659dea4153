"""A masked-diffusion model of 8 billion parameters on a pod, of your own token shards.

Data: shards under data/train and data/test as `python -m train.tokenizer write` makes them,
126,336 ids at most, which leaves LLaDA's own id for the mask, and where documents end beside.
Model: LLaDA 8B (arXiv 2502.09992), 8,015,581,184 parameters, with its recipe: rows of 4,096
tokens, 1,280 a step, AdamW with decay 0.1, 2,000 steps of warm-up to 4e-4, held for half of
the run; here it then falls in one line to 1e-5, where LLaDA's falls in two.
Parameters and optimizer lie over all chips by `fsdp`.
Expected: not run here. LLaDA's 2.3 trillion tokens are 1.2e23 operations, 30 days of 256 TPU
v5p at 40 % of their 459 Tflop/s; a plan has 53 to 57 % with model.remat=dots (docs/pods.md).
Command:
    python -m train configs/llada_8b.py --mesh data=4,fsdp=64 model.remat=dots
    python -m evaluate configs/llada_8b.py --checkpoint runs/llada_8b --mesh data=4,fsdp=64
"""

from evaluate.likelihood import Likelihood
from jaxformer.data.loader import Pipeline
from jaxformer.data.rows import Rows, Windows
from jaxformer.data.tokens import Shards
from jaxformer.experiment import Experiment, Keep
from jaxformer.models.decoder import flops
from jaxformer.models.mdlm import MASK_IDS, named
from jaxformer.objectives.unmask import Unmask
from jaxformer.optim import WSD, AdamW

LENGTH = 4096


def experiment() -> Experiment:
    """For a pod; the mesh is given with the command."""
    mask = MASK_IDS["llada-8b"]
    train, test = (Shards((f"data/{split}/*.npy",), vocab=mask) for split in ("train", "test"))
    held_out = Pipeline(Windows(test, LENGTH, LENGTH // 2))
    return Experiment(
        model=named("llada-8b", dtype="bfloat16", remat="full"),
        objective=Unmask(mask),
        optimizer=AdamW(rate=WSD(peak=4e-4, warmup=2000, decay=0.5, floor=1e-5), b2=0.95),
        data=Pipeline(Rows(train, LENGTH), workers=4),
        evals={"test": Pipeline(Rows(test, LENGTH, most=1024))},
        tasks={"held_out": Likelihood(held_out, Unmask(mask, samples=4))},
        steps=438_000,
        batch_size=1280,
        eval_every=1000,
        eval_batch_size=256,
        keep=Keep(every=1000, metric="-test/loss"),
        flops=flops,
    )
