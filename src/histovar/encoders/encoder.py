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
    """An image encoder: architecture and weights, size and normalisation of its input, layers that are kept.

    Parameters
    ----------
    name
        Name by which it is asked for and recorded.
    architecture
        Name of the architecture in timm; empty where `module` is given.
    options
        Arguments of ``timm.create_model``.
    hub
        Repository of the weights on the Hugging Face hub; empty where there is none.
    module
        A module of your own, in place of an architecture. It maps normalised images (n, 3, input_px, input_px) to
        features (n, width), and `pooling` must be ``"output"``.
    input_px
        Pixels a side of the images that it takes; patches of any field are resized to them.
    mean, std
        By which the red, green and blue of images in 0..1 are normalised.
    layers
        Blocks, counted from 0, whose patch tokens are kept.
    pooling
        ``"mean_std"``: mean and standard deviation of the patch tokens of each layer, side by side. ``"mean"``: the
        mean alone. ``"output"``: what the encoder itself returns, without `layers`.
    token_width
        Width of a token, or of the encoder's output; 0 where it is not known.
    licence
        Licence of the weights.
    gated
        Whether the hub gives the weights only to users who were granted access.
    citation
        Where it was published, as a DOI or an arXiv identifier.
    convert
        Function that makes of a published checkpoint one of the architecture.
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
            raise ValueError("architecture: expected the name of an architecture in timm, or a module in its place")
        if bool(self.layers) == (self.pooling == "output"):
            raise ValueError(
                f"layers: {self.layers} with pooling={self.pooling!r}; 'output' takes no layers, 'mean_std' and 'mean' "
                "take at least one"
            )
        if self.module is not None and self.layers:
            raise ValueError("layers: a module of your own returns its features itself; leave layers out")

    @property
    def width(self) -> int:
        """Width of an embedding; 0 where it is not known."""
        return self.token_width * max(len(self.layers), 1) * (2 if self.pooling == "mean_std" else 1)

    def replace(self, **changes: Any) -> Encoder:
        """The same encoder with other fields, such as ``layers=(11,)``.

        Parameters
        ----------
        **changes
            Fields and their values.

        Raises
        ------
        TypeError, ValueError
            If a field is unknown, or a value of another type or out of range.
        """
        unknown = sorted(set(changes) - {f.name for f in fields(self)})
        if unknown:
            raise TypeError(f"{unknown[0]}: no such field of an encoder; it has {[f.name for f in fields(self)]}")
        return replace(self, **changes)
