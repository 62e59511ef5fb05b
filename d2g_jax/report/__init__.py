"""`report.html`: one run as one page that needs nothing but itself."""

from d2g_jax.report.live import LivePage, finish
from d2g_jax.report.page import write_report

__all__ = ["LivePage", "finish", "write_report"]
