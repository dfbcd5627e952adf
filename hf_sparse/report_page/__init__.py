"""A report as a page that stands by itself: one HTML file with charts, or Markdown with tables."""

from hf_sparse.report_page.contents import contents
from hf_sparse.report_page.html import write_html
from hf_sparse.report_page.markdown import write_markdown

__all__ = ["contents", "write_html", "write_markdown"]
