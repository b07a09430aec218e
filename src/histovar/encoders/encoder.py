"""Description of an image encoder: architecture, weights, normalisation, layers, pooling, licence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field

from histovar._arguments import Count, Key, Number, Positive, Real, TupleOf, checked, refuse_value

if TYPE_CHECKING:
    from torch import Tensor, nn
else:
    Tensor = nn = Any

Pooling = Literal["mean_std", "mean", "output"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def _module(value: Any) -> Any:
    from torch.nn import Module

    return value if value is None or isinstance(value, Module) else refuse_value("a torch.nn.Module")


Channels = Annotated[TupleOf[Real], Field(min_length=3, max_length=3)]
PositiveChannels = Annotated[TupleOf[Positive], Field(min_length=3, max_length=3)]
Layers = TupleOf[Number]


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Description of an image encoder: architecture, weights, input size and normalisation, layers, pooling.

    Parameters
    ----------
    name
        Name of the encoder, which is recorded with the embeddings.
    architecture
        Name of the architecture in timm; empty if `module` is given.
    options
        Arguments of ``timm.create_model``.
    hub
        Repository of the weights on the Hugging Face hub; empty if there is none.
    module
        A module of your own, instead of an architecture. It maps normalised images (n, 3, input_px, input_px) to
        features (n, width), and `pooling` must be ``"output"``.
    input_px
        Side of the input images in pixels; patches of any field are resized to it.
    mean, std
        Mean and standard deviation by which red, green and blue, scaled to 0..1, are normalised.
    layers
        Blocks, counted from 0, whose patch tokens are used.
    pooling
        ``"mean_std"``: mean and standard deviation of the patch tokens of each layer, concatenated. ``"mean"``: the
        mean only. ``"output"``: the output of the encoder itself, without `layers`.
    token_width
        Width of a token, or of the encoder's output; 0 if unknown.
    licence
        Licence of the weights.
    gated
        True if the hub gives the weights only to users who were granted access.
    citation
        Publication, as a DOI or an arXiv identifier.
    convert
        Function that converts a published checkpoint to the architecture's.
    """

    name: Key
    architecture: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    hub: str = ""
    module: Annotated[Any, AfterValidator(_module)] = None
    input_px: Count = 224
    mean: Channels = IMAGENET_MEAN
    std: PositiveChannels = IMAGENET_STD
    layers: Layers = ()
    pooling: Pooling = "output"
    token_width: Number = 0
    licence: str = ""
    gated: bool = False
    citation: str = ""
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None

    def __post_init__(self) -> None:
        for name, value in checked(Encoder, {f.name: getattr(self, f.name) for f in fields(self)}).items():
            object.__setattr__(self, name, value)
        if bool(self.architecture) == (self.module is not None):
            raise ValueError("architecture: expected the name of an architecture in timm, or a module instead of it")
        if bool(self.layers) == (self.pooling == "output"):
            raise ValueError(
                f"layers: {self.layers} with pooling={self.pooling!r}; 'output' takes no layers, 'mean_std' and 'mean' "
                "need at least one"
            )
        if self.module is not None and self.layers:
            raise ValueError("layers: not for a module of your own, whose output is used; leave layers out")

    @property
    def width(self) -> int:
        """Width of an embedding; 0 if unknown."""
        return self.token_width * max(len(self.layers), 1) * (2 if self.pooling == "mean_std" else 1)

    def replace(self, **changes: Any) -> Encoder:
        """Copy the encoder with other values of some fields, such as ``layers=(11,)``.

        Parameters
        ----------
        **changes
            Fields and their new values.

        Raises
        ------
        TypeError, ValueError
            If a field is unknown, or a value has the wrong type or is out of range.
        """
        unknown = sorted(set(changes) - {f.name for f in fields(self)})
        if unknown:
            raise TypeError(f"{unknown[0]}: no such field of an encoder; it has {[f.name for f in fields(self)]}")
        return replace(self, **changes)
