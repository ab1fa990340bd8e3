"""report.json, report.html and plots from finished values. May import evals and what is below it."""
