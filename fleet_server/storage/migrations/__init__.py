"""Alembic migrations, brought along with the program."""
