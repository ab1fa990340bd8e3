"""One adapter variant per file behind the contract of base.py; attach, save, merge. May import model and below."""
