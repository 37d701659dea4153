"""timm's InceptionV3 with all widths by 32, by timm itself."""

import importlib
import json
import pathlib
from typing import Any

from tests.parity.case import Case, wrong
from tests.parity.timm import _library

DIVIDE = 32


def narrow(classes: int = 5, divide: int = DIVIDE):
    """Timm's model with widths divided, and random statistics."""
    timm, _ = _library()
    import torch

    theirs: Any = importlib.import_module("timm.models.inception_v3")
    kept = theirs.ConvNormAct

    def small(fan_in, fan_out, **fields):
        fan_in = fan_in if fan_in == 3 else fan_in // divide
        return kept(fan_in, fan_out // divide, **fields)

    theirs.ConvNormAct = small
    try:
        model = timm.create_model("inception_v3", num_classes=classes)
    finally:
        theirs.ConvNormAct = kept
    model.fc = torch.nn.Linear(2048 // divide, classes)
    torch.manual_seed(6)
    for name, x in sorted(model.named_buffers()):
        if name.endswith("running_mean"):
            x.normal_(std=0.3)
        elif name.endswith("running_var"):
            x.uniform_(0.3, 1.0)
    return model


def _original():
    import safetensors.torch
    import torch

    class Module(torch.nn.Module):
        """With the face of a model of transformers."""

        def __init__(self):
            super().__init__()
            self.model = narrow()

        def forward(self, images):
            found = self.model.forward_features(images)
            pooled = self.model.forward_head(found, pre_logits=True)
            return {"features": pooled, "logits": self.model.forward_head(found)}

        def save_pretrained(self, directory):
            path = pathlib.Path(directory)
            path.mkdir(parents=True, exist_ok=True)
            told = {
                "architecture": "inception_v3",
                "num_classes": 5,
                "num_features": 2048 // DIVIDE,
                "pretrained_cfg": {"input_size": [3, 299, 299], "num_classes": 5},
                "width_divisor": DIVIDE,
            }
            (path / "config.json").write_text(json.dumps(told, indent=2) + "\n")
            tensors = self.model.state_dict()
            kept = {k: v for k, v in tensors.items() if "num_batches" not in k}
            safetensors.torch.save_file(kept, path / "model.safetensors", {"format": "pt"})

        @classmethod
        def from_pretrained(cls, directory, output_loading_info):
            del output_loading_info
            found, path = cls(), pathlib.Path(directory) / "model.safetensors"
            told = found.model.load_state_dict(safetensors.torch.load_file(path), strict=False)
            left = [k for k in told.missing_keys if "num_batches" not in k]
            return found, {"missing": left, "unexpected": told.unexpected_keys}

    return Module()


CASES = (
    Case(
        "inception_v3",
        _original,
        lambda draw: {"images": draw.normal(size=(2, 75, 88, 3)).astype("float32")},
        lambda module, inputs: module(inputs["images"].permute(0, 3, 1, 2)),
        lambda model, variables, inputs: {
            "features": model.apply(variables, inputs["images"], method="features"),
            "logits": model.apply(variables, inputs["images"]),
        },
        {
            "pools of the original FID": wrong("fid", True),
            "epsilon": wrong("epsilon", 1e-5),
        },
        scales={"conv.weight": 1.2},
        gradients=False,
        slow=True,
    ),
)
