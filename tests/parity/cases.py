"""All cases. A new family is a file of cases and a line here."""

from tests.parity import (
    clip,
    dino,
    dit,
    inception,
    language,
    mae,
    mllama,
    mmdit,
    native,
    queries,
    siglip,
    swin,
    timm,
    unmask,
    vae,
    video,
    vit,
    vlm,
    vlm_kinds,
)
from tests.parity.case import Case

CASES: dict[str, Case] = {
    case.name: case
    for case in (
        *vit.CASES,
        *clip.CASES,
        *siglip.CASES,
        *dino.CASES,
        *mae.CASES,
        *swin.CASES,
        *video.CASES,
        *timm.CASES,
        *inception.CASES,
        *language.CASES,
        *vlm.CASES,
        *native.CASES,
        *vlm_kinds.CASES,
        *queries.CASES,
        *mllama.CASES,
        *dit.CASES,
        *mmdit.CASES,
        *vae.CASES,
        *unmask.CASES,
    )
}
