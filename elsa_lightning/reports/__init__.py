"""``elsa report``: a page about one or several runs, from the files they left; docs/architecture.md lists modules."""
