"""The page: static files, served by the operator application."""
