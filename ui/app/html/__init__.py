"""HTML and SVG that the page shows: pure functions from data to text."""
