"""HTML report of a prediction: collect its content, and write the page."""

from .content import Content, collect
from .page import write_page

__all__ = ["Content", "collect", "write_page"]
