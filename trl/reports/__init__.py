"""Reports as single HTML files: charts, style, and the report of a run's folder."""
