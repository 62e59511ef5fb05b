"""`report.html`: one run as one page that needs nothing but itself."""

from d2g_jax.report.page import BANDS, write_report

__all__ = ["BANDS", "write_report"]
