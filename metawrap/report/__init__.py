"""Folders of runs -> one page for the browser, and pictures. Read `write_report_page` in `page.py` first."""

from metawrap.report.gather import Group, gather
from metawrap.report.page import write_report_page
from metawrap.report.pictures import draw_report_pictures

__all__ = ["Group", "draw_report_pictures", "gather", "write_report_page"]
