"""The specification of pyembed: one folder for each room of the package."""
