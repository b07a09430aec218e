"""A prediction as one HTML file: what it says, and the page that shows it."""

from .content import Content, collect
from .page import write_page

__all__ = ["Content", "collect", "write_page"]
