"""``elsa report``: one page of what runs left. runs.py reads, charts.py draws, page.py writes."""
