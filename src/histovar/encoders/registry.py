"""Registry of image encoders by name, with licence and citation."""

from __future__ import annotations

from typing import Any

import pandas as pd

from histovar._arguments import Key, check_arguments

from ._checkpoints import conch_trunk, from_transformers
from .encoder import Encoder

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
OPTIMUS_MEAN, OPTIMUS_STD = (0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517)
SWIGLU = {"mlp_layer": "SwiGLUPacked", "act_layer": "silu"}
NON_COMMERCIAL = "CC-BY-NC-ND-4.0"


def _vit(name: str, architecture: str, hub: str, depth: int, token_width: int, **fields: Any) -> Encoder:
    """Describe a vision transformer, using the blocks at one half and three quarters of its depth.

    For DINOv2 ViT-S/14 these are blocks 5 and 8 of 12. On her2st's patient C (tuned ridge, leave one section out) they
    gave a Pearson correlation of 0.381, the last block 0.328; for SqueezeNet, too, the middle was better than the end
    (0.377 and 0.346).
    """
    return Encoder(
        name=name,
        architecture=architecture,
        hub=hub,
        token_width=token_width,
        layers=(depth // 2 - 1, depth * 3 // 4 - 1),
        pooling="mean_std",
        **fields,
    )


ENCODERS = {
    encoder.name: encoder
    for encoder in (
        _vit(
            "dinov2_vits14",
            "vit_small_patch14_dinov2",
            "timm/vit_small_patch14_dinov2.lvd142m",
            depth=12,
            token_width=384,
            options={"dynamic_img_size": True},
            licence="Apache-2.0",
            citation="arXiv:2304.07193",
        ),
        _vit(
            "uni",
            "vit_large_patch16_224",
            "MahmoodLab/UNI",
            depth=24,
            token_width=1024,
            options={"init_values": 1e-5, "dynamic_img_size": True},
            licence=NON_COMMERCIAL,
            gated=True,
            citation="doi:10.1038/s41591-024-02857-3",
        ),
        _vit(
            "uni2_h",
            "vit_giant_patch14_224",
            "MahmoodLab/UNI2-h",
            depth=24,
            token_width=1536,
            options={
                **SWIGLU,
                "depth": 24,
                "num_heads": 24,
                "embed_dim": 1536,
                "mlp_ratio": 2.66667 * 2,
                "init_values": 1e-5,
                "no_embed_class": True,
                "reg_tokens": 8,
                "dynamic_img_size": True,
            },
            licence=NON_COMMERCIAL,
            gated=True,
            citation="doi:10.1038/s41591-024-02857-3",
        ),
        _vit(
            "virchow2",
            "vit_huge_patch14_224",
            "paige-ai/Virchow2",
            depth=32,
            token_width=1280,
            options={**SWIGLU, "init_values": 1e-5, "mlp_ratio": 5.3375, "reg_tokens": 4, "dynamic_img_size": True},
            licence=NON_COMMERCIAL,
            gated=True,
            citation="arXiv:2408.00738",
        ),
        *(
            _vit(
                f"h_optimus_{version}",
                "vit_giant_patch14_reg4_dinov2",
                f"bioptimus/H-optimus-{version}",
                depth=40,
                token_width=1536,
                options={"img_size": 224, "init_values": 1e-5, "dynamic_img_size": False},
                mean=OPTIMUS_MEAN,
                std=OPTIMUS_STD,
                licence=licence,
                gated=gated,
                citation=f"https://huggingface.co/bioptimus/H-optimus-{version}",
            )
            for version, licence, gated in ((0, "Apache-2.0", False), (1, NON_COMMERCIAL, True))
        ),
        _vit(
            "conch",
            "vit_base_patch16_224",
            "MahmoodLab/conch",
            depth=12,
            token_width=768,
            input_px=448,
            options={"img_size": 448, "dynamic_img_size": True},
            mean=CLIP_MEAN,
            std=CLIP_STD,
            licence=NON_COMMERCIAL,
            gated=True,
            citation="doi:10.1038/s41591-024-02856-4",
            convert=conch_trunk,
        ),
        _vit(
            "phikon_v2",
            "vit_large_patch16_224",
            "owkin/phikon-v2",
            depth=24,
            token_width=1024,
            options={"init_values": 1.0, "dynamic_img_size": True},
            licence="Owkin non-commercial",
            citation="arXiv:2409.09173",
            convert=from_transformers,
        ),
        _vit(
            "gigapath",
            "vit_giant_patch14_dinov2",
            "prov-gigapath/prov-gigapath",
            depth=40,
            token_width=1536,
            options={"img_size": 224, "patch_size": 16, "init_values": 1e-5, "mlp_ratio": 5.33334},
            licence="Apache-2.0, with conditions of use",
            gated=True,
            citation="doi:10.1038/s41586-024-07441-w",
        ),
    )
}


@check_arguments
def get(name: Key) -> Encoder:
    """Get an encoder by name, to inspect or modify it: ``hv.encoders.get("uni").replace(layers=(23,))``.

    Parameters
    ----------
    name
        A name that :func:`describe` lists.

    Raises
    ------
    KeyError
        If there is no encoder of this name.
    """
    if name not in ENCODERS:
        raise KeyError(f"name: no encoder {name!r}; known are {sorted(ENCODERS)}, and you can use any torch.nn.Module")
    return ENCODERS[name]


@check_arguments
def describe() -> pd.DataFrame:
    """List the encoders that are known by name, with licence, width, layers and citation.

    Returns
    -------
    DataFrame
        One row per encoder: repository of the weights, input size in pixels, layers, pooling, width of an embedding,
        licence, whether it is gated, and citation.
    """
    columns = ("hub", "input_px", "layers", "pooling", "width", "licence", "gated", "citation")
    rows = [{column: getattr(encoder, column) for column in columns} for encoder in ENCODERS.values()]
    return pd.DataFrame(rows, index=pd.Index(ENCODERS, name="encoder"))
