"""One adapter variant per file behind the contract of base.py, the user's own too; attach, save, merge.

May import model and below.
"""
