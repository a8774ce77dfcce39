"""The report of a comparison: on a terminal, as JSON, and as one HTML page."""

from isomoe.parity.report.document import document
from isomoe.parity.report.model import Bisection, FloorSource, Report
from isomoe.parity.report.page import write_page
from isomoe.parity.report.terminal import print_report

__all__ = ["Bisection", "FloorSource", "Report", "document", "print_report", "write_page"]
