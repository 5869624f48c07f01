"""Page of a report as a data structure, and its output as HTML, JSON, CSV and terminal text."""
