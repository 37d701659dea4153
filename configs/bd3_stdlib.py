"""Block diffusion on Python's standard library: mdlm_stdlib.py, 16 tokens at a time.

Data: the running Python's library without its tests, as in decoder_stdlib.py.
Model: the same decoder; each block of 16 tokens is guessed from itself, masked in part, and
from the clean blocks before it (BD3-LM, arXiv 2503.09573). Rows are twice as long for it.
Expected: not measured yet. Command:
    python -m train configs/bd3_stdlib.py
    python -m evaluate configs/bd3_stdlib.py --checkpoint runs/bd3_stdlib
"""

from configs.mdlm_stdlib import experiment as mdlm
from jaxformer.experiment import Experiment, override


def experiment() -> Experiment:
    """Masked diffusion's experiment, by blocks."""
    return override(mdlm(), "objective.block=16")
