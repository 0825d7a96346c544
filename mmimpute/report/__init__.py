"""The report of a run: one HTML file that needs no network, no script and no server.

`disclosure` decides what may be shown, `figures` draws, `render` puts both into `template.html`.
matplotlib is imported when a report is drawn, not before.
"""

from mmimpute.report.render import render

__all__ = ["render"]
