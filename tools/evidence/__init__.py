"""The tables of the README: each is made by one command, kept in `evidence/`, and written from there."""
