"""Masked diffusion on text8, 27 characters: for who has the file.

Data: text8 (Mahoney 2006), 100 million letters and spaces, split 90, 5 and 5 million as it is
usual, as ids under data/: space is 0, a is 1. From the file, with NumPy:
    python -c "import numpy as np; x = np.fromfile('text8', np.uint8); x = np.uint16((x > 32) \
* (x - 96.0)); [np.save(f'data/{n}.npy', x[a:b]) for n, a, b in (('train', 0, 90_000_000), \
('test', 95_000_000, 100_000_000))]"
Model: the size of MDLM and MD4 (arXiv 2406.07524, 2406.04329), 12 layers of 768, rows of 256
characters, 512 a step, with MD4's rate and decay; it is not told the time.
Expected: not run here. Published, bits a character after a million steps: 1.23 by an
autoregressive model, and bounds of 1.40 (MDLM) and 1.37 (MD4). Command:
    python -m train configs/mdlm_text8.py
    python -m evaluate configs/mdlm_text8.py --checkpoint runs/mdlm_text8
"""

from evaluate.likelihood import Likelihood
from jaxformer.data.loader import Pipeline
from jaxformer.data.rows import Rows
from jaxformer.data.tokens import Shards
from jaxformer.experiment import Experiment, Keep
from jaxformer.models.decoder import Decoder, flops
from jaxformer.objectives.unmask import Unmask
from jaxformer.optim import AdamW, Cosine

LENGTH, MASK = 256, 27


def experiment() -> Experiment:
    """For eight accelerators; the loss is in nats, of which one is 1.4427 bits."""
    train, test = (Shards(f"data/{split}.npy", MASK) for split in ("train", "test"))
    return Experiment(
        model=Decoder(
            vocab=MASK + 1,
            width=768,
            depth=12,
            mlp_dim=2048,
            num_heads=12,
            causal=False,
            dropout=0.05,
            dtype="bfloat16",
        ),
        objective=Unmask(MASK),
        optimizer=AdamW(rate=Cosine(peak=5e-4, warmup=0.0025), b2=0.95, decay=0.03),
        data=Pipeline(Rows(train, LENGTH), workers=4),
        evals={"test": Pipeline(Rows(test, LENGTH, most=1024))},
        tasks={"held_out": Likelihood(Pipeline(Rows(test, LENGTH)), Unmask(MASK, samples=8))},
        steps=1_000_000,
        batch_size=512,
        eval_every=5000,
        eval_batch_size=512,
        keep=Keep(every=5000, metric="-test/loss"),
        flops=flops,
        ema=0.9999,
    )
