"""Every family, by the `model_type` of its config. A new family is a file and a line here."""

from jaxformer.convert import dinov2, dinov3, mae, vit
from jaxformer.convert.engine import Family

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        vit.VIT,
        vit.DEIT,
        mae.MAE,
        dinov2.DINOV2,
        dinov2.DINOV2_WITH_REGISTERS,
        dinov3.DINOV3,
    )
}
