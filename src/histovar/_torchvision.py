"""Make a torchvision importable that was built for another torch: import this module first.

timm and lightning (by torchmetrics) import torchvision if it is installed. A CUDA build of torchvision fails to import
beside a CPU build of torch, because it registers rules for compiled operators that are missing.
"""

from __future__ import annotations

import re
from importlib.util import find_spec

import torch

# Operators stay declared only as long as the library object that declared them lives.
_declarations: list[torch.library.Library] = []


def mend_torchvision() -> None:
    """Make torchvision importable, if it is installed.

    Missing operators are declared without an implementation, one by one, until the import succeeds. They are those
    for object detection, which nothing here calls.

    Raises
    ------
    ImportError
        If the import fails for another reason; one line that says how to install a torchvision that fits.
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
