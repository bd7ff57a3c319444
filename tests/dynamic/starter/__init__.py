"""A project whose tasks start workers, and a program that asks for one from many processes at once."""
