"""Writes schedulers.json: what diffusers makes of a model that is known. Run where it is.

python -m tests.samplers.record_schedulers
"""

import json
import pathlib

FILE = pathlib.Path(__file__).with_name("schedulers.json")
X = [-1.5, -0.2, 0.4, 2.0]


def noise_of(x, t):
    """A model of noise, of numbers and a time in thousandths."""
    return 0.6 * x + 0.1 * t / 1000


def record() -> dict:
    """Tables of DDPM's chains, and what DDIM and DDPM's means make of `X`."""
    import torch
    from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

    found = {}
    for name, betas in (("linear", "linear"), ("cosine", "squaredcos_cap_v2")):
        scheduler = DDPMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule=betas)
        found[name] = scheduler.alphas_cumprod[[0, 1, 500, 998]].tolist()
    for eta, kind in ((0.0, "epsilon"), (0.0, "v_prediction"), (0.0, "sample")):
        scheduler = DDIMScheduler(
            beta_start=1e-4, beta_end=0.02, clip_sample=False, prediction_type=kind
        )
        scheduler.set_timesteps(20)
        x = torch.tensor([X], dtype=torch.float64)
        for t in scheduler.timesteps:
            x = scheduler.step(noise_of(x, int(t)), t, x, eta=eta).prev_sample
        found[f"ddim {kind}"] = x[0].tolist()
    scheduler = DDPMScheduler(beta_start=1e-4, beta_end=0.02, clip_sample=False)
    scheduler.set_timesteps(1000)
    x, t = torch.tensor([X], dtype=torch.float64), torch.tensor(0)
    found["ddpm last step"] = scheduler.step(noise_of(x, 0), t, x).prev_sample[0].tolist()
    found["ddpm variance"] = [float(scheduler._get_variance(i)) for i in (1, 500, 999)]
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[1 - i / 8 for i in range(8)])
    x = torch.tensor([X])
    for t in scheduler.timesteps:
        x = scheduler.step(noise_of(x, float(t)), t, x).prev_sample
    found["flow euler shift 3"] = x[0].tolist()
    return found


if __name__ == "__main__":
    FILE.write_text(json.dumps(record(), indent=1) + "\n")
