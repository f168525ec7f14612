"""Reports of recorded measurements as Markdown, HTML, CSV and plots."""
