"""Folders of runs -> one page for the browser, and pictures.

From top to bottom; each file imports only those below it:
    page, pictures -> tables, layer_charts, class_charts -> charts -> gather -> records
"""

from metawrap.report.gather import Group, gather
from metawrap.report.page import write_report_page
from metawrap.report.pictures import draw_report_pictures

__all__ = ["Group", "draw_report_pictures", "gather", "write_report_page"]
