"""torchvision beside a torch that it was not compiled for: importing this module makes it importable.

timm and lightning (by torchmetrics) import torchvision where it is installed. One that was compiled for CUDA fails to
import beside a CPU build of torch: its compiled operators are missing, to which it adds rules.
"""

from __future__ import annotations

import re
from importlib.util import find_spec

import torch

# Declarations of operators live as long as the library that made them.
_declarations: list[torch.library.Library] = []


def mend_torchvision() -> None:
    """Make torchvision importable, if it is installed.

    Operators that are missing are declared, without an implementation, until it imports. They are for detecting
    objects, and nothing here calls them.

    Raises
    ------
    ImportError
        If it does not import for another reason; one line that says how to install one that fits.
    """
    declared: set[str] = set()
    while find_spec("torchvision") is not None:
        try:
            import torchvision  # noqa: F401

            return
        except RuntimeError as error:
            missing = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            if missing is None or missing[1] in declared:
                raise ImportError(
                    f"torchvision does not fit the installed torch ({str(error).splitlines()[0]}); install both from "
                    "one source, such as pip install torch torchvision --index-url https://download.pytorch.org/whl/cpu"
                ) from None
            declared.add(missing[1])
            declaration = torch.library.Library("torchvision", "FRAGMENT")
            declaration.define(f"{missing[1]}() -> ()")
            _declarations.append(declaration)


mend_torchvision()
