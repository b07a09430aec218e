"""timm, also beside a torchvision that does not fit the installed torch."""

from __future__ import annotations

import re
from types import ModuleType

import torch

from histovar._extras import import_extra

PURPOSE = "embedding of images"
# Declarations of operators live as long as the library that made them.
_declarations: list[torch.library.Library] = []


def import_timm() -> ModuleType:
    """Import timm.

    timm imports torchvision, and a torchvision that was compiled for CUDA fails to import beside a CPU build of torch:
    its compiled operators are missing, to which it adds rules. They are for detecting objects, and nothing here calls
    them; so those that are missing are declared, without an implementation, until the import succeeds.

    Raises
    ------
    ModuleNotFoundError
        If timm is not installed.
    ImportError
        If torchvision does not import for another reason.
    """
    missing = ""
    while True:
        try:
            return import_extra("timm", "embed", PURPOSE)
        except RuntimeError as error:
            found = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            if found is None or found[1] == missing:
                raise ImportError(
                    f"{PURPOSE} needs timm, whose torchvision does not fit the installed torch "
                    f"({str(error).splitlines()[0]}); install both from one source, such as "
                    "pip install torch torchvision --index-url https://download.pytorch.org/whl/cpu"
                ) from None
            missing = found[1]
            declaration = torch.library.Library("torchvision", "FRAGMENT")
            declaration.define(f"{missing}() -> ()")
            _declarations.append(declaration)
