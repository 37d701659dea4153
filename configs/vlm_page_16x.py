"""configs/vlm_page.py with 16 letters of text for each token of the image.

Data: the same pages. Model and recipe: the same, but that 8 patches become one token and not 2.
Expected: after 6.1 CPU minutes 92.1 % of the letters right after true ones, and a CER of
28.9 %. Command:
    python -m train configs/vlm_page_16x.py
    python -m evaluate configs/vlm_page_16x.py --checkpoint runs/vlm_page_16x
"""

from configs.vlm_page import page
from jaxformer.experiment import Experiment


def experiment() -> Experiment:
    """About three minutes on two CPU cores."""
    return page(16)
