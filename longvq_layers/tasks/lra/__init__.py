"""The tasks of the Long Range Arena, from files that the user has downloaded."""
