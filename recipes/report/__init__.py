"""The report of a run: which method kept more, which learned more, and by how much beyond the error.

from lora_null.recipes.report import write_report
write_report("runs/quickstart")     # report.md, report.html, forgetting.png
"""

from lora_null.recipes.report.render import print_table, write_report

__all__ = ["print_table", "write_report"]
